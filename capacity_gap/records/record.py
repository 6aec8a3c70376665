"""One row per cell: its columns. Records are authoritative; W&B is a mirror of them.

Columns that hold a setting's own value are declared with the setting; all others are the fields of `Record`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.settings.declare import NOTHING, type_name, walk

SCHEMA_VERSION = 1


def column(
    default: Any,
    meaning: str,
    *,
    result: bool = False,
    parts: int | None = None,
    parts_repeats: int | None = None,
) -> Any:
    """A field of `Record`.

    Args:
        default: None, or the type of an empty one.
        meaning: one sentence.
        result: it must repeat bit for bit at equal device, threads, ranks and versions.
        parts: it parts curves, which are listed in the order of these numbers (settings have such numbers too).
        parts_repeats: it parts only cells that agree in everything else, their seeds too; an order likewise.
    """
    known = {"meaning": meaning, "result": result, "parts": parts, "parts_repeats": parts_repeats}
    if default is MISSING:
        return field(metadata=known)
    if default is dict:
        return field(default_factory=dict, metadata=known)
    return field(default=default, metadata=known)


@dataclass(frozen=True)
class Record:
    """The result of one cell, flat. `None` means "not measured": never 0, never NaN.

    Losses are nats per token on held-out text; `student_loss` is label cross-entropy, never the training objective.
    `*_params` are total parameters, `*_non_embedding` without embeddings; FLOPs as in `models/accounting.py`.
    """

    schema_version: int = column(MISSING, "Version of the columns.")
    cell: str = column(MISSING, "Digest of the cell: `store/record/<cell>/`.")
    status: str = column(MISSING, "done or failed.")
    error: str | None = column(None, "Why the cell failed.")
    family: str | None = column(None, "The ladder of teachers.", parts=10)
    corpus: str | None = column(None, "The text that students learn; a mixture by its parts.", parts=20)
    student: str | None = column(None, "The student's nominal scale.")
    teacher: str | None = column(None, "The teacher's rung.")
    data_tokens: int | None = column(None, "Tokens the student was trained on.", parts=230)
    teacher_tokens: int | None = column(
        None, "Tokens of the teacher's pre-training; null for published ones.", parts_repeats=30
    )
    teacher_data: str | None = column(
        None, "The policy behind teacher_tokens: one scale for all rungs, or `20x` parameters.", parts=100
    )
    asked: Mapping[str, Any] = field(default_factory=dict)  # the columns that settings declare
    student_params: int | None = column(None, "The student's parameters.", result=True)
    student_params_non_embedding: int | None = column(None, "Non-embedding parameters.", result=True)
    stored_params: int | None = column(None, "Parameters stored in the student's files.", result=True)
    teacher_params: int | None = column(None, "The teacher's parameters.", result=True)
    teacher_params_non_embedding: int | None = column(None, "Non-embedding parameters.", result=True)
    shape: str | None = column(None, "How the student's shape was chosen, or the fixed shape.", parts=50)
    start: str | None = column(None, "The checkpoint that the student starts from, if any.", parts=35)
    start_tokens: int | None = column(
        None, "init=pretrained: tokens on which the initial student was pre-trained here.", parts=36
    )
    expanded_vocab: int | None = column(
        None, "Rows of the embedding matrices after expansion, padding included.", parts=170
    )
    expanded_tokens: int | None = column(None, "Tokens of the expanded tokenizer; rows beyond them are padding.")
    adapt_tokens: int | None = column(None, "Tokens of the teacher's continued pre-training.", parts=180)
    second_bytes_per_token_before: float | None = column(
        None, "Bytes per token of held-out text mostly outside ASCII, before expansion."
    )
    second_bytes_per_token: float | None = column(None, "Bytes per token of the same text after expansion.")
    instruct_rows: int | None = column(
        None, "Training conversations, generated or read; those too long are counted in metrics.", parts_repeats=50
    )
    instruct_settings: str | None = column(
        None, "Non-default settings of instruction and preference tuning that have no column.", parts_repeats=110
    )
    prefer_rows: int | None = column(None, "Preference pairs.", parts_repeats=120)
    registration: str | None = column(None, "SHA-256 of the preregistration file of this record's grid.")
    settings: str | None = column(
        None, "Non-default settings that have no column: `prune.batches=8 train.schedule=wsd`.", parts=190
    )
    learning_rate: float | None = column(None, "The student's peak learning rate.", result=True, parts_repeats=10)
    objective: str | None = column(
        None, "prefix_lm: losses over the second half of each sequence; null: over every token.", parts=160
    )
    signal: str | None = column(None, "How teacher outputs were obtained, and values per token if cached.", parts=130)
    signal_bytes_per_token: float | None = column(None, "Bytes per token of cached teacher logits, on disk.")
    trained: str | None = column(None, "Digest of the trained student; cells that differ only in evaluation share it.")
    held_out_tokens: int | None = column(None, "In-domain tokens predicted.", parts_repeats=40)
    student_loss: float | None = column(None, "Held-out label cross-entropy.", result=True)
    student_loss_stderr: float | None = column(None, "Its standard error.", result=True)
    student_bits_per_byte: float | None = column(
        None, "Held-out bits per byte; null where the bytes of a token are not known.", result=True
    )
    student_loss_ood: float | None = column(None, "Loss on out-of-domain text.", result=True)
    student_loss_validation: float | None = column(
        None, "Loss on the validation split, for choosing settings.", result=True
    )
    teacher_loss: float | None = column(None, "The teacher's held-out loss.", result=True)
    teacher_loss_ood: float | None = column(None, "The teacher's loss on out-of-domain text.", result=True)
    teacher_entropy: float | None = column(None, "Mean entropy of the teacher's predictions.", result=True)
    init_loss: float | None = column(None, "The student's held-out loss before training.", result=True)
    tuned_loss: float | None = column(None, "Held-out loss after instruction and preference tuning.")
    train_ce: float | None = column(None, "Training cross-entropy, mean of the last logged points.", result=True)
    train_kl: float | None = column(None, "Training forward KL, mean of the last logged points.", result=True)
    metrics: dict[str, dict[str, Any]] = column(
        dict, "The student's benchmark scores, {task: {value, stderr, shots, …}}.", result=True
    )
    teacher_metrics: dict[str, dict[str, Any]] = column(dict, "The teacher's benchmark scores.", result=True)
    train_flops: float | None = column(None, "FLOPs of the student's training.", result=True)
    teacher_flops: float | None = column(None, "FLOPs of the teacher's forward passes in this cell.", result=True)
    teacher_train_flops: float | None = column(None, "FLOPs of the teacher's pre-training.", result=True)
    tokens_per_s: float | None = column(None, "Speed of the student's training.")
    mfu: float | None = column(None, "Model FLOPs utilisation, where the devices' peak is known.")
    wall_s: float | None = column(None, "Seconds of the student's training.")
    peak_memory_bytes: int | None = column(None, "Peak memory of training.")
    micro_batch: int | None = column(None, "Sequences per device and forward pass.")
    device: str | None = column(None, "The device that trained the student.")
    threads: int | None = column(None, "CPU threads per process.", parts_repeats=20)
    ranks: int | None = column(None, "Number of ranks.")
    git_commit: str | None = column(None, "The commit of this project.")
    versions: dict[str, str] = column(dict, "Versions of Python and packages.")
    created: str | None = column(None, "When the record was made, UTC.")
    origin: str | None = column(
        None,
        "Who ran the cell, in records that were imported; null in a store. One cell of two origins is two results, "
        "averaged like seeds.",
    )

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"a record cannot hold {name}={value}: use None for what was not measured")

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Record":
        """A record of flat columns.

        Raises:
            TypeError: a name is no column.
        """
        own = {f.name for f in dataclasses.fields(cls)} - {"asked"}
        asked = {name: value for name, value in row.items() if name in setting_columns()}
        return cls(**{k: v for k, v in row.items() if k in own or k not in asked}, asked=asked)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types, every column by its name."""
        flat: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            flat |= dict.fromkeys(setting_columns()) | dict(value) if f.name == "asked" else {f.name: value}
        return flat


