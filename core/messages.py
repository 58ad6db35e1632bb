"""Every message between Quire's processes. Read top to bottom, it is the way of a request.

A frame on any Channel is a list of messages of that channel's union (msgspec msgpack, arrays, tagged): a step sends one
frame to each peer, never one per token. New fields go last with a default. No pickle, ever.

    api -> tokenizer       Generate, Abort
    tokenizer -> scheduler Hello, Submit, Stop, Abort
    scheduler -> worker    Batch, Introduce, Shutdown
    worker -> scheduler    WorkerReady, BatchResult, WorkerFailed
    scheduler -> tokenizer StepOutput, Rejected, Failed, QueueState
    tokenizer -> api       Started, Delta, then exactly one of Finished, Rejected, Failed; QueueState
    any -> supervisor      Ready, Heartbeat, StatsQuery
    supervisor -> any      Shutdown, StatsReply

`engine` names the engine and what it serves, "name@revision". Times are CLOCK_MONOTONIC seconds, which all processes
of one machine share.
"""

from __future__ import annotations

import msgspec

from quire import SamplingParams


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, omit_defaults=True, gc=False):
    """Base of everything that travels."""


# --------------------------------------------------------------------------------------------- api -> tokenizer


class TextPrompt(Message, frozen=True):
    """Plain text; the tokenizer adds the special tokens that its post-processor defines."""

    text: str


class TokensPrompt(Message, frozen=True):
    """Token ids, taken as they are."""

    ids: list[int]


class ChatPrompt(Message, frozen=True):
    """Messages for the chat template. `messages` and `tools` are JSON texts (already checked to be of valid shape)."""

    messages: bytes
    tools: bytes | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: bytes | None = None


Prompt = TextPrompt | TokensPrompt | ChatPrompt


class ChoiceProgress(Message, frozen=True):
    """What a resumed choice had produced: its output ids so far (the journal's, apart from the prompt's)."""

    choice: int
    output_ids: list[int]


class Generate(Message, frozen=True):
    """A request to generate. `sampling.seed` is always set here, so that a restart draws the same tokens."""

    request_id: str
    engine: str
    prompt: Prompt
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    arrival_s: float = 0.0
    deadline_s: float | None = None
    want_text: bool = True
    want_prompt: bool = False  # Started carries the prompt's ids and text pieces (echo)
    delta_tokens: int = 1  # after the first, a choice's news waits for so many tokens, or its end
    epoch: int = 0
    resume: list[ChoiceProgress] = []
    tenant: str = ""  # whose API key it came with
    user: str = ""  # one of the tenant's users


class Abort(Message, frozen=True):
    """The client went away: free everything at once. No ending is sent for an aborted request."""

    request_id: str


ToTokenizer = Generate | Abort

# --------------------------------------------------------------------------------------------- tokenizer -> scheduler


class TokenSegment(Message, frozen=True):
    """A run of prompt token ids."""

    ids: list[int]


Segment = TokenSegment  # embeddings with a content digest become a second member of this union


class Submit(Message, frozen=True):
    """A tokenized request: `sampling.n` sequences over one prompt.

    `eos_ids` end a sequence (empty with ignore_eos); `sampling.max_tokens` is always set. `cache_keys` are the extra
    keys of the prefix cache's hashes (adapter digest, salt).
    """

    request_id: str
    engine: str
    segments: list[Segment]
    sampling: SamplingParams
    eos_ids: list[int] = []
    priority: int = 0
    cache_keys: list[str] = []
    arrival_s: float = 0.0
    deadline_s: float | None = None
    adapter_slot: int = 0
    epoch: int = 0
    resume: list[ChoiceProgress] = []
    tenant: str = ""
    user: str = ""


class Stop(Message, frozen=True):
    """The tokenizer ended this choice by a text rule (stop string): free it at once. Nothing is answered."""

    request_id: str
    choice: int


class Hello(Message, frozen=True):
    """A tokenizer process begins, with nothing under way: what a process of its name had is aborted."""

    process: str


ToScheduler = Submit | Stop | Abort | Hello

# --------------------------------------------------------------------------------------------- scheduler -> worker


