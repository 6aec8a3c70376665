"""Decisions from a loss surface: which teacher, how to spend a budget, and whether to distil at all.

FLOPs as in `models/accounting.py`: 6·N·D for training, 2·N·D for a forward pass, N as the surface counts it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from capacity_gap.estimators.batched import Array
from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.surfaces.surface import SurfaceFit

FLAT_NATS = 0.005  # differences below this are too small to matter
LEVEL = 0.05  # of the permutation null
TAILS = (0.025, 0.975)
POINTS = 401  # of the search over teachers
WIDEST = 1000.0  # teacher over student, where no data bound the search
TOKENS_PER_PARAM = (0.1, 1e4)  # of a teacher, where they are chosen
TEACHER_COSTS = ("none", "forward", "training")

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Teachers:
    """How teachers come to be: trained on `tokens` tokens each, or on `tokens_per_param` for each parameter.

    `law` is the surface L_T(N_T, D_T) of models trained on text; the distillation law needs it, since it
    describes a teacher by its loss alone.
    """

    law: SurfaceFit | None = None
    tokens: float | None = None
    tokens_per_param: float = 20.0

    def trained_on(self, teacher_params: Array) -> Array:
        """D_T of each teacher."""
        if self.tokens is not None:
            return np.full_like(teacher_params, self.tokens)
        return self.tokens_per_param * teacher_params

    def inputs(self, surface: SurfaceFit, teacher_params: Array, teacher_tokens: Array) -> dict[str, Array]:
        """The teacher as the surface sees it: by its parameters or by its loss."""
        if surface.form != "distillation":
            return {"teacher_params": teacher_params}
        if self.law is None:
            raise ConfigError(
                "the distillation law describes a teacher by its loss: pass teachers=Teachers(law=…), the surface of "
                "the teachers themselves (fit_surface(teachers_of(records), 'supervised'))."
            )
        return {"teacher_loss": self.law.predict(student_params=teacher_params, data_tokens=teacher_tokens)}


@dataclass(frozen=True)
class TeacherChoice:
    """The best teacher of one student at one data scale. Statuses and open intervals as in `Optimum`.

    `loss` is that of the best teacher in the range searched; `extrapolated` names what is outside the fitted runs.
    """

    student_params: float
    data_tokens: float
    status: str
    teacher_params: float | None
    interval: Interval
    flat_interval: tuple[float, float]
    loss: float
    extrapolated: tuple[str, ...]

    @property
    def ratio(self) -> float | None:
        """Teacher over student."""
        return None if self.teacher_params is None else self.teacher_params / self.student_params


def _needs_teacher(surface: SurfaceFit) -> None:
    choose("form", surface.form, ("additive", "additive_free", "distillation"))


def searched(surface: SurfaceFit, student_params: float) -> tuple[float, float]:
    """The range of teachers that the data cover: the tested ratios, or 1 to 1,000 times the student."""
    low, high = surface.span.get("ratio", (1.0, WIDEST))
    return low * student_params, high * student_params


def best_teacher(
    surface: SurfaceFit,
    *,
    student_params: float,
    data_tokens: float,
    teachers: Teachers | None = None,
    teacher_range: tuple[float, float] | None = None,
) -> TeacherChoice:
    """The teacher under which a surface predicts the least loss, with its interval from the bootstraps.

    `interior` needs an optimum whose 95 % interval is inside the range searched, on a surface whose teachers beat
    permuted teachers; else the status is an edge, or `flat`.

    Args:
        surface: additive or distillation.
        student_params: N_S.
        data_tokens: D_S.
        teachers: how they were trained; needed by the distillation law.
        teacher_range: where to search, by default `searched`.
    """
    _needs_teacher(surface)
    ends = teacher_range or searched(surface, student_params)
    grid = np.geomspace(*ends, POINTS)
    inputs = _at(surface, teachers or Teachers(), student_params, data_tokens, grid)
    loss = surface.predict(**inputs)
    best = _vertex(np.log(grid), loss[None])[0]
    drawn = _vertex(np.log(grid), surface.predict_draws(**inputs)) if surface.draws else np.array([best])
    low, high = np.quantile(drawn, TAILS)
    status = _status(surface, grid, loss, best, (low, high))
    near = grid[loss <= loss.min() + FLAT_NATS]
    third = {k: float(v[loss.argmin()]) for k, v in inputs.items()}
    return TeacherChoice(
        student_params=float(student_params),
        data_tokens=float(data_tokens),
        status=status,
        teacher_params=float(np.exp(best)) if status == "interior" else None,
        interval=_open(status, low, high) if surface.draws else (None, None),
        flat_interval=(float(near[0]), float(near[-1])),
        loss=float(loss.min()),
        extrapolated=surface.outside(**third),
    )


def _at(surface: SurfaceFit, teachers: Teachers, student: float, tokens: float, grid: Array) -> dict[str, Array]:
    third = teachers.inputs(surface, grid, teachers.trained_on(grid))
    return {"student_params": np.full_like(grid, student), "data_tokens": np.full_like(grid, tokens), **third}


def _vertex(x: Array, loss: Array) -> Array:
    """Where each row of `loss` [B, K] is least: the grid point, moved to the vertex of the parabola around it."""
    at = loss.argmin(axis=1)
    inner = np.clip(at, 1, len(x) - 2)
    rows = np.arange(len(loss))
    left, middle, right = (loss[rows, inner + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    moved = x[inner] + np.clip(shift, -1, 1) * (x[1] - x[0])
    return np.where(at == inner, moved, x[at])


def _status(surface: SurfaceFit, grid: Array, loss: Array, best: float, interval: tuple[float, float]) -> str:
    if np.ptp(loss) < FLAT_NATS or (surface.null_p is not None and surface.null_p > LEVEL):
        return "flat"
    step = np.log(grid[1] / grid[0])
    left = min(interval[0], best) < np.log(grid[0]) + step
    right = max(interval[1], best) > np.log(grid[-1]) - step
    if left and right:
        return "flat"
    return "left_edge" if left else "right_edge" if right else "interior"


def _open(status: str, low: float, high: float) -> Interval:
    """The interval, without the side on which only the range ended."""
    first, last = float(np.exp(low)), float(np.exp(high))
    sides: dict[str, Interval] = {"interior": (first, last), "left_edge": (None, last), "right_edge": (first, None)}
    return sides.get(status, (None, None))


@dataclass(frozen=True)
class ComputeChoice:
    """How to spend a budget on one student. FLOPs of the student's training, the teacher's forward passes and its own
    training, as far as they were counted; `status` is of the teacher: `interior`, or the edge of the range searched.
    """

    student_params: float
    teacher_params: float
    data_tokens: float
    teacher_tokens: float
    loss: float
    status: str
    student_flops: float
    forward_flops: float
    teacher_flops: float
    extrapolated: tuple[str, ...]


def compute_optimal(
    surface: SurfaceFit,
    *,
    student_params: float,
    flops: float,
    teacher_cost: str = "forward",
    teachers: Teachers | None = None,
    teacher_range: tuple[float, float] | None = None,
) -> ComputeChoice:
    """The teacher and the token budget that give the least loss for `flops`.

    Args:
        surface: additive or distillation.
        student_params: N_S.
        flops: C = 6·N_S·D_S (`teacher_cost="none"`) + 2·N_T·D_S (`"forward"`) + 6·N_T·D_T (`"training"`).
        teacher_cost: which of the teacher's costs count.
        teachers: how they are trained. With `"training"` and the distillation law D_T is chosen too, unless
            `teachers.tokens` says it.
        teacher_range: where to search, by default `searched`.

    Raises:
        ConfigError: no teacher in the range leaves a token for the student.
    """
    _needs_teacher(surface)
    choose("teacher_cost", teacher_cost, TEACHER_COSTS)
    budget = _Budget(surface, student_params, flops, teacher_cost, teachers or Teachers())
    ends = teacher_range or searched(surface, student_params)
    per_param = TOKENS_PER_PARAM if budget.free else (1.0, 1.0)
    (x, y), loss = _zoom(lambda x, y: budget.losses(*budget.split(x, y)), _logs(ends), _logs(per_param))
    if not np.isfinite(loss):
        raise ConfigError(
            f"flops={flops:.3g} is too small for any teacher of {ends[0]:.3g} to {ends[1]:.3g} parameters at "
            f"teacher_cost={teacher_cost}. Raise flops, or include smaller teachers (teacher_range)."
        )
    teacher, trained, tokens = (float(v[0]) for v in budget.split(np.array([x]), np.array([y])))
    return ComputeChoice(
        student_params=float(student_params),
        teacher_params=teacher,
        data_tokens=tokens,
        teacher_tokens=trained,
        loss=float(loss),
        status=_edge(x, *_logs(ends)),
        student_flops=6 * student_params * tokens,
        forward_flops=0.0 if teacher_cost == "none" else 2 * teacher * tokens,
        teacher_flops=6 * teacher * trained if teacher_cost == "training" else 0.0,
        extrapolated=surface.outside(
            **{k: float(v[0]) for k, v in budget.inputs(*(np.array([v]) for v in (teacher, trained, tokens))).items()}
        ),
    )


def _logs(ends: tuple[float, float]) -> tuple[float, float]:
    return float(np.log(ends[0])), float(np.log(ends[1]))


def _edge(x: float, low: float, high: float) -> str:
    """Whether a point is within 1 % of an end of a range."""
    close = 0.01 * (high - low)
    return "left_edge" if x < low + close else "right_edge" if x > high - close else "interior"


@dataclass(frozen=True)
class _Budget:
    """How FLOPs turn into tokens, for many teachers at once."""

    surface: SurfaceFit
    student_params: float
    flops: float
    teacher_cost: str
    teachers: Teachers

    @property
    def free(self) -> bool:
        """Whether the teacher's own tokens are chosen too."""
        return self.teacher_cost == "training" and self.surface.form == "distillation" and self.teachers.tokens is None

    def split(self, log_teacher: Array, log_per_param: Array) -> tuple[Array, Array, Array]:
        """N_T, D_T, and the tokens D_S that are left for the student."""
        teacher = np.exp(log_teacher)
        trained = teacher * np.exp(log_per_param) if self.free else self.teachers.trained_on(teacher)
        paid = 6 * teacher * trained if self.teacher_cost == "training" else np.zeros_like(teacher)
        per_token = 6 * self.student_params + (0.0 if self.teacher_cost == "none" else 2 * teacher)
        return teacher, trained, (self.flops - paid) / per_token

    def inputs(self, teacher: Array, trained: Array, tokens: Array) -> dict[str, Array]:
        """The surface's input columns."""
        third = self.teachers.inputs(self.surface, teacher, np.maximum(trained, 1.0))
        return {"student_params": np.full_like(teacher, self.student_params), "data_tokens": tokens, **third}

    def losses(self, teacher: Array, trained: Array, tokens: Array) -> Array:
        """Predicted losses; infinite where the teacher leaves nothing for the student."""
        left = tokens >= 1
        return np.where(
            left, self.surface.predict(**self.inputs(teacher, trained, np.where(left, tokens, 1.0))), np.inf
        )


