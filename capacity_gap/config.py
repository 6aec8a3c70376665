"""Every setting, as dataclasses that Hydra types and this file validates; nothing below `run.py` sees OmegaConf.

Validated when made, before any compute, and never changed afterwards. A field marked `RUNTIME` says how a result is
made, not which one, and takes no part in its identity (`fingerprint.py`).
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from capacity_gap.checks import need as _need
from capacity_gap.checks import positive as _positive
from capacity_gap.checks import runtime as _runtime
from capacity_gap.config_tune import ExpandConfig, InstructConfig, PreferConfig
from capacity_gap.errors import ConfigError, choose
from capacity_gap.evaluate.tasks import Task, folder_tasks, forbid_code, parse_tasks
from capacity_gap.fingerprint import LATER, RUNTIME
from capacity_gap.training_config import (
    PRECISIONS,
    AdaptOptimConfig,
    DistillConfig,
    PretrainConfig,
    TrainConfig,
)

SOURCES = ("embedded", "code", "cantonese", "text", "hub", "mixture")
OF_HUB = ("subset", "dataset_split", "column", "revision", "documents")  # settings of a source that is a dataset there
METHODS = ("expressive", "random", "magnitude", "movement", "taylor", "activation", "wanda")
PRIORITIES = ("local", "global")
LAYERS = ("symmetric", "block_influence", "loss_increase")
INITS = ("pruned", "random", "shared")
SHAPES = ("common", "per_teacher", "fixed")
TRACKING_MODES = ("offline", "online", "disabled")
ARTIFACTS = ("none", "record", "model")


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
        _positive("family", self, "teacher_epochs")
        choose("family.dtype", self.dtype, PRECISIONS)
        choose("family.quantization", self.quantization, ("none", "8bit"))
        if self.folders and self.name != "folders":
            raise ConfigError(f"family.folders is for family=folders; family={self.name} has its own ladder.")


@dataclass
class SourceConfig:
    """One source of text: embedded prose, code or Cantonese speech, the user's files, or a dataset of the hub."""

    name: str = "embedded"
    path: str | None = _runtime(None)  # text: a file or folder; its content is what is hashed
    dataset: str | None = None  # hub: a dataset's name there, or a local dataset folder
    subset: str | None = None
    dataset_split: str = "train"
    column: str = "text"
    revision: str | None = None
    documents: int | None = None  # hub: take this many, streaming
    weight: float = 1.0  # in a mixture: share of the bytes, relative to the other parts

    def __post_init__(self) -> None:
        choose("corpus.name", self.name, SOURCES)
        _positive("corpus", self, "weight")
        if self.name != "text" and self.path is not None:
            raise ConfigError(
                f"corpus.path={self.path} is given, but corpus={self.name} reads no file. Add corpus=text to train "
                "on it."
            )
        if (self.name == "hub") != (self.dataset is not None):
            raise ConfigError(
                f"corpus={self.name} with corpus.dataset={self.dataset}: a dataset is named for corpus=hub, and only "
                "for it, such as corpus=hub corpus.dataset=Skylion007/openwebtext."
            )
        if self.name == "text":
            _check_path(self.path)
        self._check_hub()

    def _check_hub(self) -> None:
        asked = (f for f in fields(SourceConfig) if f.name in OF_HUB and getattr(self, f.name) != f.default)
        given = [f"{f.name}={getattr(self, f.name)}" for f in asked]
        if given and self.name != "hub":
            raise ConfigError(
                f"a source with name={self.name} has {', '.join(given)}: that is for a dataset of the hub, so for "
                "corpus=hub, or a part with name: hub."
            )


def _check_path(path: str | None) -> None:
    if path is None:
        raise ConfigError("corpus=text needs corpus.path=FILE_OR_FOLDER (.txt, .jsonl with a `text` field).")
    if not Path(path).expanduser().exists():
        raise ConfigError(
            f"corpus.path={path} does not exist (seen from {Path.cwd()}). "
            "Give a .txt or .jsonl file, or a folder of them."
        )


@dataclass
class CorpusConfig(SourceConfig):
    """Which text, how it is split, and how long the packed sequences are.

    corpus=mixture takes its documents from `parts`, as many bytes of each as their weights say.
    """

    parts: list[SourceConfig] = field(default_factory=list)
    validation: float = 0.05
    test: float = 0.05
    sequence_length: int = 128

    def __post_init__(self) -> None:
        if (self.name == "mixture") != bool(self.parts):
            raise ConfigError(
                f"corpus={self.name} with {len(self.parts)} corpus.parts: parts are for corpus=mixture, and only for "
                "it, such as corpus=mixture 'corpus.parts=[{name:embedded,weight:3},{name:code,weight:1}]'."
            )
        if self.name != "mixture":
            super().__post_init__()
        elif self.path is not None or self.dataset is not None:
            raise ConfigError("corpus=mixture reads its parts: give path or dataset inside corpus.parts.")
        else:
            self._check_hub()
        _positive("corpus", self, "sequence_length", "validation", "test")
        _need(
            self.validation + self.test < 0.9, "corpus.validation + corpus.test", self.validation + self.test, "< 0.9"
        )


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
        _positive("adapt", self, "epochs")


