"""The chain of one cell, read top to bottom; nothing else knows the order.

    corpus ─► tokenizer ─► tokens ─┐
    family ─► teacher ─► scores ─► student ─► distil ─► record
                 └─► teacher scores ──────────────┘

Building the chain computes nothing and imports no torch: it names the stages, so that a grid knows what its cells have
in common before anything runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap import accounting, steps, tracking
from capacity_gap.config import RunConfig
from capacity_gap.data.sources import corpus_name, identity
from capacity_gap.errors import Busy, ConfigError, ImpossibleCell
from capacity_gap.fingerprint import identity_fields
from capacity_gap.logs import logging_to
from capacity_gap.models.axes import architecture, config_with, count_params, dims
from capacity_gap.models.folders import content_digest, is_folder, local_family
from capacity_gap.models.ladders import Family, family
from capacity_gap.plan import make_plan
from capacity_gap.pruning.shape import Shape, between, sized, student_shape
from capacity_gap.records import RECORD, SCHEMA_VERSION, Record
from capacity_gap.runtime import Runtime, resolve_device
from capacity_gap.scales import format_scale, parse_scale, parse_tokens
from capacity_gap.stage import Stage, Store, closure, write_json
from capacity_gap.watch import failure_file

SIGNAL_SIZE = 64  # values a token of a cached signal, unless said


@dataclass(frozen=True)
class Cell:
    """One cell: its settings with every scale read, and the stages that make its record."""

    config: RunConfig
    family: Family
    rung: str
    student_scale: int  # as asked for
    student_target: int  # what it means: the exact size of a rung where it names one
    data_tokens: int
    teacher_tokens: int | None  # None for published teachers

    @property
    def teacher_shape(self) -> Mapping[str, Any]:
        """The teacher's config.json."""
        return self.family.rungs[self.rung]

    @cached_property
    def student_shape(self) -> Mapping[str, Any]:
        """The student's config.json: a function of family, scale and policy (DESIGN, *Student*).

        Under global priority it is that of the average layer: the parameters are the same.
        """
        origin = self.family.rungs[self.origin]
        return config_with(origin, sized(dims(origin), self.shape))

    @cached_property
    def shape(self) -> Shape:
        """The student's sizes."""
        c = self.config.prune
        return student_shape(
            self.family.rungs,
            self.family.rungs[self.origin],
            self.student_target,
            policy=c.shape,
            multiple=self.family.multiple,
            depth=c.depth,
            fixed=c.fixed,
        )

    @property
    def learning_rate(self) -> float:
        """The student's peak learning rate."""
        return self.config.train.peak(dims(self.student_shape).hidden)

    @property
    def name(self) -> str:
        """What people call the cell."""
        student, tokens = format_scale(self.student_scale), format_scale(self.data_tokens)
        return f"{student} from {self.rung}, {tokens} tokens, seed {self.config.seed}"

    def check_budgets(self, store: Store, runtime: Runtime) -> None:
        """Raises, before any model is trained, if the corpus holds fewer tokens than teacher or student need."""
        from capacity_gap.data.packing import Packed, subset

        packed = Packed(store.compute(self.tokens, runtime) / "train", self.config.corpus.sequence_length)
        subset(packed, self.data_tokens, epochs=self.config.epochs, key="data")
        if self.teacher_tokens:
            subset(packed, self.teacher_tokens, epochs=self.config.family.teacher_epochs, key="family.teacher_data")

    # The chain. Each stage names what decides its result, and nothing else.

    @cached_property
    def corpus(self) -> Stage:
        """Clean text, split into train, validation, test and out-of-domain."""
        c = self.config.corpus
        given = {"name": c.name, "validation": c.validation, "test": c.test, **identity(c)}
        return Stage("corpus", 1, given, {}, steps.corpus, options={"source": c})

    def _source(self, rung: str) -> dict[str, Any]:
        """What identifies a published checkpoint: its repository's name, or a local folder's content."""
        repository = self.family.published[rung]
        if self.family.name == "folders":
            return {"content": content_digest(Path(repository))}
        return {"repository": repository}

    @cached_property
    def tokenizer(self) -> Stage:
        """Byte-level BPE with the family's vocabulary, trained on the corpus; or the published one."""
        if self.rung in self.family.published:
            first = next(iter(self.family.rungs))  # one for the whole ladder, so that all share their tokens
            given = self._source(first)
            return Stage(
                "tokenizer",
                1,
                given,
                {},
                steps.published_tokenizer,
                options={"repository": self.family.published[first]},
            )
        given = {"vocab_size": self.teacher_shape["vocab_size"]}
        return Stage("tokenizer", 1, given, {"corpus": self.corpus}, steps.tokenizer)

    @cached_property
    def tokens(self) -> Stage:
        """The corpus as memory-mapped token streams."""
        inputs = {"corpus": self.corpus, "tokenizer": self.tokenizer}
        return Stage("tokens", 1, {}, inputs, steps.tokens)

    @cached_property
    def teacher(self) -> Stage:
        """The teacher, pre-trained on the spot."""
        return self._pretrained(self.rung)

    def _pretrained(self, rung: str) -> Stage:
        c, shape = self.config, self.family.rungs[rung]
        if rung in self.family.published:
            given = {
                "shape": shape,
                **self._source(rung),
                "dtype": c.family.dtype,
                "quantization": c.family.quantization,
            }
            return Stage(
                "published", 1, given, {}, steps.published, options={"repository": self.family.published[rung]}
            )
        budget = teacher_tokens(c, self.family.params[rung])
        given = {
            "shape": shape,
            "seed": c.teacher_seed,
            "tokens": budget,
            "epochs": c.family.teacher_epochs,
            "optim": steps.optim_identity(c.family.pretrain),
            "learning_rate": c.family.pretrain.peak(dims(shape).hidden),
            **self._arithmetic,
        }
        return Stage(
            "teacher",
            1,
            given,
            {"tokens": self.tokens},
            steps.pretrain,
            cost=accounting.train_flops(shape, budget),
            options=self._training,
            passes=3 * budget,
            collective=True,
        )

    @cached_property
    def scores(self) -> Stage:
        """Importance of every unit of the teacher that the student is cut from."""
        return self._scores_of(self._pretrained(self.origin), self.family.rungs[self.origin])

    def _scores_of(self, model: Stage, shape: Mapping[str, Any]) -> Stage:
        c = self.config.prune
        given = {"method": c.method, "batches": c.batches, "batch_size": c.batch_size, **self._arithmetic}
        if c.method == "random":
            given["seed"] = self.config.seed
        seen = c.batches * c.batch_size * self.config.corpus.sequence_length
        passes = 3 * seen
        if c.layers != "symmetric":
            given["layers"] = c.layers
            passes += seen * (1 if c.layers == "block_influence" else dims(shape).layers)
        inputs = {"teacher": model, "tokens": self.tokens}
        cost = accounting.train_flops(shape, seen)
        return Stage("scores", 1, given, inputs, steps.scores, cost, passes=passes)

    @property
    def origin(self) -> str:
        """The rung that the student is cut from: its own teacher, or the reference that all share."""
        return self.rung if self.config.prune.reference is None else self.family.rung(self.config.prune.reference)

    @cached_property
    def student(self) -> Stage:
        """The student before training: random weights, or cut from its teacher, at once or in steps."""
        c = self.config.prune
        if c.init == "random":
            given = {"shape": self.student_shape, "seed": self.config.seed}
            return Stage("student", 1, {"init": "random", **given}, {}, steps.random_student)
        model, scores = self._pretrained(self.origin), self.scores
        for shape in self._way:
            model = self._cut(model, scores, shape)
            if self._step_tokens:
                model = self._trained(model, shape, self._step_tokens)
            scores = self._scores_of(model, shape)
        return self._cut(model, scores, self.student_shape, last=True)

    @property
    def _way(self) -> list[Mapping[str, Any]]:
        """The shapes between teacher and student when pruning goes in steps."""
        origin = self.family.rungs[self.origin]
        table, full, steps_ = architecture(origin), dims(origin), self.config.prune.iterative
        shapes = [between(full, self.shape, k / steps_, table) for k in range(1, steps_)]
        return [config_with(origin, sized(full, shape)) for shape in shapes]

    @property
    def _step_tokens(self) -> int:
        """Tokens of distillation between two steps of pruning."""
        if self.config.prune.step_data == "0":
            return 0
        return parse_tokens(self.config.prune.step_data, params=self.student_target, key="prune.step_data")

    def _cut(self, model: Stage, scores: Stage, shape: Mapping[str, Any], *, last: bool = False) -> Stage:
        c = self.config.prune
        given: dict[str, Any] = {"init": "pruned", "shape": shape}
        if c.layers != "symmetric":
            given["layers"] = c.layers
        if last and c.priority == "global":
            given |= {"priority": c.priority, "multiple": self.family.multiple}
        return Stage("student", 1, given, {"teacher": model, "scores": scores}, steps.pruned_student)

    @cached_property
    def distilled(self) -> Stage:
        """The trained student; with data=0 the start itself."""
        if self.data_tokens == 0:
            return self.student
        return self._trained(self.student, self.student_shape, self.data_tokens)

    def _trained(self, student: Stage, shape: Mapping[str, Any], tokens: int) -> Stage:
        c = self.config
        given = {
            "tokens": tokens,
            "epochs": c.epochs,
            "seed": c.seed,
            "optim": steps.optim_identity(c.train),
            "distill": identity_fields(c.distill),
            "learning_rate": c.train.peak(dims(shape).hidden),
            **self._arithmetic,
        }
        inputs = {"student": student, "tokens": self.tokens}
        teacher_flops = 0.0
        if c.distill.kd_weight > 0 and c.distill.signal != "online":
            inputs["signal"] = self._signal(tokens)
        elif c.distill.kd_weight > 0:
            inputs["teacher"] = self.teacher
            teacher_flops = accounting.forward_flops(self.teacher_shape, tokens)
        return Stage(
            "distil",
            1,
            given,
            inputs,
            steps.distil,
            cost=accounting.train_flops(shape, tokens) + teacher_flops,
            options=self._training,
            passes=(4 if teacher_flops else 3) * tokens,
            collective=True,
        )

    @property
    def _signal_size(self) -> int:
        """Values a token: k, or draws; never more than there are tokens."""
        return min(self.config.distill.signal_size or SIGNAL_SIZE, self.teacher_shape["vocab_size"])

    def _signal(self, tokens: int) -> Stage:
        """The teacher's cached outputs, shared by all students, seeds and losses that they can serve."""
        c = self.config
        seen = tokens // c.epochs
        given = {
            "kind": c.distill.signal,
            "size": self._signal_size,
            "temperature": c.distill.temperature,
            "tokens": seen,
            "seed": c.teacher_seed,
            **self._arithmetic,
        }
        inputs = {"teacher": self.teacher, "tokens": self.tokens}
        cost = accounting.forward_flops(self.teacher_shape, seen)
        options = {"batch_size": c.evaluate.batch_size}
        return Stage("signal", 1, given, inputs, steps.signal, cost, options, passes=seen)

    @property
    def teacher_flops(self) -> float:
        """What the teacher's forward passes cost in this cell."""
        if self.config.distill.kd_weight == 0:
            return 0.0
        return accounting.forward_flops(self.teacher_shape, self.data_tokens)

    def scored(self, model: Stage, shape: Mapping[str, Any]) -> Stage:
        """Held-out losses of one model."""
        c = self.config.evaluate
        given = {**identity_fields(c), **self._arithmetic}
        seen = c.tokens + c.ood_tokens
        cost = accounting.forward_flops(shape, seen)
        inputs = {"model": model, "tokens": self.tokens}
        return Stage("evaluate", 1, given, inputs, steps.evaluate, cost, {"batch_size": c.batch_size}, passes=seen)

    @cached_property
    def record(self) -> Stage:
        """The row of this cell."""
        inputs = {
            "corpus": self.corpus,
            "teacher": self.teacher,
            "trained": self.distilled,
            "evaluate_teacher": self.scored(self.teacher, self.teacher_shape),
            "evaluate_init": self.scored(self.student, self.student_shape),
            "evaluate": self.scored(self.distilled, self.student_shape),
        }
        return Stage("record", 1, self.description, inputs, steps.record)

    @property
    def waves(self) -> list[list[Stage]]:
        """Stages that other cells may need too; each wave needs only those before it, and the cell is the last."""
        start = [self.scored(self.student, self.student_shape)]
        scored = [self.scored(self.teacher, self.teacher_shape)]
        teachers = [self.teacher]
        if self.config.prune.init != "random":
            teachers.append(self._pretrained(self.origin))
            scored.append(self.scores)
        if "signal" in self.distilled.inputs:
            scored.append(self.distilled.inputs["signal"])
        return [[self.tokens], teachers, scored, start]

    @cached_property
    def description(self) -> dict[str, Any]:
        """The part of the record that is known before anything has run."""
        c, shape = self.config, self.student_shape
        return {
            "family": c.family.name,
            "corpus": corpus_name(c.corpus),
            "student": format_scale(self.student_scale),
            "teacher": self.rung,
            "data_tokens": self.data_tokens,
            "epochs": c.epochs,
            "teacher_tokens": self.teacher_tokens,
            "teacher_data": c.family.teacher_data.lower() if self.teacher_tokens else None,
            "seed": c.seed,
            "teacher_seed": c.teacher_seed,
            "student_params": count_params(shape),
            "student_params_non_embedding": accounting.non_embedding(shape),
            "teacher_params": count_params(self.teacher_shape),
            "teacher_params_non_embedding": accounting.non_embedding(self.teacher_shape),
            "init": c.prune.init,
            "prune_method": None if c.prune.init == "random" else c.prune.method,
            **self._pruned_otherwise,
            "shape": c.prune.shape if c.prune.fixed is None else c.prune.fixed,
            "batch": c.train.batch_size,
            "learning_rate": self.learning_rate,
            "precision": c.train.precision,
            "loss": c.distill.loss,
            "kd_weight": c.distill.kd_weight,
            "temperature": c.distill.temperature,
            "signal": c.distill.signal if c.distill.signal == "online" else f"{c.distill.signal}-{self._signal_size}",
            "train_flops": accounting.train_flops(shape, self.data_tokens),
            "teacher_flops": self.teacher_flops,
            "teacher_train_flops": self.teacher_tokens
            and accounting.train_flops(self.teacher_shape, self.teacher_tokens),
        }

    @property
    def _pruned_otherwise(self) -> dict[str, Any]:
        """How the student was cut, where that differs from the default: then, and only then, it is recorded."""
        c = self.config.prune
        given = {"prune_priority": c.priority, "prune_layers": c.layers, "prune_steps": c.iterative}
        usual = {"prune_priority": "local", "prune_layers": "symmetric", "prune_steps": 1}
        return {} if c.init == "random" else {k: v for k, v in given.items() if v != usual[k]}

    @property
    def _training(self) -> dict[str, Any]:
        """How a training stage is run, which changes nothing in its identity."""
        return {"micro_batch_size": self.config.train.micro_batch_size}

    @property
    def _arithmetic(self) -> dict[str, Any]:
        """What decides the last bits of every computed number."""
        c = self.config
        return {
            "precision": c.train.precision,
            "threads": c.train.threads,
            "sequence_length": c.corpus.sequence_length,
        }


