"""GET /stats: everybody's figures as JSON; `quire status` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.service import Service, to_json
from core.messages import StatsReply
from core.stats import (
    ApiSnapshot,
    EngineSnapshot,
    Histogram,
    Snapshot,
    SupervisorSnapshot,
    TokenizerSnapshot,
    WorkerSnapshot,
    decode,
    merge,
)

QUANTILES = (0.5, 0.9, 0.99)


async def stats(service: Service, request: Request) -> Response:
    """The figures of this moment, at most a second old."""
    return Response(to_json(stats_of(await service.figures.query())), media_type="application/json")


def stats_of(reply: StatsReply) -> dict[str, Any]:
    """The supervisor's reply as plain objects.

    {"state", "server": facts, "engine" | "tokenizer" | "api": sums over their processes, "workers": one per process,
    "supervisor": processes, devices and incidents}.
    Histograms have their counts per bucket, and p50, p90 and p99 in seconds since the start.
    """
    snapshots = decode_all(reply)
    kinds = {kind: [item for item in snapshots.values() if isinstance(item, kind)] for kind in _KINDS}
    return {
        "state": reply.state,
        "server": reply.server,
        "engine": _plain(merge(kinds[EngineSnapshot]) or EngineSnapshot()),
        "tokenizer": _plain(merge(kinds[TokenizerSnapshot]) or TokenizerSnapshot()),
        "api": _plain(merge(kinds[ApiSnapshot]) or ApiSnapshot()),
        "workers": {name: _plain(item) for name, item in snapshots.items() if isinstance(item, WorkerSnapshot)},
        "supervisor": msgspec.to_builtins(supervisor_of(snapshots)),
    }


def decode_all(reply: StatsReply) -> dict[str, Snapshot]:
    """Process name -> snapshot, of those that have sent one."""
    found = {name: decode(payload) for name, payload in reply.snapshots.items()}
    return {name: snapshot for name, snapshot in found.items() if snapshot is not None}


def supervisor_of(snapshots: Mapping[str, Snapshot]) -> SupervisorSnapshot:
    """What the supervisor sees; empty when it has not said."""
    return next((item for item in snapshots.values() if isinstance(item, SupervisorSnapshot)), SupervisorSnapshot())


_KINDS: tuple[Any, ...] = (EngineSnapshot, TokenizerSnapshot, ApiSnapshot)


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for field in msgspec.structs.fields(snapshot):
        value = getattr(snapshot, field.name)
        if isinstance(value, Histogram):
            quantiles = {f"p{round(share * 100)}": value.quantile(share) for share in QUANTILES}
            value = {"count": value.count, "total": value.total, **quantiles, "counts": value.counts}
        result[field.name] = msgspec.to_builtins(value)
    return result
