"""Every setting, as dataclasses that Hydra types and this file validates; nothing below `run.py` sees OmegaConf.

Validated when made, before any compute, and never changed afterwards. A field marked `RUNTIME` says how a result is
made, not which one, and takes no part in its identity (`fingerprint.py`).
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from capacity_gap.cell.teacher_config import AdaptConfig, FamilyConfig
from capacity_gap.data.corpus_config import CorpusConfig
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.evaluate.evaluate_config import EvaluateConfig
from capacity_gap.instruct.tune_config import InstructConfig, PreferConfig
from capacity_gap.models.expand_config import ExpandConfig
from capacity_gap.pruning.prune_config import PruneConfig
from capacity_gap.settings.checks import need
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import default_store
from capacity_gap.tracking.tracking_config import TrackingConfig
from capacity_gap.training.train_config import TrainConfig


@dataclass
class RunConfig:
    """One cell of a grid."""

    student: str = "60k"
    teacher: str = "120k"
    data: str = "1m"
    epochs: int = 1
    seed: int = 0
    teacher_seed: int = 0
    store: str = ""
    plan: bool = False  # say what would run and what it costs; start nothing
    fail_fast: bool = False  # of a grid: launch no further wave once something has failed
    retries: int = 0  # of a grid: how often work whose process died or crashed is started again
    budget_hours: float | None = None  # of a grid: refuse it if it costs more hours of one worker than this
    throughput: float | None = None  # FLOP/s of one worker, for plans; null: as measured in this store
    devices: int = 1  # of one worker, for plans: memory of each, device-hours
    sweep: str | None = None  # of one cell: the sweep of this store that it joins; of a grid: what it is called there
    only: str = ""  # compute one stage of the chain (`name/digest`), not the cell: set by the grid sweeper
    family: FamilyConfig = field(default_factory=FamilyConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("seed", "teacher_seed", "retries"):
            need(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        for name in ("epochs", "budget_hours", "throughput", "devices"):
            value = getattr(self, name)
            need(value is None or value > 0, name, value, "more than zero")
        if self.prefer.wanted and not self.instruct.wanted:
            raise ConfigError(
                "prefer.count and prefer.path are for a student that was fine-tuned on conversations: say "
                "instruct.count=N or instruct.path=FILE too."
            )

    @property
    def text(self) -> CorpusConfig:
        """What teachers are adapted to and students learn: the parts of `adapt`, else the corpus."""
        if not self.adapt.parts:
            return self.corpus
        c = self.corpus
        return CorpusConfig(
            name="mixture",
            parts=self.adapt.parts,
            validation=c.validation,
            test=c.test,
            sequence_length=c.sequence_length,
        )

    @property
    def store_path(self) -> Path:
        """The store's folder, absolute."""
        return Path(self.store or default_store()).expanduser().absolute()


def register() -> None:
    """Tells Hydra the types of all settings, so that an unknown key or a wrong type stops at once."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run_schema", node=RunConfig)


def from_hydra(composed: Any) -> RunConfig:
    """Returns the validated settings of a composed Hydra config, or of the same as plain values.

    Raises:
        ConfigError: what is wrong, what is allowed, what to do.
    """
    from omegaconf import OmegaConf

    if isinstance(composed, dict) and "${" not in str(composed):
        return from_dict(composed)
    values = OmegaConf.to_container(OmegaConf.create(composed), resolve=True)
    assert isinstance(values, dict)
    return from_dict({str(key): value for key, value in values.items()})


@functools.cache
def _schema() -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(RunConfig)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Returns the validated settings of nested plain values, such as `dataclasses.asdict` gives."""
    from omegaconf import OmegaConf

    known = {f.name for f in fields(RunConfig)}
    typed = OmegaConf.merge(_schema(), {k: v for k, v in values.items() if k in known})
    config = OmegaConf.to_object(typed)
    assert isinstance(config, RunConfig)
    return config