def _zoom(
    function: Callable[[Array, Array], Array], first: tuple[float, float], second: tuple[float, float]
) -> tuple[tuple[float, float], float]:
    """The least value over a box: a grid of 81 × 81, then smaller ones around the best point."""
    x, y, value = first[0], second[0], np.inf
    # Grids, not gradients: losses are infinite where the teacher leaves no tokens for the student.
    boxes = [first, second]
    for _ in range(6):
        axes = [np.linspace(*b, 81 if b[1] > b[0] else 1) for b in boxes]
        xs, ys = (m.ravel() for m in np.meshgrid(*axes))
        found = function(xs, ys)
        at = int(found.argmin())
        x, y, value = float(xs[at]), float(ys[at]), float(found[at])
        boxes = [_around(v, b, whole) for v, b, whole in ((x, boxes[0], first), (y, boxes[1], second))]
    return (x, y), value


def _around(at: float, box: tuple[float, float], whole: tuple[float, float]) -> tuple[float, float]:
    half = (box[1] - box[0]) / 10
    return max(whole[0], at - half), min(whole[1], at + half)


@dataclass(frozen=True)
class Comparison:
    """Distilling against direct training of the same student. `gain` = direct − distilled, nats per token.

    `better`: `distil`, `direct`, or `undecided` where the 95 % interval of the gain holds zero. Without bootstraps on
    both sides there is no interval, and the sign decides.
    """

    distilled: float
    direct: float
    gain: float
    gain_interval: tuple[float, float] | None
    better: str
    teacher_params: float
    extrapolated: tuple[str, ...]


