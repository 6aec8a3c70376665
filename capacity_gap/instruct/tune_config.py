"""The settings of vocabulary expansion, instruction tuning and preference optimisation, validated when made."""

from dataclasses import dataclass, field
from pathlib import Path

from capacity_gap.settings.checks import need, positive, runtime, share
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import LATER


@dataclass
class TuneConfig:
    """What supervised fine-tuning and preference optimisation share: TRL's trainer, AdamW, cosine."""

    count: int = 0  # rows made from templates over the corpus; 0 and no path: nothing is done
    path: str | None = runtime(None)  # rows of your own, .jsonl; their content is what is hashed
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 2e-5
    warmup: float = 0.1  # share of all steps
    max_length: int = 256  # tokens of one sequence
    lora_rank: int = 0  # 0: all weights are trained

    def __post_init__(self) -> None:
        name = self._section
        positive(name, self, "epochs", "batch_size", "learning_rate", "max_length")
        share(name, self, "warmup")
        for least in ("count", "lora_rank"):
            need(getattr(self, least) >= 0, f"{name}.{least}", getattr(self, least), "zero or more")
        if self.path is not None and not Path(self.path).expanduser().is_file():
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

    held_out: int = 300  # conversations that answers are scored on; with a path its last ones
    answer_tokens: int = 32  # at most, when answering
    packing: bool = True  # several conversations in one sequence, none of which sees another
    neftune: float = 0.0  # noise on the embeddings
    replay: float = field(default=0.0, metadata=LATER)  # tokens of the corpus mixed in, for each of the conversations'

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("instruct", self, "held_out", "answer_tokens")
        for least in ("neftune", "replay"):
            need(getattr(self, least) >= 0, f"instruct.{least}", getattr(self, least), "zero or more")

    @property
    def _section(self) -> str:
        return "instruct"


@dataclass
class PreferConfig(TuneConfig):
    """DPO on rows `{"messages": [...], "chosen": "...", "rejected": "..."}`, after fine-tuning."""

    epochs: int = 1
    learning_rate: float = 5e-7
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("prefer", self, "beta")

    @property
    def _section(self) -> str:
        return "prefer"