def teacher_tokens(config: RunConfig, params: int) -> int:
    """Tokens of a teacher's pre-training: one number for all, or so many times its parameters."""
    return parse_tokens(config.family.teacher_data, params=params, key="family.teacher_data")


def _ladder(config: RunConfig) -> Family:
    """The family's ladder, or one made of the user's folders."""
    if config.family.name == "folders" or is_folder(config.teacher):
        given = config.family.folders or ([config.teacher] if is_folder(config.teacher) else [])
        if not given:
            raise ConfigError(
                "family=folders needs the model folders: family.folders=[FOLDER,FOLDER,...], and teacher= one of them."
            )
        ladder = local_family(given)
        return ladder
    return family(config.family.name)


def _check_positions(config: RunConfig, shape: Mapping[str, Any]) -> None:
    """Learned positions end; a longer sequence would fail deep inside a forward pass."""
    limit = dims(shape).positions
    if limit and config.corpus.sequence_length > limit:
        raise ConfigError(
            f"corpus.sequence_length={config.corpus.sequence_length}, but models of {config.family.name} have learned "
            f"positions for {limit} tokens. Give a shorter sequence_length."
        )


def resolve(config: RunConfig) -> Cell:
    """Reads the scales of `config` and checks that they go together; computes nothing, writes nothing.

    Raises:
        ImpossibleCell: the student is larger than its teacher, or its shape does not fit into it.
        ConfigError: anything else that cannot be.
    """
    ladder = _ladder(config)
    student = parse_scale(config.student, key="student")
    rung = ladder.rung(config.teacher)
    params = ladder.params[rung]
    target = ladder.params[ladder.scales[student]] if student in ladder.scales else student
    if target > params * 1.005:
        raise ImpossibleCell(
            f"student={config.student} is larger than teacher={config.teacher} ({params:,} parameters). "
            "A student is pruned from its teacher: give a smaller student or a larger teacher; equal sizes are fine. "
            f"Rungs of {ladder.name}: {' '.join(ladder.rungs)}."
        )
    data = parse_scale(config.data, key="data", allow_zero=True)
    budget = None if rung in ladder.published else teacher_tokens(config, params)
    _check_positions(config, ladder.rungs[rung])
    if config.family.quantization != "none" and config.prune.init != "random":
        raise ConfigError(
            f"family.quantization={config.family.quantization} with prune.init={config.prune.init}: a quantised "
            "teacher cannot be pruned. Use family.quantization=none, or prune.init=random."
        )
    cell = Cell(config, ladder, rung, student, target, data, budget)
    _ = cell.record.digest  # walks the whole chain: the shape must exist, every setting must have one spelling
    return cell