class NewSequence(Message, frozen=True):
    """A sequence that gets the persistent row `row` of every worker: sent in full once, then only diffs.

    A resumed or preempted sequence comes back with its `output_ids`; prompt and output stay apart because penalties,
    min_tokens and the RNG position count output tokens only.
    """

    row: int
    choice: int
    prompt_ids: list[int]
    output_ids: list[int]
    sampling: SamplingParams
    eos_ids: list[int] = []
    adapter_slot: int = 0


class RowBlocks(Message, frozen=True):
    """Blocks appended to (or replaced in) row `row`'s block table of KV group `group`, from table index `start` on.

    A sliding-window group sends -1 for entries that it no longer holds.
    """

    row: int
    group: int
    start: int
    block_ids: list[int]


class BlockCopy(Message, frozen=True):
    """Copy the whole block `src` to `dst` in group `group`, before the step (copy-on-write)."""

    group: int
    src: int
    dst: int


class Scheduled(Message, frozen=True):
    """One row's share of a step: token positions [start, start + num_tokens) are computed.

    `sample`: the step reaches the sequence's end, so the next token is drawn (its position is start + num_tokens).
    `prompt_logprobs`: the positions computed here also answer log-probabilities of the prompt tokens that follow them.
    `draft_ids`: speculative tokens that follow the last known one (none without speculation).
    """

    row: int
    start: int
    num_tokens: int
    sample: bool
    prompt_logprobs: bool = False
    draft_ids: list[int] = []


class Batch(Message, frozen=True):
    """The scheduler's decision for one step; it may mix prefill and decode.

    Applied in this order: release rows, new sequences, block tables, block copies, then the forward over `scheduled`
    (decode rows first), then sampling. Input ids come from the worker's own token state, [row, position]: the id that
    step N sampled is there when step N+1 runs, without passing through the scheduler.
    """

    engine: str
    step: int
    scheduled: list[Scheduled]
    new: list[NewSequence] = []
    released: list[int] = []
    blocks: list[RowBlocks] = []
    copies: list[BlockCopy] = []
    sent_s: float = 0.0
    reset: bool = False  # the worker forgets all rows first; a fresh worker ignores every Batch before its first reset


class Shutdown(Message, frozen=True):
    """End in order: finish nothing new, close sockets, exit 0."""

    reason: str = ""


class Introduce(Message, frozen=True):
    """A scheduler process begins: forget what an earlier one has sent, and say WorkerReady (again)."""


ToWorker = Batch | Introduce | Shutdown

# --------------------------------------------------------------------------------------------- worker -> scheduler


class KVSpec(Message, frozen=True):
    """One group of layers that share a block table.

    `window` None: full attention; otherwise tokens older than `window` are never read again.
    `bytes_per_token`: over all layers of the group, on one rank.
    """

    num_layers: int
    bytes_per_token: int
    window: int | None = None


class WorkerReady(Message, frozen=True):
    """A rank has its weights and its cache: the facts that the scheduler needs."""

    rank: int
    engine: str
    block_size: int
    kv_specs: list[KVSpec]
    num_blocks: list[int]  # per group
    max_num_seqs: int
    max_step_tokens: int
    device: str = ""
    weights_bytes: int = 0
    kv_bytes: int = 0
    ideal_step_tokens: int = 160  # where the device's GEMMs turn compute-bound (pacing)
    pid: int = 0  # tells a rank that was restarted from one that says it again
    step_sizes: list[int] = []  # token counts to which steps are padded, ascending; empty: none is


class TokenLogprobs(Message, frozen=True):
    """Log-probabilities at one position, natural log, of the distribution before temperature and truncation.

    `rank` counts the tokens that are more probable (0: the most probable one).
    """

    logprob: float
    rank: int
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class RowResult(Message, frozen=True):
    """What one row of a Batch gave: several ids with speculation, one otherwise, none for a row that did not sample.

    `prompt_logprobs` answer the prompt positions start+1 .. start+num_tokens of this step (those inside the prompt).
    `grammar_error`: why the row's grammar lets it go no further; the request ends with it, and no token is given.
    """

    row: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    grammar_error: str = ""


class BatchResult(Message, frozen=True):
    """The answer to Batch `step`. `received_s` is when the worker took the Batch from its socket, `done_s` when ids
    were on the host; `busy_s` is the device's time in the step."""

    engine: str
    step: int
    results: list[RowResult]
    received_s: float = 0.0
    done_s: float = 0.0
    busy_s: float = 0.0


