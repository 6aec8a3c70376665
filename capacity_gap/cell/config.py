"""Every setting of a cell in one tree, which Hydra types and which is validated when it is made, before any compute.

Each section's settings are declared beside what they decide, in a `*_config.py` of its package; nothing below the
commands sees OmegaConf. A config is never changed afterwards.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from capacity_gap.cell.strategy_config import ADAPTIVE, FACTORIAL, STRATEGIES, NextConfig
from capacity_gap.cell.teacher_config import AdaptConfig, FamilyConfig
from capacity_gap.data.corpora import CORPORA, MIXTURE
from capacity_gap.data.corpus_config import AUTO as ANY_CORPUS
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
from capacity_gap.settings.declare import default_of, setting, validate, walk
from capacity_gap.settings.errors import ConfigError, nearest, shown
from capacity_gap.settings.hashing import file_digest
from capacity_gap.settings.places import RUN_WORDS, default_store, user_path
from capacity_gap.tracking.tracking_config import MODES, TrackingConfig
from capacity_gap.training.train_config import RECIPE_NAMES, TrainConfig

MOST_SEED = 2**32 - 1  # numpy, torch and Python all take it
TUNING = ("instruct", "prefer")  # sections whose settings a text of their own tells in a record


@dataclass
class RunConfig:
    """One cell of a grid."""

    student: str = setting("60k", "The student's number of parameters, such as 0.5b.", column="student", computed=True)
    teacher: str = setting(
        "120k", "The teacher: a rung of the family, or a model folder.", column="teacher", computed=True
    )
    data: str = setting("1m", "Tokens that the student learns from; 0: none.", column="data_tokens", computed=True)
    data_offset: str = setting(
        "0",
        "Training tokens to skip before the student's budget starts, such as those its teacher was trained on.",
        later=True,
    )
    epochs: int = setting(1, "Passes of the student over its tokens.", least=1, most=10_000, column="epochs", parts=210)
    seed: int = setting(
        0, "Seed of the student: its random weights and its data order.", least=0, most=MOST_SEED, column="seed"
    )
    teacher_seed: int = setting(
        0, "Seed of teachers that are trained here.", least=0, most=MOST_SEED, column="teacher_seed"
    )
    store: str = setting("", "The store's folder; empty: $CAPACITY_GAP_STORE, else `store`.", decides=False)
    plan: bool = setting(False, "Print what would run and its cost; start nothing.", decides=False)
    fail_fast: bool = setting(False, "Grids only: launch no further wave after a failure.", decides=False)
    retries: int = setting(0, "Grids only: how often crashed work is retried.", least=0, most=1000, decides=False)
    strategy: str = setting(
        FACTORIAL,
        "Grids only: factorial runs every cell; adaptive runs, in rounds, the cells that narrow next.goal most a "
        "second.",
        allowed=STRATEGIES,
        decides=False,
    )
    until: float | None = setting(
        None,
        "strategy=adaptive: end once the upper end of the 95 % interval is at most this multiple of its lower end, "
        "twice in a row and after 24 cells or more. A 99 % interval is then reported (docs/next.md).",
        above=1,
        most=1e6,
        decides=False,
    )
    budget_hours: float | None = setting(
        None,
        "Reject runs that cost more device-hours (devices times hours) than this; strategy=adaptive stops there.",
        above=0,
        most=1e9,
        decides=False,
    )
    throughput: float | None = setting(
        None,
        "FLOP/s of one worker, for plans; null: as measured in this store, else estimated from its devices.",
        least=1e6,
        most=1e24,
        decides=False,
    )
    devices: int | None = setting(
        None,
        "GPUs of one worker, for plans; null: as many as the launcher assigns.",
        least=1,
        most=100_000,
        decides=False,
    )
    device_name: str | None = setting(
        None, "The GPU that plans assume, such as h100; null: the launcher's, else this machine's.", decides=False
    )
    sweep: str | None = setting(
        None, "One cell: the sweep of this store to add it to. A grid: its name in the store.", decides=False
    )
    registration: str | None = setting(
        None,
        "A preregistration file, written before the grid runs; each new record stores the SHA-256 of its content.",
        decides=False,
    )
    only: str = setting("", "One stage of the chain to compute, `name/digest`; grids set it.", decides=False)
    extend: list[str] = setting(
        [],
        "Your own modules, such as [my_loss], that register losses, scores, corpora and more.",
        decides=False,
    )
    next: NextConfig = setting(NextConfig, "The question of strategy=adaptive.")
    family: FamilyConfig = setting(FamilyConfig, "Teachers.")
    corpus: CorpusConfig = setting(CorpusConfig, "Text.")
    expand: ExpandConfig = setting(ExpandConfig, "Vocabulary expansion for a second script.")
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
        if self.until is not None and self.strategy != ADAPTIVE:
            raise ConfigError(f"until={self.until:g} applies only to strategy={ADAPTIVE}. Add it, or leave out until.")
        if self.registration is not None:
            file_digest(self.registration, key="registration")
        if self.prefer.wanted and not self.instruct.wanted:
            raise ConfigError(
                "prefer.count and prefer.path need a student that was fine-tuned on conversations: set "
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
        return user_path(self.store or default_store()).absolute()


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
        yield "family", name, {"name": name}
    yield "family", FOLDERS, {"name": FOLDERS}
    for name in (ANY_CORPUS, *CORPORA, MIXTURE):
        yield "corpus", name, {"name": name}
    for name in SCORES:
        yield "prune", name, {"method": name}
    for name, values in EVALUATION_SETS.items():
        yield "evaluate", name, dict(values)
    yield "train", "default", {}
    for name in RECIPE_NAMES:
        yield "train", name, {"recipe": name}
    for name in MODES:
        yield "tracking", name, {"mode": name}


def from_hydra(composed: Any) -> RunConfig:
    """Returns the validated settings of a composed Hydra config, or of the same as plain values.

    Raises:
        ConfigError: what is wrong, what is allowed, what to do.
    """
    from omegaconf import OmegaConf

    plain = composed if isinstance(composed, dict) else OmegaConf.to_container(composed)
    assert isinstance(plain, dict)
    return from_dict({str(key): value for key, value in plain.items()})


def _resolved(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with every interpolation as what it stands for."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    texts = {key: str(value) for key, value in values.items()}
    if not (found := {key for key, text in texts.items() if "${" in text}):
        return values
    # OmegaConf takes long over a whole cell: it gets what interpolates, and what is named there.
    while more := {key for key in texts if key not in found and any(key in texts[f] for f in found)}:
        found |= more
    try:
        part = OmegaConf.to_container(OmegaConf.create({key: values[key] for key in found}), resolve=True)
    except OmegaConfBaseException as error:
        given = ", ".join(f"{key}={shown(texts[key])}" for key in sorted(found) if "${" in texts[key])
        raise ConfigError(f"{given} cannot be resolved: {str(error).splitlines()[0]}.") from error
    assert isinstance(part, dict)
    return {**values, **{str(key): value for key, value in part.items()}}


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Returns the validated settings of nested plain values, such as `dataclasses.asdict` gives.

    Modules that the environment names are imported first, since workers start without them.

    Raises:
        ConfigError: a key is no setting, or a value is not allowed.
        omegaconf.errors.ValidationError: a value has the wrong type.
    """

    extension.load()
    given = _resolved({key: value for key, value in values.items() if key != "hydra"})
    if unknown := [key for key in given if key not in _sections() and key not in _alone()]:
        raise ConfigError(unknown_key(unknown[0]))
    found = dict(_defaults())
    for name, value in given.items():
        if name not in _sections():
            found[name] = _one(name, json.dumps(value))
    extension.check(found["extend"])
    for name in _sections():
        found[name] = _section(name, json.dumps(given.get(name, {})))
    return RunConfig(**found)