@dataclass(frozen=True)
class Column:
    """The declaration of a column."""

    name: str
    kind: str  # its type, as declared
    meaning: str
    result: bool = False
    parts: int | None = None
    parts_repeats: int | None = None
    source: str = ""  # the setting that it tells
    default: Any = None  # what it holds where that setting is not given


@functools.cache
def setting_columns() -> dict[str, Column]:
    """The columns that hold a setting's own value, as settings declare them."""
    found = {}
    for known in walk(RunConfig):
        s = known.setting
        if s.column and not s.computed:
            kind, empty = type_name(known.field), s.if_set or s.null_at is not NOTHING
            if empty and "None" not in kind:
                kind += " | None"
            meaning = f"{s.meaning} Null at the default." if empty else s.meaning
            found[s.column] = Column(
                s.column,
                kind,
                meaning,
                parts=s.parts,
                parts_repeats=s.parts_repeats,
                source=known.key,
                default=None if s.if_set or s.null_at == known.default else known.default,
            )
    return found


@functools.cache
def columns() -> dict[str, Column]:
    """Every column of a record, in order."""
    found: dict[str, Column] = {}
    for f in dataclasses.fields(Record):
        if f.name == "asked":
            found |= setting_columns()
        else:
            about = {k: f.metadata[k] for k in ("result", "parts", "parts_repeats") if k in f.metadata}
            found[f.name] = Column(f.name, type_name(f), f.metadata.get("meaning", ""), **about)
    return found


def parting_columns() -> tuple[str, ...]:
    """The columns that part curves: cells that differ in one of them are not comparable within a curve."""
    return _in_order({c.name: c.parts for c in columns().values()})


def repeat_parting_columns() -> tuple[str, ...]:
    """The columns that part only cells that agree in everything else, their seeds too."""
    return _in_order({c.name: c.parts_repeats for c in columns().values()})


def _in_order(numbers: Mapping[str, int | None]) -> tuple[str, ...]:
    """The names that have a number, by number."""
    given = {name: n for name, n in numbers.items() if n is not None}
    return tuple(sorted(given, key=given.__getitem__))


RESULT_FIELDS = ("status", *(c.name for c in columns().values() if c.result))  # repeat bit for bit (see `column`)
NESTED = ("metrics", "teacher_metrics", "versions")  # spread over columns in tables