class WorkerFailed(Message, frozen=True):
    """The worker could not run Batch `step`; `rows` are the offenders when they are known."""

    rank: int
    step: int
    message: str
    rows: list[int] = []


FromWorker = WorkerReady | BatchResult | WorkerFailed

# --------------------------------------------------------------------------------------------- scheduler -> tokenizer


class SequenceOutput(Message, frozen=True):
    """New tokens of one choice. `first` is the index of token_ids[0] among the choice's output tokens.

    `finish_reason`: "stop" (end-of-sequence or a stop id), "length", or None while it goes on. A stop id itself is in
    token_ids; `stop_reason` names it when it was one of the request's stop_token_ids.
    """

    request_id: str
    choice: int
    first: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: str | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0  # prompt tokens that the prefix cache gave (set with the first token)
    prompt_logprobs: list[TokenLogprobs] = []  # for prompt positions in order, starting at position 1
    epoch: int = 0


class StepOutput(Message, frozen=True):
    """All of one step's news for one tokenizer process.

    `queued_s`: seconds in the queue of requests whose first token is among the step's news.
    """

    engine: str
    step: int
    outputs: list[SequenceOutput]
    queued_s: dict[str, float] = {}


class Rejected(Message, frozen=True):
    """An ending: the request never began. Codes are those of core/errors.py."""

    request_id: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class Failed(Message, frozen=True):
    """An ending: the request had begun."""

    request_id: str
    code: str
    message: str


class QueueState(Message, frozen=True):
    """How full the house is, so that the doors can refuse early. Sent when it changes, some twenty times a second.

    `waiting`: sequences; `waiting_tokens`: their prompt tokens; `requests`: those that wait or run. `drain_s`: seconds
    until what waits now will have begun, at the measured rate.
    """

    waiting: int
    waiting_tokens: int
    requests: int
    drain_s: float = 1.0


FromScheduler = StepOutput | Rejected | Failed | QueueState

# --------------------------------------------------------------------------------------------- tokenizer -> api


class Started(Message, frozen=True):
    """The request was tokenized and handed to the scheduler. Ids and pieces only when Generate.want_prompt."""

    request_id: str
    prompt_tokens: int
    prompt_ids: list[int] = []
    prompt_text: str = ""


class TokenText(Message, frozen=True):
    """A token as a client sees it: text (may be empty inside a UTF-8 character), its bytes, its log-probability."""

    token_id: int
    text: str
    raw: bytes
    logprob: float
    rank: int = 0
    top: list[tuple[int, str, bytes, float]] = []  # (id, text, bytes, logprob)


class Delta(Message, frozen=True):
    """News of one choice. `first` is the index of token_ids[0]; `text` may lag behind token_ids, never ahead."""

    request_id: str
    choice: int
    first: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenText] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenText | None] = []  # element 0 is None: the first token has no distribution
    epoch: int = 0


class Finished(Message, frozen=True):
    """An ending: all choices have a finish_reason. Tokens after a stop string are not counted."""

    request_id: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queued_s: float = 0.0  # between the request's arrival and its first step


FromTokenizer = Started | Delta | Finished | Rejected | Failed | QueueState

# --------------------------------------------------------------------------------------------- control (supervisor)


class Ready(Message, frozen=True):
    """A process can do its work. `detail`: a line for the start-up table; `facts` feed status and /v1/models."""

    process: str
    pid: int
    detail: str = ""
    phases: dict[str, float] = {}  # phase name -> seconds
    facts: dict[str, str | int | float] = {}


class Heartbeat(Message, frozen=True):
    """Sent every second from the process's own loop (never from a thread of its own). `snapshot` is JSON-like stats."""

    process: str
    pid: int
    sent_s: float
    snapshot: bytes = b""  # msgpack of core.stats.Snapshot


class StatsQuery(Message, frozen=True):
    """Ask the supervisor for everybody's latest snapshots."""

    query_id: int


class StatsReply(Message, frozen=True):
    """`snapshots`: process name -> msgpack of a core.stats.Snapshot.

    `state`: "loading", "ready", "draining" or "failed".
    """

    query_id: int
    state: str
    snapshots: dict[str, bytes]
    server: dict[str, str | int | float] = {}


ToSupervisor = Ready | Heartbeat | StatsQuery
FromSupervisor = Shutdown | StatsReply