@functools.cache
def _sections() -> dict[str, type]:
    """The settings of a cell that are sections, and their classes."""
    return {d.key: d.section for d in walk(RunConfig) if d.section and "." not in d.key}


@functools.cache
def _alone() -> dict[str, Any]:
    """The other settings: for each its type and default, as OmegaConf takes them."""
    from omegaconf import OmegaConf

    found = [d for d in walk(RunConfig) if not d.section and "." not in d.key]
    made = {d.key: (d.field.type, field(default_factory=functools.partial(default_of, d.field))) for d in found}
    return {key: OmegaConf.structured(make_dataclass("Alone", [(key, *one)])) for key, one in made.items()}


@functools.cache
def _defaults() -> dict[str, Any]:
    """Of the settings at the top."""
    return {name: _one(name, None) for name in _alone()}


# The cells of a grid share most values, and OmegaConf takes milliseconds for each: what it made is made once and
# shared by all cells, which never change their settings.
@functools.lru_cache(maxsize=4096)
def _one(name: str, value: str | None) -> Any:
    """A value (JSON) of a setting at the top in its type; None: its default."""
    from omegaconf import OmegaConf

    given = {} if value is None else {name: json.loads(value)}
    found = OmegaConf.to_container(OmegaConf.merge(_alone()[name], given))
    assert isinstance(found, dict)
    return found[name]


@functools.lru_cache(maxsize=1024)
def _section(name: str, values: str) -> Any:
    """A section's values (JSON) in its types."""
    from omegaconf import OmegaConf

    schema = OmegaConf.create({name: OmegaConf.structured(_sections()[name])})
    found = OmegaConf.to_object(OmegaConf.merge(schema, {name: json.loads(values)}))
    assert isinstance(found, dict)
    return found[name]


def unknown_key(key: str) -> str:
    """The error for a key that is not a setting, with the settings of its section."""
    if key == "sweeps":
        return (
            f"sweeps is not a setting: a named grid is `{' '.join(RUN_WORDS)} -m +sweeps=NAME`, with the +, and its "
            "file begins with the line `# @package _global_`."
        )
    if key.startswith("hydra.launcher."):
        return (
            f"{shown(key)} is no setting of this grid's launcher; cells run one after another unless one is named. Add "
            "hydra/launcher=joblib (or slurm, ray)."
        )
    keys = [d.key for d in walk(RunConfig)]
    section = key.rpartition(".")[0] if key.rpartition(".")[0] in _sections() else ""
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    return (
        f"{shown(key)} is not a setting{nearest(key, siblings)}. Settings "
        f"{'of ' + section if section else 'at the top'}: {', '.join(siblings)}. `{' '.join(RUN_WORDS)} --help` lists "
        "all."
    )
