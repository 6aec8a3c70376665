"""Settings of teachers: their ladder, how they are pre-trained, what they are adapted to."""

from dataclasses import dataclass, field

from capacity_gap.data.corpus_config import SourceConfig
from capacity_gap.settings.checks import positive
from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.settings.hashing import RUNTIME
from capacity_gap.training.train_config import PRECISIONS, AdaptOptimConfig, PretrainConfig


@dataclass
class FamilyConfig:
    """A ladder of teachers, and how those that no one has published are pre-trained.

    `name` is a family of `models/ladders.py`, or `folders`: a ladder of local model folders.
    """

    name: str = "pico"
    folders: list[str] = field(
        default_factory=list, metadata=RUNTIME
    )  # family=folders: their content is what is hashed
    dtype: str = "fp32"  # of published or local teachers while they teach and are scored
    quantization: str = "none"
    teacher_data: str = "1m"  # tokens of a teacher's pre-training: a scale, or `20x` parameters
    teacher_epochs: int = 1
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        positive("family", self, "teacher_epochs")
        choose("family.dtype", self.dtype, PRECISIONS)
        choose("family.quantization", self.quantization, ("none", "8bit"))
        if self.folders and self.name != "folders":
            raise ConfigError(f"family.folders is for family=folders; family={self.name} has its own ladder.")


@dataclass
class AdaptConfig:
    """Teachers trained on, before anything is pruned: `data` tokens of `parts` mixed by weight (none: the corpus).

    With parts, everything after the teacher's own pre-training sees their text: scores, distillation, evaluation.
    """

    data: str = "0"
    epochs: int = 1
    parts: list[SourceConfig] = field(default_factory=list)
    optim: AdaptOptimConfig = field(default_factory=AdaptOptimConfig)

    def __post_init__(self) -> None:
        positive("adapt", self, "epochs")
