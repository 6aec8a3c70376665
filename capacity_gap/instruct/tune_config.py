"""Settings of instruction tuning and preference optimisation."""

from dataclasses import dataclass
from pathlib import Path

from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import user_path

ROWS = "Rows generated from templates over the corpus; 0 and no path: skip this stage."
OWN = "Your own rows, a .jsonl file; hashed by content, not path."
RATE = "Peak learning rate."
BATCH = "Rows per optimiser step; with packing, packed sequences."
ADAPTERS = "Rank of LoRA adapters, which are merged at the end; 0: full fine-tuning."


@dataclass
class TuneConfig:
    """What supervised fine-tuning and preference optimisation share: TRL's trainer, AdamW, cosine."""

    count: int = setting(0, ROWS, least=0, most=10**9)
    path: str | None = setting(None, OWN, decides=False, content=True)
    epochs: int = setting(3, "Epochs over the rows.", least=1, most=10_000)
    batch_size: int = setting(16, BATCH, least=1, most=2**20)
    learning_rate: float = setting(2e-5, RATE, above=0, most=1e30)
    warmup: float = setting(0.1, "Share of all steps used for learning-rate warm-up.", least=0, most=1)
    max_length: int = setting(256, "Maximum tokens of one sequence.", least=1, most=2**17)
    lora_rank: int = setting(0, ADAPTERS, least=0, most=2**16)

    def __post_init__(self) -> None:
        name = self._section
        validate(name, self)
        if self.path is not None and not user_path(self.path).is_file():
            raise ConfigError(f"{name}.path={self.path} does not exist (seen from {Path.cwd()}). Give a .jsonl file.")
        if self.path is not None and self.count:
            raise ConfigError(
                f"{name}.path={self.path} with {name}.count={self.count}: set one of them; rows are either read or "
                "generated."
            )

    @property
    def _section(self) -> str:
        return "tune"

    @property
    def wanted(self) -> bool:
        """Whether there is anything to train on."""
        return bool(self.count or self.path)


@dataclass
class InstructConfig(TuneConfig):
    """Supervised fine-tuning on conversations `{"messages": [...]}`; only answers count in the loss."""

    count: int = setting(0, ROWS, least=0, most=10**9, column="instruct_rows", computed=True)
    epochs: int = setting(3, "Epochs over the rows.", least=1, most=10_000, column="instruct_epochs", parts_repeats=60)
    learning_rate: float = setting(2e-5, RATE, above=0, most=1e30, column="instruct_learning_rate", parts_repeats=70)
    batch_size: int = setting(16, BATCH, least=1, most=2**20, column="instruct_batch", parts_repeats=80)
    lora_rank: int = setting(0, ADAPTERS, least=0, most=2**16, column="instruct_lora_rank", null_at=0, parts_repeats=90)
    held_out: int = setting(
        300, "Held-out conversations for exact match; with a path, the last rows of the file.", least=1, most=10**9
    )
    answer_tokens: int = setting(32, "Maximum tokens of one answer.", least=1, most=2**17)
    packing: bool = setting(True, "Pack several conversations into one sequence, without attention between them.")
    neftune: float = setting(0.0, "Noise on the embeddings (NEFTune's α).", least=0, most=1000)
    replay: float = setting(
        0.0,
        "Corpus tokens mixed in per conversation token.",
        least=0,
        most=1000,
        later=True,
        column="instruct_replay",
        null_at=0,
        parts_repeats=100,
    )

    @property
    def _section(self) -> str:
        return "instruct"


@dataclass
class PreferConfig(TuneConfig):
    """DPO on rows `{"messages": [...], "chosen": "...", "rejected": "..."}`, after fine-tuning."""

    count: int = setting(0, ROWS, least=0, most=10**9, column="prefer_rows", computed=True)
    epochs: int = setting(1, "Epochs over the pairs.", least=1, most=10_000, column="prefer_epochs", parts_repeats=130)
    learning_rate: float = setting(5e-7, RATE, above=0, most=1e30, column="prefer_learning_rate", parts_repeats=140)
    batch_size: int = setting(
        16, "Pairs per optimiser step.", least=1, most=2**20, column="prefer_batch", parts_repeats=150
    )
    lora_rank: int = setting(0, ADAPTERS, least=0, most=2**16, column="prefer_lora_rank", null_at=0, parts_repeats=160)
    beta: float = setting(0.1, "DPO's β.", above=0, most=1000, column="prefer_beta", parts_repeats=170)

    @property
    def _section(self) -> str:
        return "prefer"
