"""Every setting of a cell in one tree, which Hydra types and which is validated when it is made, before any compute.

Each section's settings are declared beside what they decide, in a `*_config.py` of its room; nothing below the commands
sees OmegaConf. A config is never changed afterwards.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from capacity_gap.cell.teacher_config import AdaptConfig, FamilyConfig
from capacity_gap.data.corpora import CORPORA, MIXTURE
from capacity_gap.data.corpus_config import CorpusConfig
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.evaluate.evaluate_config import EvaluateConfig
from capacity_gap.evaluate.evaluation_sets import EVALUATION_SETS
from capacity_gap.instruct.tune_config import InstructConfig, PreferConfig
from capacity_gap.models.expand_config import ExpandConfig
from capacity_gap.models.ladders import FAMILIES, FOLDERS
from capacity_gap.pruning.methods import SCORES
from capacity_gap.pruning.prune_config import PruneConfig
from capacity_gap.settings import extension
from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import default_store
from capacity_gap.tracking.tracking_config import MODES, TrackingConfig
from capacity_gap.training.train_config import TrainConfig

TUNING = ("instruct", "prefer")  # sections whose settings a text of their own tells in a record


@dataclass
class RunConfig:
    """One cell of a grid."""

    student: str = setting("60k", "The student's number of parameters, such as 0.5b.", column="student", computed=True)
    teacher: str = setting(
        "120k", "The teacher: a rung of the family, or a model folder.", column="teacher", computed=True
    )
    data: str = setting("1m", "Tokens that the student learns from; 0: none.", column="data_tokens", computed=True)
    epochs: int = setting(1, "Passes of the student over its tokens.", least=1, column="epochs", parts=210)
    seed: int = setting(0, "Decides a student's random weights and the order of its text.", least=0, column="seed")
    teacher_seed: int = setting(0, "The same of teachers that are trained here.", least=0, column="teacher_seed")
    store: str = setting("", "The store's folder; empty: $CAPACITY_GAP_STORE, else `store`.", decides=False)
    plan: bool = setting(False, "Say what would run and what it costs; start nothing.", decides=False)
    fail_fast: bool = setting(False, "Of a grid: launch no further wave once something has failed.", decides=False)
    retries: int = setting(0, "Of a grid: how often crashed work is started again.", least=0, decides=False)
    budget_hours: float | None = setting(
        None, "Of a grid: refuse it if it costs more hours of one worker than this.", above=0, decides=False
    )
    throughput: float | None = setting(
        None, "FLOP/s of one worker, for plans; null: as measured in this store.", above=0, decides=False
    )
    devices: int = setting(1, "GPUs of one worker, for plans.", least=1, decides=False)
    sweep: str | None = setting(
        None, "Of one cell: the sweep of this store that it joins; of a grid: its name there.", decides=False
    )
    only: str = setting("", "One stage of the chain to compute, `name/digest`; grids set it.", decides=False)
    extend: list[str] = setting(
        [],
        "Modules of your own, such as [my_loss], that register losses, scores, corpora and more.",
        decides=False,
    )
    family: FamilyConfig = setting(FamilyConfig, "Teachers.")
    corpus: CorpusConfig = setting(CorpusConfig, "Text.")
    expand: ExpandConfig = setting(ExpandConfig, "A second script's tokens.")
    adapt: AdaptConfig = setting(AdaptConfig, "Continued pre-training of teachers.")
    prune: PruneConfig = setting(PruneConfig, "The student before training.")
    distill: DistillConfig = setting(DistillConfig, "The objective.")
    train: TrainConfig = setting(TrainConfig, "Training of the student, and where everything runs.")
    instruct: InstructConfig = setting(InstructConfig, "Instruction tuning of the student.")
    prefer: PreferConfig = setting(PreferConfig, "Preference optimisation of the tuned student.")
    evaluate: EvaluateConfig = setting(EvaluateConfig, "Evaluation.")
    tracking: TrackingConfig = setting(TrackingConfig, "Weights & Biases.")

    def __post_init__(self) -> None:
        validate("", self)
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
            name=MIXTURE,
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
    """Tells Hydra the types of all settings, and the choices that have no file in `conf/`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group, name, values in choices():
        store.store(group=group, name=name, node=values)


def choices() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Group, name and settings of every choice `group=name` that a registry knows: `family=pythia`, `corpus=code`."""
    for name in FAMILIES:
        yield "family", name, {"name": name, "dtype": FAMILIES.entry(name).traits["dtype"]}
    yield "family", FOLDERS, {"name": FOLDERS}
    for name in (*CORPORA, MIXTURE):
        yield "corpus", name, {"name": name}
    for name in SCORES:
        yield "prune", name, {"method": name}
    for name, values in EVALUATION_SETS.items():
        yield "evaluate", name, dict(values)
    yield "train", "default", {}
    for name in MODES:
        yield "tracking", name, {"mode": name}


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
    """Returns the validated settings of nested plain values, such as `dataclasses.asdict` gives.

    Modules that the environment names are imported first, since workers start without them.
    """
    from omegaconf import OmegaConf

    extension.load()
    extension.check(values.get("extend") or [])
    known = {f.name for f in fields(RunConfig)}
    typed = OmegaConf.merge(_schema(), {k: v for k, v in values.items() if k in known})
    config = OmegaConf.to_object(typed)
    assert isinstance(config, RunConfig)
    return config
