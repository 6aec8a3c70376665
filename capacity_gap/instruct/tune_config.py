"""Settings of instruction tuning and preference optimisation."""

from dataclasses import dataclass
from pathlib import Path

from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import user_path

ROWS = "Rows made from templates over the corpus; 0 and no path: nothing is done."
OWN = "Rows of your own, a .jsonl file; their content is what counts."
RATE = "Peak learning rate of this tuning."
BATCH = "Rows in one optimiser step of this tuning, packed sequences where they are packed."
ADAPTERS = "Rank of LoRA adapters, which are merged; 0: all weights are trained."


@dataclass
class TuneConfig:
    """What supervised fine-tuning and preference optimisation share: TRL's trainer, AdamW, cosine."""

    count: int = setting(0, ROWS, least=0, most=10**9)
    path: str | None = setting(None, OWN, decides=False, content=True)
    epochs: int = setting(3, "Passes over the rows.", least=1, most=10_000)
    batch_size: int = setting(16, BATCH, least=1, most=2**20)
    learning_rate: float = setting(2e-5, RATE, above=0, most=1e30)
    warmup: float = setting(0.1, "Share of all steps in which the learning rate rises.", least=0, most=1)
    max_length: int = setting(256, "Tokens of one sequence.", least=1, most=2**17)
    lora_rank: int = setting(0, ADAPTERS, least=0, most=2**16)

    def __post_init__(self) -> None:
        name = self._section
        validate(name, self)
        if self.path is not None and not user_path(self.path).is_file():
            raise ConfigError(f"{name}.path={self.path} does not exist (seen from {Path.cwd()}). Give a .jsonl file.")
        if self.path is not None and self.count:
            raise ConfigError(
                f"{name}.path={self.path} with {name}.count={self.count}: rows are read or made, not both."
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
    epochs: int = setting(3, "Passes over the rows.", least=1, most=10_000, column="instruct_epochs", parts_repeats=60)
    learning_rate: float = setting(2e-5, RATE, above=0, most=1e30, column="instruct_learning_rate", parts_repeats=70)
    batch_size: int = setting(16, BATCH, least=1, most=2**20, column="instruct_batch", parts_repeats=80)
    lora_rank: int = setting(0, ADAPTERS, least=0, most=2**16, column="instruct_lora_rank", null_at=0, parts_repeats=90)
    held_out: int = setting(
        300, "Conversations that answers are scored on; with a path its last ones.", least=1, most=10**9
    )
    answer_tokens: int = setting(32, "Most tokens of one answer.", least=1, most=2**17)
    packing: bool = setting(True, "Several conversations in one sequence, none of which sees another.")
    neftune: float = setting(0.0, "Noise on the embeddings (NEFTune's α).", least=0, most=1000)
    replay: float = setting(
        0.0,
        "Tokens of the corpus mixed in, for each token of the conversations.",
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
    epochs: int = setting(1, "Passes over the pairs.", least=1, most=10_000, column="prefer_epochs", parts_repeats=130)
    learning_rate: float = setting(5e-7, RATE, above=0, most=1e30, column="prefer_learning_rate", parts_repeats=140)
    batch_size: int = setting(
        16, "Pairs in one optimiser step.", least=1, most=2**20, column="prefer_batch", parts_repeats=150
    )
    lora_rank: int = setting(0, ADAPTERS, least=0, most=2**16, column="prefer_lora_rank", null_at=0, parts_repeats=160)
    beta: float = setting(0.1, "DPO's β.", above=0, most=1000, column="prefer_beta", parts_repeats=170)

    @property
    def _section(self) -> str:
        return "prefer"