@dataclass
class PruneConfig:
    """Where a student starts: `pruned` from its teacher (docs/method.md §2, §3), from `random` weights, or `shared`.

    `shared`: one start for all teachers, pruned from the teacher named by `reference`. Like `random`, it holds the
    start fixed, so that what is left of the curve is the capacity gap and not the damage of pruning. With `random`
    nothing is cut: of what follows only the shape counts.
    """

    method: str = "expressive"
    init: str = "pruned"
    reference: str | None = None  # init=shared: the rung that the one start is pruned from
    shape: str = "common"
    batches: int = 32
    batch_size: int = 8  # the score depends on it: its absolute value comes after the batch's sum
    fixed: str | None = None  # shape=fixed: layers x hidden x heads x neurons, such as 24x3072x24x8192
    priority: str = "local"  # local: as many units in every layer; global: ranked across layers
    layers: str = "symmetric"  # which layers go: from both ends, or those with the lowest score
    depth: int | None = None  # layers of the student; null: the shape policy's
    iterative: int = 1  # prune in so many steps, scoring again before each
    step_data: str = "0"  # tokens of distillation between two steps

    def __post_init__(self) -> None:
        choose("prune.method", self.method, METHODS)
        choose("prune.init", self.init, INITS)
        choose("prune.shape", self.shape, SHAPES)
        choose("prune.priority", self.priority, PRIORITIES)
        choose("prune.layers", self.layers, LAYERS)
        _positive("prune", self, "batches", "batch_size", "iterative")
        _need(self.depth is None or self.depth > 0, "prune.depth", self.depth, "more than zero, or null")
        if (self.shape == "fixed") != (self.fixed is not None):
            raise ConfigError(
                f"prune.shape={self.shape} with prune.fixed={self.fixed}: a shape is named for shape=fixed, and only "
                "for it, such as prune.shape=fixed prune.fixed=24x3072x24x8192 (layers x hidden x heads x neurons)."
            )
        if self.fixed is not None and self.depth is not None:
            raise ConfigError(
                f"prune.depth={self.depth} with prune.fixed={self.fixed}: a fixed shape names its layers. Give one."
            )
        if self.step_data != "0" and self.iterative == 1:
            raise ConfigError(
                f"prune.step_data={self.step_data} is for pruning in steps: say prune.iterative=2 or more."
            )
        if (self.init == "shared") != (self.reference is not None):
            raise ConfigError(
                f"prune.init={self.init} with prune.reference={self.reference}: a reference teacher is named for "
                "init=shared, and only for it, such as prune.init=shared prune.reference=120k."
            )


@dataclass
class EvaluateConfig:
    """How much held-out text every model is scored on, and on which benchmarks (`evaluate/tasks.py`)."""

    tokens: int = 200_000
    ood_tokens: int = 100_000
    batch_size: int = _runtime(32)
    tasks: list[str] = field(default_factory=list, metadata=LATER)  # benchmarks, `name` or `name:shots`
    code_tasks: list[str] = field(default_factory=list, metadata=LATER)  # run only with allow_code_execution
    task_folder: str | None = _runtime(None)  # task files of one's own: their content is what is hashed
    limit: int | None = field(default=None, metadata=LATER)  # only so many questions of each benchmark
    allow_code_execution: bool = _runtime(False)

    def __post_init__(self) -> None:
        _positive("evaluate", self, "tokens", "ood_tokens", "batch_size")
        _need(self.limit is None or self.limit > 0, "evaluate.limit", self.limit, "more than zero, or null")
        if self.task_folder == "":
            raise ConfigError("evaluate=local needs evaluate.task_folder=FOLDER with task files (.yaml).")
        self._forbid_code(parse_tasks(self.tasks))
        parse_tasks([*self.tasks, *self.code_tasks])

    @property
    def folder(self) -> Path | None:
        """The folder of task files, absolute."""
        return Path(self.task_folder).expanduser().absolute() if self.task_folder else None

    @property
    def benchmarks(self) -> list[Task]:
        """What is run: the tasks named, else all that the folder defines; those that run code only if allowed."""
        named = parse_tasks([*self.tasks, *(self.code_tasks if self.allow_code_execution else [])])
        found = named or [Task(name) for name in (folder_tasks(self.folder) if self.folder else [])]
        self._forbid_code(found, self.folder)
        return found

    def _forbid_code(self, tasks: list[Task], folder: Path | None = None) -> None:
        flag = "evaluate.allow_code_execution=true"
        forbid_code(tasks, allowed=self.allow_code_execution, flag=flag, folder=folder)


@dataclass
class TrackingConfig:
    """Weights & Biases: a mirror of the records, which are the truth."""

    mode: str = "offline"
    project: str = "capacity_gap"
    entity: str | None = None
    artifacts: str = "none"  # what goes along: nothing, record and history, or the student's weights too

    def __post_init__(self) -> None:
        choose("tracking.mode", self.mode, TRACKING_MODES)
        choose("tracking.artifacts", self.artifacts, ARTIFACTS)


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
            _need(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        for name in ("epochs", "budget_hours", "throughput", "devices"):
            value = getattr(self, name)
            _need(value is None or value > 0, name, value, "more than zero")
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


def default_store() -> str:
    """`$CAPACITY_GAP_STORE`, or `store` beside the project's `run.py`, wherever the command is started."""
    return os.environ.get("CAPACITY_GAP_STORE") or str(Path(__file__).resolve().parent.parent / "store")


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
