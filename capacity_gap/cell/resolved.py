"""One resolved cell: its settings with every scale parsed, its shapes, and the part of its record known beforehand.

Nothing here computes anything or imports torch; the stages that make the cell are `pipeline.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.lengths import check_lengths, check_positions
from capacity_gap.cell.named_models import (
    called,
    check_start,
    expanded,
    ladder_of,
    start_of,
    student_size,
    with_init,
)
from capacity_gap.cell.nondefault import setting_columns, settings_text, tuning_text
from capacity_gap.cell.placement import check_placement, check_quantization, check_trunk, placement_of
from capacity_gap.cell.recipes import recipe_of, usual, with_recipe
from capacity_gap.cell.student_shape import layers_told, shaped, usual_layer_score
from capacity_gap.data.sources import corpus_name
from capacity_gap.distill.distill_config import SIGNAL_SIZE
from capacity_gap.instruct.rows import rows_in
from capacity_gap.models import accounting
from capacity_gap.models.axes import (
    architecture,
    architecture_identity,
    check_head,
    config_with,
    count_params,
    cuttable,
    dims,
)
from capacity_gap.models.checkpoints import Checkpoint
from capacity_gap.models.defaults import completed
from capacity_gap.models.ladders import Family
from capacity_gap.pruning.shape import Shape, between, sized
from capacity_gap.settings.errors import ConfigError, ImpossibleCell
from capacity_gap.settings.scales import format_scale, parse_scale, parse_tokens


@dataclass(frozen=True)
class ResolvedCell:
    """The parsed settings: the part of a cell that its stages and its record are made of."""

    config: RunConfig
    family: Family  # its shapes with the expanded vocabulary, if there is one
    base: Family  # as published, or as pre-trained on the spot
    rung: str
    student_scale: int  # as asked for
    student_target: int  # what it means: the exact size of a rung where it names one
    data_tokens: int
    teacher_tokens: int | None  # None for published teachers
    start: Checkpoint | None = None  # the trained model that the student is, if it is a checkpoint
    start_shape: Mapping[str, Any] | None = None  # its config.json; also where its weights are drawn anew

    @classmethod
    def read(cls, config: RunConfig) -> Self:
        """Reads the scales of `config` and checks that they go together.

        Raises:
            ImpossibleCell: the student is larger than its teacher, or its shape does not fit into it.
            ConfigError: anything else that cannot be.
        """
        ladder = expanded(base := ladder_of(config), config)
        start, shape = start_of(config, base)
        config = with_init(config, start)
        rung = ladder.rung(config.teacher)
        params = ladder.params[rung]
        student, target = student_size(config, ladder, shape)
        if target > params * 1.005:
            raise ImpossibleCell(
                f"student={config.student} is larger than teacher={config.teacher} ({params:,} parameters)"
                f"{f': it has {target:,}' if shape else ''}. Use a smaller student or a larger teacher; equal sizes "
                f"are allowed. Rungs of {ladder.name}: {' '.join(ladder.rungs)}."
            )
        data = parse_scale(config.data, key="data", allow_zero=True)
        by_recipe = config.train.batch_size is None and recipe_of(config, target).batch_tokens
        config = with_recipe(config, target, data, family=ladder.name, shapes=_readers(ladder, shape))
        budget = None if rung in ladder.published else teacher_tokens(config, base.params[rung])
        check_positions(config, ladder, ladder.rungs[rung])
        if config.prune.reference is not None:
            check_positions(config, ladder, ladder.rungs[ladder.rung(config.prune.reference)])
        for read in filter(None, (ladder.rungs[rung], shape)):
            check_head(completed(read))
        check_lengths(config, data, budget, target)
        check_quantization(config, ladder.name, pretrained=budget is not None)
        if shape is not None:
            check_start(config, ladder, rung, shape)
        cell = cls(config, ladder, base, rung, student, target, data, budget, start, shape)
        if config.prune.cuts:
            cuttable(ladder.rungs[cell.origin])
        check_placement(config)
        check_trunk(config, data, by_recipe=bool(by_recipe))
        if cell.adapted and config.family.quantization != "none":
            raise ConfigError("a quantised teacher cannot be expanded or adapted. Use family.quantization=none.")
        return cell

    @property
    def placement(self) -> str:
        """Placement of teachers: one, devices or ranks."""
        return placement_of(self.config)

    @property
    def shards_teachers(self) -> bool:
        """Whether the stages that read a teacher are for all ranks, if there are several."""
        return self.placement == "ranks"

    @property
    def data_offset(self) -> int:
        """Tokens of the training permutation that the student's budget begins behind: whole sequences."""
        sequences = parse_scale(self.config.data_offset, key="data_offset", allow_zero=True) // self.sequence_length
        return sequences * self.sequence_length if self.data_tokens else 0

    @property
    def adapted(self) -> bool:
        """Whether teachers are expanded, adapted or both, before anything is pruned."""
        return self.family is not self.base or self.adapt_tokens > 0

    @property
    def adapt_tokens(self) -> int:
        """Tokens of the teacher's continued pre-training."""
        return parse_scale(self.config.adapt.data, key="adapt.data", allow_zero=True)

    @property
    def teacher_shape(self) -> Mapping[str, Any]:
        """The teacher's config.json."""
        return self.family.rungs[self.rung]

    @cached_property
    def student_shape(self) -> Mapping[str, Any]:
        """The student's config.json: a function of family, scale and policy (docs/method.md §3).

        Under global priority it is that of the average layer: the parameters are the same. Its per-layer
        entries are right where layers are removed from both ends; where scores choose them, they are known later.
        """
        if self.start_shape is not None:
            return self.start_shape
        last = self.shapes_between[-1] if self.shapes_between else self.family.rungs[self.origin]
        # What is not cut is made anew: its layers are numbered from the first under every teacher.
        stay = None if self.config.prune.cuts else range(self.shape.layers)
        return config_with(last, sized(dims(last), self.shape), stay)

    @property
    def layer_score(self) -> str | None:
        """The score by which layers of this cell's student are chosen; None where layers stay, or go from both ends."""
        asked = self.config.prune
        if not asked.cuts or asked.layers is not None:
            return asked.layers if asked.cuts and asked.by_layer_score else None
        usual = usual_layer_score(self.config, self.family, self.origin, self.shape)
        return usual if dims(self.family.rungs[self.origin]).layers > self.shape.layers else None

    @property
    def shape(self) -> Shape:
        """The student's sizes."""
        return self._shaped[0]

    @property
    def multiple(self) -> int:
        """What hidden size and neurons of the student are multiples of."""
        return self._shaped[1]

    @cached_property
    def _shaped(self) -> tuple[Shape, int]:
        return shaped(self.config, self.family, self.origin, self.student_target)

    @property
    def sequence_length(self) -> int:
        """Tokens of one packed sequence."""
        return _resolved(self.config.corpus.sequence_length)

    @property
    def batch_size(self) -> int:
        """Sequences in one optimiser step of the student."""
        return _resolved(self.config.train.batch_size)

    @property
    def score_batch(self) -> int:
        """Sequences of one batch that pruning scores are taken over."""
        return _resolved(self.config.prune.batch_size)

    @property
    def teacher_dtype(self) -> str:
        """The type in which a published teacher is held while it teaches."""
        return self.config.family.dtype or "fp32"

    @property
    def precision(self) -> str:
        """The type of the arithmetic of training."""
        return self.config.train.precision or "fp32"

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer of the ladder is; None where it is not a ladder of the user's own checkpoints."""
        own = self.family.checkpoints
        return next(iter(own.values())).folder if own else None

    def tokenizer_of(self, rung: str) -> str:
        """Where the tokenizer of a published rung is: a folder, or a repository of the hub."""
        own = self.family.checkpoints.get(rung)
        return own.tokenizer if own else self.family.published[rung]

    def source(self, rung: str) -> dict[str, Any]:
        """What identifies a published checkpoint: the name of its repository, or what the user's own is known by."""
        if rung in self.family.checkpoints:
            return self.family.checkpoints[rung].identity
        return {"repository": self.family.published[rung]}

    @property
    def learning_rate(self) -> float:
        """The student's peak learning rate."""
        return self.config.train.peak(dims(self.student_shape).hidden)

    @property
    def name(self) -> str:
        """The display name of the cell."""
        return f"{self.student_name} from {self.rung}, {format_scale(self.data_tokens)} tokens, seed {self.config.seed}"

    @property
    def student_name(self) -> str:
        """The display name of the student: its checkpoint, or its scale."""
        return called(self.config, self.start) or format_scale(self.student_scale)

    @property
    def origin(self) -> str:
        """The rung that the student is cut from: its own teacher, or the reference that all share."""
        return self.rung if self.config.prune.reference is None else self.family.rung(self.config.prune.reference)

    @cached_property
    def shapes_between(self) -> list[Mapping[str, Any]]:
        """The shapes between teacher and student when pruning goes in steps."""
        origin = self.family.rungs[self.origin]
        table, full, steps_ = architecture(origin), dims(origin), self.config.prune.iterative
        found: list[Mapping[str, Any]] = []
        last: Mapping[str, Any] = origin
        for k in range(1, steps_):
            last = config_with(last, sized(full, between(full, self.shape, k / steps_, table)))
            found.append(last)
        return found

    @property
    def step_tokens(self) -> int:
        """Tokens of distillation between two steps of pruning."""
        if self.config.prune.step_data == "0":
            return 0
        return parse_tokens(self.config.prune.step_data, params=self.student_target, key="prune.step_data")

    @property
    def signal_size(self) -> int:
        """Values a token: k, or draws; never more than there are tokens."""
        return min(self.config.distill.signal_size or SIGNAL_SIZE, dims(self.teacher_shape).vocab)

    @property
    def teacher_flops(self) -> float:
        """What the teacher's forward passes cost in this cell."""
        if self.config.distill.kd_weight == 0:
            return 0.0
        return accounting.forward_flops(self.teacher_shape, self.data_tokens)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The part of the record that is known before anything has run: settings and derived values."""
        return (
            setting_columns(self.config)
            | self._asked
            | self._started
            | self._adapted
            | self._tuned
            | self._texts
            | self._sizes
        )

    @property
    def _asked(self) -> dict[str, Any]:
        """Columns that are computed from settings."""
        c = self.config
        return {
            "family": self.family.name,
            "corpus": corpus_name(c.text),
            "student": format_scale(self.student_scale),
            "teacher": self.rung,
            "data_tokens": self.data_tokens,
            "teacher_tokens": self.teacher_tokens,
            "teacher_data": c.family.teacher_data.lower() if self.teacher_tokens else None,
            "shape": c.prune.shape if c.prune.fixed is None else c.prune.fixed,
            "learning_rate": self.learning_rate,
            **self.objective,
            **(layers_told(self.config, self.family, self.origin, self.shape) if c.prune.cuts else {}),
            "signal": c.distill.signal if c.distill.signal == "online" else f"{c.distill.signal}-{self.signal_size}",
        }

    @property
    def _sizes(self) -> dict[str, Any]:
        """Parameters and FLOPs of student and teacher."""
        student, teacher = self.student_shape, self.teacher_shape
        pretraining = self.teacher_tokens and accounting.train_flops(teacher, self.teacher_tokens)
        return {
            "student_params": count_params(student),
            "student_params_non_embedding": accounting.non_embedding(student),
            "teacher_params": count_params(teacher),
            "teacher_params_non_embedding": accounting.non_embedding(teacher),
            "train_flops": accounting.train_flops(student, self.data_tokens),
            "teacher_flops": self.teacher_flops,
            "teacher_train_flops": pretraining,
        }

    @property
    def _started(self) -> dict[str, Any]:
        """The trained model that the student is, or how long it was trained, if it is one."""
        if self.config.prune.init != "pretrained":
            return {}
        return {"start": self.start.name} if self.start else {"start_tokens": self.start_tokens}

    @property
    def start_tokens(self) -> int:
        """Tokens of the training of a start that is trained here."""
        given = self.config.prune.init_data
        return 0 if given is None else parse_tokens(given, params=self.student_target, key="prune.init_data")

    @property
    def objective(self) -> dict[str, Any]:
        """What the losses are over, where that is not every token: then, and only then, it is recorded."""
        return {"objective": "prefix_lm"} if len(architecture(self.teacher_shape).stacks) == 2 else {}

    @property
    def _adapted(self) -> dict[str, Any]:
        """How the teacher was expanded and adapted, if it was."""
        expanded = {} if self.family is self.base else {"expanded_vocab": dims(self.teacher_shape).vocab}
        return expanded | ({"adapt_tokens": self.adapt_tokens} if self.adapt_tokens else {})

    @property
    def _tuned(self) -> dict[str, Any]:
        """How many rows the student was tuned on after distillation, if it was."""
        tune, pairs = self.config.instruct, self.config.prefer
        rows = {"instruct_rows": tune.count or max(0, rows_in(tune.path) - tune.held_out)} if tune.wanted else {}
        return rows | ({"prefer_rows": pairs.count or rows_in(pairs.path)} if pairs.wanted else {})

    @property
    def _texts(self) -> dict[str, Any]:
        """Non-default settings that have no column."""
        readers = _readers(self.family, self.start_shape)
        said = settings_text(
            self.config,
            usual=usual(self.config, self.student_target, family=self.family.name, shapes=readers),
            pretrained=self.teacher_tokens is not None,
            architecture=architecture_identity(self.teacher_shape),
            offset=self.data_offset,
        )
        found = {"settings": said, "instruct_settings": tuning_text(self.config)}
        return {name: text for name, text in found.items() if text}

    @property
    def how_trained(self) -> dict[str, Any]:
        """How a training stage is run, which changes nothing in its identity."""
        return {
            n: getattr(self.config.train, n) for n in ("micro_batch_size", "activation_checkpointing", "peak_flops")
        }

    @property
    def compiled(self) -> dict[str, Any]:
        """Compiled kernels round otherwise."""
        return {"compile": True} if self.config.train.compile else {}

    @property
    def dynamics(self) -> dict[str, Any]:
        """Tokens between the held-out losses that a student's history holds."""
        every = parse_scale(self.config.train.evaluate_every, key="train.evaluate_every", allow_zero=True)
        return {"evaluate_every": every} if every else {}

    @property
    def arithmetic(self) -> dict[str, Any]:
        """What decides the last bits of every computed number."""
        c = self.config
        return {
            "precision": c.train.precision,
            "threads": c.train.threads,
            "sequence_length": self.sequence_length,
        }


def _readers(ladder: Family, start: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """The models that may read a sequence: of the whole ladder, so that its length is the same under every teacher."""
    return (*ladder.rungs.values(), *([] if start is None else [start]))


def _resolved(value: int | None) -> int:
    """A setting that the recipe has filled in."""
    assert value is not None
    return value


def teacher_tokens(config: RunConfig, params: int) -> int:
    """Tokens of a teacher's pre-training: one number for all, or so many times its parameters."""
    return parse_tokens(config.family.teacher_data, params=params, key="family.teacher_data")