def distil_or_direct(
    surface: SurfaceFit,
    direct: SurfaceFit,
    *,
    student_params: float,
    data_tokens: float,
    teachers: Teachers | None = None,
    teacher_range: tuple[float, float] | None = None,
) -> Comparison:
    """Compares at equal tokens: the best teacher in the range against `direct`, the surface of direct training."""
    _needs_teacher(surface)
    grid = np.geomspace(*(teacher_range or searched(surface, student_params)), POINTS)
    inputs = _at(surface, teachers or Teachers(), student_params, data_tokens, grid)
    at = int(surface.predict(**inputs).argmin())
    return _compare(surface, direct, {k: v[at : at + 1] for k, v in inputs.items()}, data_tokens, float(grid[at]))


def distil_or_direct_at_compute(
    surface: SurfaceFit,
    direct: SurfaceFit,
    *,
    student_params: float,
    flops: float,
    teacher_cost: str = "forward",
    teachers: Teachers | None = None,
    teacher_range: tuple[float, float] | None = None,
) -> Comparison:
    """Compares at equal FLOPs: `compute_optimal` against C/(6·N_S) tokens of direct training."""
    best = compute_optimal(
        surface,
        student_params=student_params,
        flops=flops,
        teacher_cost=teacher_cost,
        teachers=teachers,
        teacher_range=teacher_range,
    )
    teacher = np.array([best.teacher_params])
    third = (teachers or Teachers()).inputs(surface, teacher, np.array([best.teacher_tokens]))
    inputs = {"student_params": np.array([student_params]), "data_tokens": np.array([best.data_tokens]), **third}
    return _compare(surface, direct, inputs, flops / (6 * student_params), best.teacher_params)


def _compare(
    surface: SurfaceFit, direct: SurfaceFit, inputs: dict[str, Array], direct_tokens: float, teacher: float
) -> Comparison:
    alone = {"student_params": float(inputs["student_params"][0]), "data_tokens": direct_tokens}
    distilled, plain = float(surface.predict(**inputs)[0]), float(direct.predict(**alone))
    interval = None
    if surface.draws and direct.draws:
        ours, theirs = surface.predict_draws(**inputs)[:, 0], direct.predict_draws(**alone)
        many = min(len(ours), len(theirs))  # the two fits were bootstrapped apart, so any pairing is as good
        low, high = np.quantile(theirs[:many] - ours[:many], TAILS)
        interval = (float(low), float(high))
    outside = {*surface.outside(**{k: float(v[0]) for k, v in inputs.items()}), *direct.outside(**alone)}
    gain = plain - distilled
    return Comparison(distilled, plain, gain, interval, _better(gain, interval), teacher, tuple(sorted(outside)))


def _better(gain: float, interval: tuple[float, float] | None) -> str:
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return "undecided"
    return "distil" if gain > 0 else "direct"
