"""What the files of a run folder hold, for folders that may come from anybody.

The seal of a record has no secret in it: a sealed record can say anything. Whoever computes with a record or shows it
asks for its form first, and says in one line which key does not have it. Keys that no program reads are not looked at.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NamedTuple,
    NotRequired,  # before Python 3.12 pydantic cannot read typing's own
)

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from paramgolf.errors import GolfError

Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Some = Annotated[int, Field(gt=0, lt=2**63)]
_LARGEST = 1e15
Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]  # no NaN, no infinity
Score = Annotated[float, Field(ge=0.0, le=_LARGEST)]
NAMED = ("recipe", "seed")
# What every finished run has and its page shows.
SHOWN = (
    *NAMED, "paramgolf", "val_bpb", "val_bpb_float", "scored_tokens", "scored_bytes", "artifact_bytes", "code_bytes",
    "total_bytes", "cap_bytes", "ledger", "params", "steps", "train_tokens", "step_ms", "seconds", "training",
    "peak_memory_bytes", "environment", "sha256", "data", "peers", "paths",
)  # fmt: skip
# Which keys another brings along.
_WITH = {"val_bpb_sliding": ("val_loss_sliding", "stride"), "val_bpb_table": ("table_bytes",)}


class Peer(TypedDict):
    """A general compressor on the same text: its bits per byte and the bytes it wrote."""

    bpb: Score
    bytes: Count


class Environment(TypedDict):
    """The machine of a run (see environment.py)."""

    cpu: str
    cpu_count: Count | None
    gpus: list[str]
    torch: str


class Training(TypedDict):
    """How long training took, why it ended, and the number of its processes."""

    train_seconds: Score
    stop_reason: str
    world: Some


class Shard(TypedDict):
    """A file of tokens, by its hash."""

    sha256: str


class Side(TypedDict):
    """The training or the validation part of the data; `bytes` of text."""

    shards: list[Shard]
    bytes: NotRequired[Count | None]
    sha256: NotRequired[str | None]


class Tokenizer(TypedDict):
    """The tokenizer, by the hash of its bytes."""

    sha256: str


class Source(TypedDict):
    """A file of text that the data was made of, by its hash."""

    sha256: NotRequired[str | None]


class Data(TypedDict):
    """What a run read: where it came from, its tokenizer and its two parts."""

    source: NotRequired[list[Source]]
    tokenizer: Tokenizer
    train: Side
    val: Side


class Miscounted(TypedDict):
    """A document, by its number, whose bytes the tokenizer's table counts otherwise, and why."""

    document: Count
    true_bytes: Count
    table_bytes: Count
    decoded_bytes: Count
    cause: str


class ByteTable(TypedDict):
    """The tokenizer's byte counts against those of the documents (see data/byte_oracle.py)."""

    documents: Count
    true_bytes: Count
    table_bytes: Count
    documents_that_differ: Count
    largest_difference: Count
    documents_changed: Count | None
    first: list[Miscounted]


class Group(TypedDict):
    """What a group of tensors got: bytes by estimate, and the predicted loss in nats a token."""

    bits: Integer
    step: Number
    bytes: Number
    loss: Number


class Fit(TypedDict, total=False):
    """What `pack.fit` chose, and what 1,000 more bytes would take off the loss."""

    groups: dict[str, Group]
    nats_per_kilobyte: Number


class Proof(TypedDict):
    """What `golf prove` left: a real file of the text, decoded, and the score it should have."""

    proved_bpb: Score
    val_bpb_same_windows: Score
    overhead: Number
    file_bytes: Count
    text_bytes: Count
    model_bytes: Count
    documents: Count | None
    data: str
    validation: bool
    seq_len: Count
    stride: Count
    lanes: Count
    peers: NotRequired[dict[str, Peer]]  # not of tokens without documents


class Paths(TypedDict):
    """Where a run wrote its artifact and its page."""

    artifact: str
    report: str


def _counted(seconds: dict[str, float]) -> dict[str, float]:
    """`seconds` of a run, which are nothing without those that its budget counts."""
    if "strict" not in seconds:
        raise PydanticCustomError("no_strict", "input should have 'strict'")
    return seconds


class Record(TypedDict, total=False):
    """The keys of `record.json` that programs read."""

    recipe: str
    seed: Integer
    paramgolf: str
    bytes_from: str
    codec: str
    windows: str
    val_loss: Score
    val_bpb: Score
    val_loss_sliding: Score
    val_bpb_sliding: Score
    val_loss_float: Score
    val_bpb_float: Score
    val_bpb_table: Score | None
    val_bpb_ngram: Score
    val_bpb_tilt: Score
    val_bpb_ttt: Score
    val_bpb_ttt_tilt: Score
    stride: Count
    scored_tokens: Some
    scored_bytes: Some
    table_bytes: Count
    artifact_bytes: Some
    code_bytes: Count
    total_bytes: Count
    cap_bytes: Count
    payload_bytes: Count
    params: Count
    steps: Count
    train_tokens: Count
    step_ms: Score
    peak_memory_bytes: Count
    ledger: dict[str, Count]
    seconds: Annotated[dict[str, Number], AfterValidator(_counted)]
    sha256: dict[str, str]
    environment: Environment
    training: Training
    data: Data
    byte_table: ByteTable | None
    fit: Fit
    peers: dict[str, Peer]
    paths: Paths
    proof: Proof


class FrontierPoint(TypedDict):
    """An artifact of some size: bits per byte that it has more than the float model, measured and predicted."""

    total_bytes: Count
    measured_bpb: Number
    predicted_bpb: Number


class Frontier(TypedDict):
    """`frontier.json`, as far as it is drawn."""

    float_bpb: Number
    chosen_bytes: Count
    points: list[FrontierPoint]


class LogPoint(NamedTuple):
    """A line of `train.jsonl`, as far as it is drawn. `loss`: nats a token."""

    step: float
    tokens: float
    elapsed: float
    loss: float


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def check_record(record: dict[str, Any], where: Path, needed: tuple[str, ...] = NAMED) -> dict[str, Any]:
    """`record`, if it has the `needed` keys and every key that programs read has its form; else GolfError."""
    brought = [key for name, others in _WITH.items() if record.get(name) is not None for key in others]
    if missing := [key for key in (*needed, *brought) if key not in record]:
        raise GolfError(f"{where} has no '{missing[0]}', which the record of a run has; get the file again")
    try:
        _adapter(Record).validate_python(record, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"]
        raise GolfError(f"{where}: {key}: {message[:1].lower()}{message[1:]}; get the file again") from None
    return record


def read_frontier(path: Path) -> dict[str, Any]:
    """What `golf pack --frontier` left; {} without it, or for a file of another form."""
    try:
        return _adapter(Frontier).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError):
        return {}


def log_point(line: str | bytes) -> LogPoint | None:
    """A line of a train.jsonl; None for one that is torn, or of another form."""
    try:
        row = json.loads(line)
        point = LogPoint(*(float(row[key]) for key in LogPoint._fields))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return point if all(abs(value) <= _LARGEST for value in point) else None
