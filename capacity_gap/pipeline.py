"""The chain of one cell, read top to bottom; nothing else knows the order.

    corpus ─► tokenizer ─► tokens ─┐
    family ─► teacher ─► (expand ─► adapt) ─► scores ─► student ─► distil ─► (instruct ─► prefer) ─► record
                                       └─► teacher scores ──────────────┘

Building the chain computes nothing and imports no torch: it names the stages, so that a grid knows what its cells have
in common before anything runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap import accounting, running, steps
from capacity_gap.cell import Settings, teacher_tokens
from capacity_gap.config import CorpusConfig, RunConfig
from capacity_gap.config_tune import TuneConfig
from capacity_gap.data.sources import identity, tokenizer_identity
from capacity_gap.data.token_bytes import old_bytes_were_wrong
from capacity_gap.errors import ConfigError
from capacity_gap.evaluate import stages as scoring
from capacity_gap.evaluate.tasks import GENERATED, Task, check_tasks, folder_digest, folder_names
from capacity_gap.fingerprint import files_digest, identity_fields
from capacity_gap.instruct import checks, stages
from capacity_gap.models.axes import dims
from capacity_gap.models.defaults import completed, frozen_rows, training_only
from capacity_gap.models.folders import content_digest, in_text
from capacity_gap.models.layers import renumbered
from capacity_gap.runtime import Runtime
from capacity_gap.stage import Stage, StageRun, Store


@dataclass(frozen=True)
class Cell(Settings):
    """One cell: its settings with every scale read, and the stages that make its record."""

    def check_budgets(self, store: Store, runtime: Runtime) -> None:
        """Raises, before any model is trained, if there are too few tokens for teacher or student, or no such task."""
        from capacity_gap.data.packing import Packed, subset

        check_tasks(self.config.evaluate.benchmarks, self.config.evaluate.folder)
        for stage, budget, epochs, key in self.budgets:
            packed = Packed(store.compute(stage, runtime) / "train", self.config.corpus.sequence_length)
            subset(packed, budget, epochs=epochs, key=key)
        self._check_vocabularies(store, len(Packed(store.path(self.tokens) / "train", 1).bytes_per_id))
        checks.check_tuning(self, store, runtime)

    @property
    def budgets(self) -> list[tuple[Stage, int, int, str]]:
        """What this cell wants of a training text: its stage, tokens, passes, and the setting that says so."""
        c, text = self.config, self.tokens
        found = [(text, self.data_tokens, c.epochs, "data"), (text, self.adapt_tokens, c.adapt.epochs, "adapt.data")]
        if tokens := self.teacher_tokens:
            found += [(self.base_tokens, tokens, c.family.teacher_epochs, "family.teacher_data")]
        return found

    def _check_vocabularies(self, store: Store, tokens: int) -> None:
        """Ids must mean the same to teacher and student, and every id must have its row in both output matrices."""
        from capacity_gap.models.loading import check_roles, check_tokenizer

        for rung in {self.rung, self.origin} & set(self.family.published):
            check_tokenizer(self.family.published[rung], store.path(self.base_tokenizer))
        if self.rung in self.family.published:
            check_roles(next(iter(self.family.published.values())), store.path(self.base_tokenizer))
        for name, shape in (("teacher", self.teacher_shape), ("student", self.student_shape)):
            if dims(shape).vocab < tokens:
                raise ConfigError(
                    f"the {name}'s vocabulary has {dims(shape).vocab:,} rows, its tokenizer {tokens:,} tokens. Rows "
                    "may be padded, never too few: take the tokenizer that the model was trained with."
                )

    # The chain. Each stage names what decides its result, and nothing else.

    @cached_property
    def corpus(self) -> Stage:
        """The text that students learn: clean, split into train, validation, test and out-of-domain."""
        return self._corpus(self.config.text)

    @cached_property
    def base_corpus(self) -> Stage:
        """The text that teachers are pre-trained on; another one only where they are adapted to a mixture."""
        return self._corpus(self.config.corpus)

    def _corpus(self, c: CorpusConfig) -> Stage:
        given = {"name": c.name, "validation": c.validation, "test": c.test, **identity(c)}
        return Stage("corpus", 1, given, {}, steps.corpus, options={"source": c})

    def _source(self, rung: str) -> dict[str, Any]:
        """What identifies a published checkpoint: its repository's name, or a local folder's content."""
        repository = self.family.published[rung]
        if self.family.name == "folders":
            return {"content": content_digest(Path(repository))}
        return {"repository": repository}

    @cached_property
    def base_tokenizer(self) -> Stage:
        """Byte-level BPE with the family's vocabulary, trained on the corpus; or the published one."""
        if self.rung in self.family.published:
            first = next(iter(self.family.rungs))  # one for the whole ladder, so that all share their tokens
            options = {"repository": self.family.published[first]}
            return Stage("tokenizer", 1, self._source(first), {}, steps.published_tokenizer, options=options)
        given = {"vocab_size": dims(self.base.rungs[self.rung]).vocab}
        return Stage("tokenizer", 1, given, {"corpus": self.base_corpus}, steps.tokenizer)

    @cached_property
    def tokenizer(self) -> Stage:
        """The family's tokenizer, with the tokens of a second script if asked for."""
        c = self.config.expand
        if not c.vocab:
            return self.base_tokenizer
        given: dict[str, Any] = {"vocab": c.vocab}
        if c.tokenizer is not None:
            given["second"] = tokenizer_identity(c.tokenizer, c.revision)
        inputs = {"corpus": self.corpus, "tokenizer": self.base_tokenizer}
        return Stage("vocabulary", 2, given, inputs, steps.vocabulary, options={"expand": c})

    @cached_property
    def tokens(self) -> Stage:
        """The corpus as memory-mapped token streams."""
        return self._packed(self.corpus, self.tokenizer)

    @cached_property
    def base_tokens(self) -> Stage:
        """What teachers are pre-trained on."""
        return self._packed(self.base_corpus, self.base_tokenizer)

    def _packed(self, corpus: Stage, tokenizer: Stage) -> Stage:
        return Stage("tokens", 1, {}, {"corpus": corpus, "tokenizer": tokenizer}, steps.tokens)

    @property
    def _tokenizer_folder(self) -> Path | None:
        """The user's own folder with the tokenizer of the ladder; None where it is not a ladder of folders."""
        return Path(next(iter(self.family.published.values()))) if self.family.name == "folders" else None

    def _read(self, keys: list[str]) -> list[str]:
        """`keys` of a config.json that acts in training, without a padding token that no text holds."""
        folder, pad = self._tokenizer_folder, completed(self.teacher_shape).get("pad_token_id")
        unread = folder is not None and pad is not None and not in_text(folder, pad)
        return [key for key in keys if not (key == "pad_token_id" and unread)]

    @cached_property
    def teacher(self) -> Stage:
        """The teacher, ready to be pruned and to teach."""
        return self._ready(self.rung)

    def _ready(self, rung: str) -> Stage:
        """A teacher with the vocabulary and the further training that this cell asks for."""
        model = self._pretrained(rung)
        if self.family is not self.base:
            inputs = {"model": model, "vocabulary": self.tokenizer}
            rows = dims(self.family.rungs[rung]).vocab
            model = Stage("expand", 1, {"rows": rows}, inputs, steps.expand)
        return self._adapted(model, self.family.rungs[rung]) if self.adapt_tokens else model

    def _adapted(self, model: Stage, shape: Mapping[str, Any]) -> Stage:
        c, inputs = self.config, {"model": model, "tokens": self.tokens}
        given = {"tokens": self.adapt_tokens, "epochs": c.adapt.epochs, "seed": c.teacher_seed, **self._arithmetic}
        given |= steps.pace(c.adapt.optim, dims(shape).hidden) | self._compiled
        return self._training_stage("adapt", given, inputs, steps.adapt, shape, held=c.family.dtype)

    def _training_stage(
        self,
        name: str,
        given: Mapping[str, Any],
        inputs: Mapping[str, Stage],
        compute: Callable[[StageRun], None],
        shape: Mapping[str, Any],
        *,
        teacher_flops: float = 0.0,
        held: str = "fp32",
    ) -> Stage:
        """A stage of the one loop, on `given["tokens"]` tokens; `held`: the type in which its start was held."""
        budget = given["tokens"]
        given = {**given, **_ignored(self._read(training_only(shape)))}
        cost, passes = accounting.train_flops(shape, budget) + teacher_flops, (4 if teacher_flops else 3) * budget
        version = 2 if "bf16" in (given["precision"], held) else 1  # of outputs in fp32, of teachers adapted in bf16
        return Stage(name, version, given, inputs, compute, cost, self._training, passes=passes, collective=True)

    def _pretrained(self, rung: str) -> Stage:
        c, shape = self.config, self.base.rungs[rung]
        if rung in self.family.published:
            given = {"shape": shape, **self._source(rung), "dtype": c.family.dtype}
            given["quantization"] = c.family.quantization
            options = {"repository": self.family.published[rung]}
            return Stage("published", 1, given, {}, steps.published, options=options)
        given = {
            "shape": shape,
            "seed": c.teacher_seed,
            "tokens": teacher_tokens(c, self.base.params[rung]),
            "epochs": c.family.teacher_epochs,
            **steps.pace(c.family.pretrain, dims(shape).hidden),
            **self._arithmetic,
            **self._compiled,
        }
        return self._training_stage("teacher", given, {"tokens": self.base_tokens}, steps.pretrain, shape)

    @cached_property
    def scores(self) -> Stage:
        """Importance of every unit of the teacher that the student is cut from."""
        return self._scores_of(self._ready(self.origin), self.family.rungs[self.origin])

    def _scores_of(self, model: Stage, shape: Mapping[str, Any]) -> Stage:
        c = self.config.prune
        given = {"method": c.method, "batches": c.batches, "batch_size": c.batch_size, **self._arithmetic}
        if c.method == "random":
            given["seed"] = self.config.seed
        if c.method in ("taylor", "movement"):  # they read the gradients of the embedding
            given |= _ignored(self._read(frozen_rows(shape)))
        seen = c.batches * c.batch_size * self.config.corpus.sequence_length
        passes = 3 * seen
        if c.layers != "symmetric":
            given["layers"] = c.layers
            passes += seen * (1 if c.layers == "block_influence" else dims(shape).layers)
        inputs = {"teacher": model, "tokens": self.tokens}
        cost = accounting.train_flops(shape, seen)
        return Stage("scores", 1, given, inputs, steps.scores, cost, passes=passes)

    @cached_property
    def student(self) -> Stage:
        """The student before training: random weights, or cut from its teacher, at once or in steps."""
        c = self.config.prune
        if c.init == "random":
            given = {"shape": self.student_shape, "seed": self.config.seed}
            given |= {"init": "random", **_ignored(frozen_rows(self.student_shape))}
            return Stage("student", 1, given, {}, steps.random_student)
        model, scores, before = self._ready(self.origin), self.scores, self.family.rungs[self.origin]
        for shape in self._way:
            model = self._cut(model, scores, before, shape)
            if self._step_tokens:
                model = self._trained(model, shape, self._step_tokens)
            scores, before = self._scores_of(model, shape), shape
        return self._cut(model, scores, before, self.student_shape, last=True)

    def _cut(
        self,
        model: Stage,
        scores: Stage,
        before: Mapping[str, Any],
        shape: Mapping[str, Any],
        *,
        last: bool = False,
    ) -> Stage:
        c = self.config.prune
        given: dict[str, Any] = {"init": "pruned", "shape": shape}
        if c.layers != "symmetric":
            given["layers"] = c.layers
        if renumbered(before, dims(before).layers, dims(shape).layers, symmetric=c.layers == "symmetric"):
            given["by_layer"] = "kept"  # what belongs to a layer's number goes with the layer
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
            "distill": identity_fields(c.distill),
            **steps.pace(c.train, dims(shape).hidden),
            **self._arithmetic,
            **self._compiled,
            **self._dynamics,
        }
        inputs = {"student": student, "tokens": self.tokens}
        teacher_flops = 0.0
        if c.distill.kd_weight > 0 and c.distill.signal != "online":
            inputs["signal"] = self._signal(tokens)
        elif c.distill.kd_weight > 0:
            inputs["teacher"] = self.teacher
            teacher_flops = accounting.forward_flops(self.teacher_shape, tokens)
        return self._training_stage("distil", given, inputs, steps.distil, shape, teacher_flops=teacher_flops)

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

    @cached_property
    def instructions(self) -> Stage:
        """Conversations and pairs of answers, made from the corpus or read from files; the same for every cell."""
        tune, pairs = self.config.instruct, self.config.prefer
        given: dict[str, Any] = {"count": tune.count, "pairs": pairs.count, "held_out": tune.held_out}
        for name, path in (("rows", tune.path), ("pair_rows", pairs.path)):
            if path:
                given[name] = files_digest([Path(path).expanduser()])
        options = {"path": tune.path, "pairs_path": pairs.path}
        return Stage("instructions", 2, given, {"corpus": self.corpus}, stages.instructions, options=options)

    @cached_property
    def tuned(self) -> dict[str, Stage]:
        """What becomes of the distilled student, by stage: fine-tuned on conversations, then on preferences."""
        c, found = self.config, {}
        if c.instruct.wanted:
            checks.check_settings(c, self.student_shape)
            inputs = {"model": self.distilled, "tokenizer": self.tokenizer, "instructions": self.instructions}
            if c.instruct.replay:
                inputs["tokens"] = self.tokens
            found["instruct"] = self._tuned("instruct", c.instruct, inputs)
        if c.prefer.wanted:
            inputs = {"model": found["instruct"], "instructions": self.instructions}
            found["prefer"] = self._tuned("prefer", c.prefer, inputs)
        return found

    def _tuned(self, name: str, config: TuneConfig, inputs: Mapping[str, Stage]) -> Stage:
        kept = {k: v for k, v in identity_fields(config).items() if k not in ("count", "held_out", "answer_tokens")}
        given = {**kept, "seed": self.config.seed, "precision": self.config.train.precision}
        given["threads"] = self.config.train.threads
        given |= _ignored(self._read(training_only(self.student_shape)))
        return Stage(name, 2, given, inputs, getattr(stages, name), options=self._training)

    def answered(self, model: Stage, tokenizer: Stage) -> Stage:
        """A model's answers to the held-out instructions."""
        given = {"answer_tokens": self.config.instruct.answer_tokens, "threads": self.config.train.threads}
        inputs = {"model": model, "tokenizer": tokenizer, "instructions": self.instructions}
        return Stage("answers", 1, given, inputs, stages.answers)

    @property
    def _answers(self) -> dict[str, Stage]:
        """What a record needs to say how the student answers, before and after tuning, and what else tuning did."""
        if not self.tuned:
            return {}
        found = {"instructions": self.instructions, "answers_base": self.answered(self.distilled, self.tokenizer)}
        found |= {f"answers_{name}": self.answered(model, model) for name, model in self.tuned.items()}
        final = list(self.tuned.values())[-1]
        found |= {f"tuned_benchmark_{i}": stage for i, stage in enumerate(self.benchmarks(final))}
        return found | self.tuned | {"evaluate_tuned": self.scored(final, self.student_shape)}

    def scored(self, model: Stage, shape: Mapping[str, Any]) -> Stage:
        """Held-out losses of one model."""
        c = self.config.evaluate
        given = {"tokens": c.tokens, "ood_tokens": c.ood_tokens, **self._arithmetic}
        seen = c.tokens + c.ood_tokens
        cost = accounting.forward_flops(shape, seen)
        inputs = {"model": model, "tokens": self.tokens}
        if (folder := self._tokenizer_folder) and old_bytes_were_wrong(folder):
            inputs["tokenizer"] = self.tokenizer  # counts bytes anew: texts packed by an earlier version hold others
        return Stage("evaluate", 1, given, inputs, scoring.evaluate, cost, {"batch_size": c.batch_size}, passes=seen)

    @cached_property
    def suite(self) -> Stage:
        """Benchmarks made from the corpus' test split, for models that no public one can tell apart."""
        return Stage("suite", 1, {}, {"corpus": self.corpus}, scoring.suite)

    def benchmarks(self, model: Stage) -> list[Stage]:
        """One model's scores, a stage a benchmark: what is scored stays when the list grows."""
        tasks = self.config.evaluate.benchmarks
        if tasks and self.objective:
            raise ConfigError(
                f"benchmarks ({', '.join(t.name for t in tasks)}) ask a causal model, and family={self.family.name} is "
                "an encoder–decoder. Leave evaluate=perplexity: its held-out losses are what such a grid compares."
            )
        return [self._benchmark(model, task) for task in tasks]

    def _benchmark(self, model: Stage, task: Task) -> Stage:
        c = self.config.evaluate
        given = {"task": task.name, "shots": task.shots, "limit": c.limit, "threads": self.config.train.threads}
        inputs = {"model": model, "tokenizer": self.tokenizer}
        if task.name in GENERATED:
            inputs["suite"] = self.suite
        elif c.folder and task.name in folder_names(c.folder):
            given["files"] = folder_digest(c.folder)
        options = {"batch_size": c.batch_size, "folder": c.folder, "allow_code": c.allow_code_execution}
        return Stage("benchmark", 1, given, inputs, scoring.benchmark, options=options)

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
        for whose, model in (("student", self.distilled), ("teacher", self.teacher)):
            inputs |= {f"{whose}_benchmark_{i}": stage for i, stage in enumerate(self.benchmarks(model))}
        if self.config.expand.vocab:
            inputs["vocabulary"] = self.tokenizer
        inputs |= self._answers
        return Stage("record", 1, self.description, inputs, steps.record)

    @property
    def waves(self) -> list[list[Stage]]:
        """Stages that other cells may need too; each wave needs only those before it, and the cell is the last."""
        start = [self.scored(self.student, self.student_shape)]
        scored = [self.scored(self.teacher, self.teacher_shape), *self.benchmarks(self.teacher)]
        teachers = [self.teacher]
        if self.config.prune.init != "random":
            teachers.append(self._ready(self.origin))
            scored.append(self.scores)
        if "signal" in self.distilled.inputs:
            scored.append(self.distilled.inputs["signal"])
        return [[self.tokens], teachers, scored, start]


def _ignored(keys: list[str]) -> dict[str, Any]:
    """What an identity says of config keys that once acted in training, and no longer do."""
    return {"ignored": keys} if keys else {}


def resolve(config: RunConfig) -> Cell:
    """The cell that `config` asks for; computes nothing, writes nothing.

    Raises:
        ImpossibleCell: the student is larger than its teacher, or its shape does not fit into it.
        ConfigError: anything else that cannot be.
    """
    cell = Cell.read(config)
    _ = cell.record.digest  # walks the whole chain: the shape must exist, every setting must have one spelling
    return cell


def run(config: RunConfig, *, waits: bool = True) -> str:
    """Computes the cell that `config` asks for and returns the key of what was made (see `running.run`)."""
    return running.run(resolve(config), waits=waits)
