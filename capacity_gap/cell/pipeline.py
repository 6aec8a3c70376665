"""The chain of one cell, read top to bottom; nothing else knows the order.

    corpus ─► tokenizer ─► tokens ─┐
    family ─► teacher ─► (expand ─► adapt) ─► scores ─► student ─► distil ─► (instruct ─► prefer) ─► record
                                       └─► teacher scores ──────────────┘

Building the chain computes nothing and imports no torch: it names the stages, so that a grid knows what its cells have
in common before anything runs. What identifies a stage, and what it does, is in its file in `stages/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.answer_questions import answers_stage
from capacity_gap.cell.stages.build_tokenizer import tokenizer_stage, vocabulary_stage
from capacity_gap.cell.stages.collect_text import corpus_stage
from capacity_gap.cell.stages.distil_student import branch_stage, distil_stage
from capacity_gap.cell.stages.evaluate_model import evaluate_stage
from capacity_gap.cell.stages.get_teacher import adapted_stage, expanded_stage, pretrained_stage, start_stage
from capacity_gap.cell.stages.make_instructions import instructions_stage
from capacity_gap.cell.stages.make_student import cut_student_stage, random_student_stage, trained_student_stage
from capacity_gap.cell.stages.pack_tokens import tokens_stage
from capacity_gap.cell.stages.run_benchmark import benchmark_stages
from capacity_gap.cell.stages.score_units import scores_stage
from capacity_gap.cell.stages.tune_student import tuning_stages
from capacity_gap.cell.stages.write_record import record_stage
from capacity_gap.store.stage import Stage


class Budget(NamedTuple):
    """A requirement on a training text: its stage, tokens, epochs, the setting behind it, tokens to skip."""

    text: Stage
    tokens: int
    epochs: int
    setting: str
    skip: int = 0


@dataclass(frozen=True)
class Cell(ResolvedCell):
    """One cell: its settings with every scale read, and the stages that make its record."""

    @cached_property
    def corpus(self) -> Stage:
        """The text that students learn: clean, split into train, validation, test and out-of-domain."""
        return corpus_stage(self.config.text)

    @cached_property
    def base_corpus(self) -> Stage:
        """The text that teachers are pre-trained on; another one only where they are adapted to a mixture."""
        return corpus_stage(self.config.corpus)

    @cached_property
    def base_tokenizer(self) -> Stage:
        """The family's tokenizer."""
        return tokenizer_stage(self, self.base_corpus)

    @cached_property
    def tokenizer(self) -> Stage:
        """The family's tokenizer, with the tokens of a second script if configured."""
        if not self.config.expand.vocab:
            return self.base_tokenizer
        return vocabulary_stage(self, self.corpus, self.base_tokenizer)

    @cached_property
    def tokens(self) -> Stage:
        """The corpus as memory-mapped token streams."""
        return tokens_stage(self.corpus, self.tokenizer, bos=self.config.corpus.bos)

    @cached_property
    def base_tokens(self) -> Stage:
        """What teachers are pre-trained on."""
        return tokens_stage(self.base_corpus, self.base_tokenizer, bos=self.config.corpus.bos)

    @cached_property
    def teacher(self) -> Stage:
        """The teacher, ready to be pruned and to teach."""
        return self.ready(self.rung)

    def ready(self, rung: str) -> Stage:
        """A teacher with the vocabulary and the further training that this cell asks for."""
        model = pretrained_stage(self, rung, self.base_tokens)
        if self.family is not self.base:
            model = expanded_stage(self, rung, model, self.tokenizer)
        return adapted_stage(self, rung, model, self.tokens) if self.adapt_tokens else model

    @cached_property
    def scores(self) -> Stage:
        """Importance of every unit of the teacher that the student is cut from."""
        return scores_stage(self, self.ready(self.origin), self.family.rungs[self.origin], self.tokens)

    @cached_property
    def student(self) -> Stage:
        """The student before training: random weights, a trained model, or cut from a teacher, at once or in steps."""
        if self.config.prune.init == "random":
            return random_student_stage(self)
        if self.start is not None:
            return trained_student_stage(self, self.start)
        if self.config.prune.init == "pretrained":
            return start_stage(self, self.base_tokens)
        model, scores, before = self.ready(self.origin), self.scores, self.family.rungs[self.origin]
        for shape in self.shapes_between:
            model = cut_student_stage(self, model, scores, before, shape)
            if self.step_tokens:
                model = self._trained(model, shape, self.step_tokens)
            scores, before = scores_stage(self, model, shape, self.tokens), shape
        return cut_student_stage(self, model, scores, before, self.student_shape, last=True)

    @cached_property
    def distilled(self) -> Stage:
        """The trained student; with data=0 the start itself."""
        if self.data_tokens == 0:
            return self.student
        if self.config.train.trunk:
            return self._branch[0]
        return self._trained(self.student, self.student_shape, self.data_tokens)

    @cached_property
    def _branch(self) -> tuple[Stage, list[Stage]]:
        """The trained student as a branch of a trunk, and the trunk's parts, first to last."""
        return branch_stage(self, self.student, self.student_shape, self.teacher, self.tokens)

    def _trained(self, student: Stage, shape: Mapping[str, Any], budget: int) -> Stage:
        return distil_stage(self, student, shape, self.teacher, self.tokens, budget=budget)

    @cached_property
    def instructions(self) -> Stage:
        """Conversations and pairs of answers."""
        return instructions_stage(self, self.corpus)

    @cached_property
    def tuned(self) -> dict[str, Stage]:
        """What becomes of the distilled student, by stage."""
        return tuning_stages(self, self.distilled, self.tokenizer, self.instructions, self.tokens)

    def answered(self, model: Stage, tokenizer: Stage) -> Stage:
        """A model's answers to the held-out instructions."""
        return answers_stage(self, model, tokenizer, self.instructions)

    def scored(self, model: Stage, shape: Mapping[str, Any]) -> Stage:
        """Held-out losses of one model."""
        return evaluate_stage(self, model, shape, self.tokens, self.tokenizer)

    @property
    def evaluated(self) -> Stage:
        """Held-out losses of the distilled student, for which settings may be chosen."""
        tokens = self.config.evaluate.validation_tokens
        return evaluate_stage(self, self.distilled, self.student_shape, self.tokens, self.tokenizer, validation=tokens)

    def benchmarks(self, model: Stage) -> list[Stage]:
        """One model's scores on each benchmark."""
        return benchmark_stages(self, model, self.tokenizer, self.corpus)

    @cached_property
    def record(self) -> Stage:
        """The row of this cell."""
        inputs = {
            "corpus": self.corpus,
            "teacher": self.teacher,
            "trained": self.distilled,
            "evaluate_teacher": self.scored(self.teacher, self.teacher_shape),
            "evaluate_init": self.scored(self.student, self.student_shape),
            "evaluate": self.evaluated,
        }
        for whose, model in (("student", self.distilled), ("teacher", self.teacher)):
            inputs |= {f"{whose}_benchmark_{i}": stage for i, stage in enumerate(self.benchmarks(model))}
        if self.config.expand.vocab:
            inputs["vocabulary"] = self.tokenizer
        if self.config.train.trunk and self.data_tokens:
            inputs |= {f"trunk_{i}": part for i, part in enumerate(self._branch[1])}
        return record_stage(self, inputs | self._answers)

    @property
    def _answers(self) -> dict[str, Stage]:
        """What a record needs to report the student's answers and losses before and after tuning."""
        if not self.tuned:
            return {}
        found = {"instructions": self.instructions, "answers_base": self.answered(self.distilled, self.tokenizer)}
        found |= {f"answers_{name}": self.answered(model, model) for name, model in self.tuned.items()}
        final = list(self.tuned.values())[-1]
        found |= {f"tuned_benchmark_{i}": stage for i, stage in enumerate(self.benchmarks(final))}
        return found | self.tuned | {"evaluate_tuned": self.scored(final, self.student_shape)}

    @property
    def budgets(self) -> list[Budget]:
        """What this cell requires of training texts."""
        c, text = self.config, self.tokens
        found = [
            Budget(text, self.data_tokens, c.epochs, "data", self.data_offset),
            Budget(text, self.adapt_tokens, c.adapt.epochs, "adapt.data"),
        ]
        if tokens := self.teacher_tokens:
            found += [Budget(self.base_tokens, tokens, c.family.teacher_epochs, "family.teacher_data")]
        if tokens := self.start_tokens:
            found += [Budget(self.base_tokens, tokens, c.family.teacher_epochs, "prune.init_data")]
        return found

    @property
    def waves(self) -> list[list[Stage]]:
        """Stages that other cells may need too, by wave; after the last come the cells.

        The order is for speed alone: a job computes what it lacks, and waits where another process is
        computing it. Each stage must be one of the record's chain. Cells of one grid may differ in their number of
        waves.
        """
        start = [self.scored(self.student, self.student_shape)]
        scored = [self.scored(self.teacher, self.teacher_shape), *self.benchmarks(self.teacher)]
        teachers = [self.teacher]
        if self.config.prune.cuts:
            teachers.append(self.ready(self.origin))
            scored.append(self.scores)
        if "signal" in self.distilled.inputs:
            scored.append(self.distilled.inputs["signal"])
        trunk = [[part] for part in self._branch[1]] if self.config.train.trunk else []
        return [[self.tokens], teachers, scored, start, *trunk]


def in_waves(cells: Sequence[Cell]) -> list[list[list[Stage]]]:
    """For each wave of a grid and each cell what the cell needs in it; the last wave is the records."""
    each = [cell.waves for cell in cells]
    shared = max(map(len, each), default=0)
    waves = [[mine[n] if n < len(mine) else [] for mine in each] for n in range(shared)]
    return [*waves, [[cell.record] for cell in cells]]


def resolve(config: RunConfig) -> Cell:
    """The cell that `config` asks for; computes nothing, writes nothing.

    Raises:
        ImpossibleCell: the student is larger than its teacher, or its shape does not fit into it.
        ConfigError: anything else that cannot be.
    """
    cell = Cell.read(config)
    _ = cell.record.digest  # walks the whole chain: the shape must exist, every setting must have one spelling
    return cell
