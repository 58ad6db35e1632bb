"""GrammarCheck: refuses a grammar that cannot be used, before a worker or anybody's stream meets it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import msgspec

from core.grammar import Grammars
from core.model_info import ModelInfo
from core.text_codec import TextCodec
from quire import StructuredOutputs

MAX_KNOWN = 4096  # digests of accepted grammars


class GrammarCheck:
    """`check` runs in one thread at a time, `known` anywhere."""

    def __init__(self, model: ModelInfo, codec: TextCodec) -> None:
        self._model = model
        self._codec = codec
        self._grammars: Grammars | None = None
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def known(self, wanted: StructuredOutputs) -> bool:
        """Whether it was accepted not long ago."""
        return _digest(wanted) in self._known

    def check(self, wanted: StructuredOutputs) -> None:
        """Compile it, as the workers will. Raises QuireError invalid_grammar naming the field and the reason."""
        if self._grammars is None:  # 0.3 s at 128k tokens, which only a server that is asked for grammars spends
            self._grammars = Grammars(self._codec, self._model.vocab_size, self._model.eos_ids)
        self._grammars.compile(wanted)
        self._known[_digest(wanted)] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def _digest(wanted: StructuredOutputs) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(wanted), digest_size=16).digest()