def run(config: RunConfig, *, waits: bool = True) -> str:
    """Computes one cell (or, with `only`, one stage of it) and returns the key of what was made.

    A failure leaves a failed record, with its cause, until the cell is done.

    Raises:
        Busy: with `waits=False`, another process is at a stage that this cell needs.
    """
    cell = resolve(config)
    store = Store(config.store_path)
    if config.plan:
        print("\n".join(make_plan([cell], store).lines))
        return cell.record.key
    runtime = Runtime(
        resolve_device(config.train.device),
        config.train.threads,
        config.train.checkpoint_minutes,
        waits,
        sharding=config.train.sharding,
    )
    if not runtime.ranks.leads:
        with runtime.catching_signals():
            store.follow(closure(cell.record), runtime)
        return cell.record.key
    store.create()
    with logging_to(store, config.only or cell.record.key), runtime.catching_signals():
        try:
            return _lead(cell, store, runtime)
        finally:
            runtime.ranks.tell(None)  # to those that follow: the end
            runtime.ranks.part()


def _lead(cell: Cell, store: Store, runtime: Runtime) -> str:
    cell.check_budgets(store, runtime)
    if only := cell.config.only:
        store.compute(closure(cell.record)[only], runtime)
        return only
    return _run_cell(cell, store, runtime)


