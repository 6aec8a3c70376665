"""Settings of teachers: their ladder, how they are pre-trained, what they are adapted to."""

from dataclasses import dataclass

from capacity_gap.data.corpus_config import SourceConfig
from capacity_gap.models.ladders import FAMILIES, FOLDERS
from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError
from capacity_gap.training.train_config import PRECISIONS, AdaptOptimConfig, PretrainConfig

PLACEMENTS = ("auto", "one", "devices", "ranks")


@dataclass
class FamilyConfig:
    """A ladder of teachers, and how unpublished ones are pre-trained."""

    name: str = setting(
        "pico",
        "The ladder: a registered family, or `folders` for your own model folders.",
        allowed=lambda: (*FAMILIES, FOLDERS),
        column="family",
        computed=True,
    )
    folders: list[str] = setting([], "family=folders: the model folders; hashed by content, not path.", decides=False)
    dtype: str | None = setting(
        None,
        "Dtype of published and local teachers during distillation; null: the family's or the recipe's.",
        allowed=PRECISIONS,
    )
    quantization: str = setting(
        "none", "Quantise published teachers during distillation (needs bitsandbytes).", allowed=("none", "8bit")
    )
    placement: str = setting(
        "auto",
        "Placement of teachers: one device, layers spread over all devices of one process, or sharded over "
        "ranks; auto: ranks under train.sharding=fsdp, else one device.",
        allowed=PLACEMENTS,
        decides=False,
    )
    teacher_data: str = setting(
        "1m",
        "Tokens of teacher pre-training: a scale, or `20x` its parameters.",
        column="teacher_data",
        computed=True,
    )
    teacher_epochs: int = setting(1, "Epochs over these tokens.", least=1, most=10_000)
    pretrain: PretrainConfig = setting(PretrainConfig, "How teachers are pre-trained.")

    def __post_init__(self) -> None:
        validate("family", self)
        if self.folders and self.name != FOLDERS:
            raise ConfigError(f"family.folders is for family=folders; family={self.name} has its own ladder.")


@dataclass
class AdaptConfig:
    """Continued pre-training before pruning: `data` tokens of `parts` mixed by weight (none: the corpus).

    With parts, everything after the teacher's own pre-training uses their text: scores, distillation, evaluation.
    """

    data: str = setting("0", "Tokens of continued pre-training; 0: none.", column="adapt_tokens", computed=True)
    epochs: int = setting(1, "Epochs over these tokens.", least=1, most=10_000)
    parts: list[SourceConfig] = setting(
        [], "Sources by weight, such as [{name:embedded,weight:3},{name:code,weight:1}]."
    )
    optim: AdaptOptimConfig = setting(AdaptOptimConfig, "Optimiser of continued pre-training.")

    def __post_init__(self) -> None:
        validate("adapt", self)
