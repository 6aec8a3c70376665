"""One row per cell: the schema. Records are the truth; W&B is a mirror of them."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Record:
    """The result of one cell, flat. `None` means "not measured": never 0, never NaN.

    Losses are nats per token on held-out text; `student_loss` is label cross-entropy, never the training objective.
    `*_params` are total parameters, `*_non_embedding` without embeddings; FLOPs as in `accounting.py`.
    """

    schema_version: int
    cell: str
    status: str  # done | failed
    error: str | None = None
    family: str | None = None
    corpus: str | None = None
    student: str | None = None  # nominal scale
    teacher: str | None = None
    data_tokens: int | None = None
    epochs: int | None = None
    teacher_tokens: int | None = None
    teacher_data: str | None = None  # the policy behind teacher_tokens: one scale for all rungs, or `20x` parameters
    seed: int | None = None
    teacher_seed: int | None = None
    student_params: int | None = None
    student_params_non_embedding: int | None = None
    stored_params: int | None = None
    teacher_params: int | None = None
    teacher_params_non_embedding: int | None = None
    init: str | None = None  # pruned | random | shared
    reference: str | None = None  # init=shared: the rung that the one start was cut from
    prune_method: str | None = None
    prune_priority: str | None = None
    prune_layers: str | None = None
    prune_steps: int | None = None
    expanded_vocab: int | None = None  # rows of the matrices after expansion, padding included
    expanded_tokens: int | None = None  # that the expanded tokenizer has; the rows beyond them are padding
    adapt_tokens: int | None = None  # of the teacher's continued pre-training
    second_bytes_per_token_before: float | None = None  # of held-out text mostly outside ASCII
    second_bytes_per_token: float | None = None
    instruct_rows: int | None = None  # conversations to train on, made or read; what was too long is in metrics
    instruct_epochs: int | None = None
    instruct_learning_rate: float | None = None  # peak
    instruct_batch: int | None = None  # rows in one optimiser step, packed sequences where they are packed
    instruct_lora_rank: int | None = None
    instruct_replay: float | None = None  # where it was set
    instruct_settings: str | None = None  # `settings` of both kinds of tuning
    prefer_rows: int | None = None  # pairs
    prefer_epochs: int | None = None
    prefer_learning_rate: float | None = None
    prefer_batch: int | None = None
    prefer_lora_rank: int | None = None
    prefer_beta: float | None = None
    shape: str | None = None
    settings: str | None = None  # what no other column says and is not as usual: `prune.batches=8 train.schedule=wsd`
    batch: int | None = None  # sequences in one optimiser step
    learning_rate: float | None = None  # peak
    precision: str | None = None
    objective: str | None = None  # prefix_lm: losses over the second half of each sequence; null: over every token
    loss: str | None = None  # name of the distillation loss
    kd_weight: float | None = None
    temperature: float | None = None
    skew: float | None = None  # where it was set
    hidden_weight: float | None = None  # where it was set
    signal: str | None = None
    signal_bytes_per_token: float | None = None  # of a cached signal, on disk
    trained: str | None = None  # digest of the trained student: cells that were only scored otherwise share it
    held_out_tokens: int | None = None  # predicted, in domain
    student_loss: float | None = None
    student_loss_stderr: float | None = None
    student_bits_per_byte: float | None = None  # null too where tokens do not tell the bytes of the text
    student_loss_ood: float | None = None
    teacher_loss: float | None = None
    teacher_loss_ood: float | None = None
    teacher_entropy: float | None = None
    init_loss: float | None = None
    tuned_loss: float | None = None  # held-out loss after instruction tuning and preferences
    train_ce: float | None = None  # the last logged points, averaged
    train_kl: float | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)  # the student's {task: {value, stderr, shots, …}}
    teacher_metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_flops: float | None = None
    teacher_flops: float | None = None  # the teacher's forward passes in this cell
    teacher_train_flops: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None  # model FLOPs over the devices' peak, where that is known
    wall_s: float | None = None
    peak_memory_bytes: int | None = None
    micro_batch: int | None = None
    device: str | None = None
    threads: int | None = None
    ranks: int | None = None
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"a record cannot hold {f.name}={value}: what was not measured is None")

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return dataclasses.asdict(self)


RESULT_FIELDS = (
    "status",
    "student_params",
    "student_params_non_embedding",
    "stored_params",
    "teacher_params",
    "teacher_params_non_embedding",
    "learning_rate",
    "student_loss",
    "student_loss_stderr",
    "student_bits_per_byte",
    "student_loss_ood",
    "teacher_loss",
    "teacher_loss_ood",
    "teacher_entropy",
    "init_loss",
    "train_ce",
    "train_kl",
    "metrics",
    "teacher_metrics",
    "train_flops",
    "teacher_flops",
    "teacher_train_flops",
)


NESTED = ("metrics", "teacher_metrics", "versions")  # spread over columns in tables