def _run_cell(cell: Cell, store: Store, runtime: Runtime) -> str:
    record = cell.record
    if store.has(record):
        return record.key
    track = cell.config.tracking
    tracker = tracking.start(
        track, cell=record.digest, name=cell.name, config=cell.description, folder=store.root / "wandb"
    )
    runtime.on_log = tracker.log
    try:
        store.compute(cell.distilled, runtime)
        for point in steps.read_history(store.path(cell.distilled)) if cell.data_tokens else ():
            tracker.log(point)  # what another process computed, or an earlier one; what was logged is passed over
        row = json.loads((store.compute(record, runtime) / RECORD).read_text())
    except BaseException as error:
        tracker.finish({"status": "failed", "error": str(error)}, failed=True)
        if isinstance(error, Exception) and not isinstance(error, Busy):
            fail(cell, store, str(error) or type(error).__name__)
        raise
    failure_file(store, record.key).unlink(missing_ok=True)
    tracker.finish(row, failed=False)
    return record.key


def fail(cell: Cell, store: Store, cause: str) -> None:
    """Leaves a failed record with its cause; it stays until the cell is done."""
    file = failure_file(store, cell.record.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    row = Record(SCHEMA_VERSION, cell.record.digest, "failed", cause, **cell.description)
    write_json(file, row.to_dict())
