"""The optimum of each curve, and whether it can be told from noise.

Every curve is fitted by the form of `valley.py`; the whole chain is then repeated on bootstrap draws whose errors have
the components of `noise.py`, shared teachers included. An optimum is *interior* only if the slope is negative at the
first teacher and positive at the last in 97.5 % of the draws each; noise alone rarely manages both.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.fit.frame import Curve, curves
from capacity_gap.fit.noise import Noise, components
from capacity_gap.fit.sizes import size_draws
from capacity_gap.fit.valley import LEAST_TEACHERS, METHODS, SHAPES, Design, Grid, Valley, near_the_best
from capacity_gap.records.columns import BY
from capacity_gap.wording.curve_words import curve_names

FLAT_NATS = 0.005  # differences below this are too small to matter: flat even without noise
BOOTSTRAPS = 1000
SURE = 0.975  # share of the draws that must agree on the sign of a slope

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Optimum:
    """The best teacher of one student.

    `teacher_params` is None unless the status is `interior`; `interval` (95 %) is open (None) where only a bound is
    known; `flat_interval` is where the fitted loss is within `FLAT_NATS` of its minimum on the grid.
    """

    student_params: float
    teacher_params: float | None
    interval: Interval
    flat_interval: Interval
    status: str
    family: str | None
    data_tokens: int | None
    student: str
    init: str | None
    teachers: int
    noise: float  # standard deviation of one run's loss, nats
    gain: float  # fitted loss at the worse end less the fitted minimum, nats
    curve: str = ""  # what tells it from the others: 60k at 300k tokens, init random
    tried: tuple[tuple[float, float, int], ...] = ()  # parameters, mean loss and runs of each teacher, smallest first
    falls: float | None = None  # share of draws whose slope is negative at the first teacher
    rises: float | None = None  # and of those whose slope is positive at the last one

    @property
    def ratio(self) -> float | None:
        """Teacher over student."""
        return None if self.teacher_params is None else self.teacher_params / self.student_params

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Located:
    """All curves of a table, fitted together, with the draws of the whole chain.

    `best` [C] and `best_draws` [B, C]: log teacher scale where the fitted loss is least within the grid.
    """

    found: tuple[Curve, ...]
    design: Design
    noise: Noise
    shape: int
    beta: np.ndarray  # [C, 3]
    best: np.ndarray
    best_draws: np.ndarray
    falls: np.ndarray  # [C] share of draws whose slope is negative at the first teacher
    rises: np.ndarray  # [C] share of draws whose slope is positive at the last teacher
    method: str

    @property
    def kappa(self) -> float:
        """The shape: 0 for a parabola, positive where curves rise more steeply to the right of their minimum."""
        return float(self.design.kappas[self.shape])

    def valley(self, index: int) -> Valley | None:
        """The fit of one curve, None if it has too few teachers."""
        if len(self.found[index].x) < LEAST_TEACHERS:
            return None
        return Valley(self.beta[index], float(self.design.grid.centre[index]), self.kappa)

    @cached_property
    def optima(self) -> tuple[Optimum, ...]:
        """One optimum a curve."""
        names = curve_names([curve.key for curve in self.found])
        return tuple(replace(_optimum(self, i), curve=name) for i, name in enumerate(names))

    def residuals(self) -> pd.DataFrame:
        """One row a mean: the measured value, the fitted value, and the standard error."""
        fitted, error = self.design.fitted(self.beta, self.shape), np.sqrt(self.noise.variance)
        rows = []
        for i, curve in enumerate(self.found):
            for k, teacher in enumerate(curve.teacher_params):
                row = {**curve.key, "student_params": curve.student_params, "teacher_params": teacher}
                row |= {"loss_mean": curve.loss[k], "runs": int(curve.count[k]), "stderr": error[i, k]}
                rows.append(row | {"fitted": fitted[i, k] if self.valley(i) else None})
        return pd.DataFrame(rows)


def locate_optima(
    frame: pd.DataFrame,
    *,
    metric: str | None = None,
    axis: str = "total",
    by: Sequence[str] = BY,
    method: str = "asymmetric",
) -> list[Optimum]:
    """Locates each student's best teacher.

    Args:
        frame: tidy table, one row a run; needs `student_params, teacher_params` and `loss` (or `student_loss`).
        metric: the column to minimise, if another.
        axis: `total` or `non_embedding` parameters.
        by: columns that part curves, where they are there.
        method: `asymmetric` (a warped parabola, its asymmetry chosen by leaving teachers out), `quadratic`, `local` (a
            quadratic weighted towards the minimum), `argmin` (the best teacher that was tried: the paper's).

    Returns:
        One optimum a curve. Status `interior`; `left_edge`, `right_edge` (best at the end of the grid, or beyond);
        `flat` (cannot be told from noise); `not_unimodal` (worst in the middle); `too_few` (under four teachers).
    """
    found, notes = curves(frame, metric=metric, axis=axis, by=by)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return list(locate(found, method=method).optima)


def locate(
    found: Sequence[Curve], *, method: str = "asymmetric", bootstraps: int = BOOTSTRAPS, seed: int = 0
) -> Located:
    """Fits all curves together, and repeats the fit on `bootstraps` draws.

    Raises:
        ValueError: an unknown method, or no curve at all.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known. Allowed: {', '.join(METHODS)}.")
    if not found:
        raise ValueError("no curve to fit: the table has no usable row.")
    design, noise, shape = _fit(found, SHAPES if method == "asymmetric" else (0.0,))
    loss = design.grid.loss[None]
    if method == "local":
        at = design.best(design.coefficients(loss, np.array([shape])), np.array([shape]))[0]
        design = Design.of(design.grid, near_the_best(design.grid, design.weight, at), (0.0,))
    beta = design.coefficients(loss, np.array([shape]))
    generator = np.random.default_rng(seed)
    drawn = design.fitted(beta[0], shape) + noise.draws(design, bootstraps, generator)
    drawn += size_draws(found, drawn.shape, generator)
    shapes = design.shape_of(drawn)
    betas = design.coefficients(drawn, shapes)
    best, draws = design.best(beta, np.array([shape]))[0], design.best(betas, shapes)
    if method == "argmin":
        # Draws about the measured means, since the misfit of a form must not move the best tried teacher.
        best, draws = _argmin(design.grid, loss)[0], _argmin(design.grid, drawn - design.fitted(beta[0], shape) + loss)
    left, right = design.slopes(betas, shapes)
    falls, rises = (left < 0).mean(0), (right > 0).mean(0)
    return Located(tuple(found), design, noise, shape, beta[0], best, draws, falls, rises, method)


def _fit(found: Sequence[Curve], shapes: Sequence[float]) -> tuple[Design, Noise, int]:
    """Design, noise and shape: once with weights by replicates, then with weights by the variances so found."""
    grid = Grid.of(found)
    design = Design.of(grid, grid.count, shapes)
    shape = int(design.shape_of(grid.loss[None])[0])
    noise = components(design, shape, found)
    design = Design.of(grid, 1 / noise.variance, shapes)
    shape = int(design.shape_of(grid.loss[None])[0])
    return design, components(design, shape, found), shape


def _argmin(grid: Grid, loss: np.ndarray) -> np.ndarray:
    """The best teacher that was tried [B, C]."""
    at = np.where(grid.count > 0, loss, np.inf).argmin(-1)
    return np.take_along_axis(np.broadcast_to(grid.x, loss.shape), at[..., None], -1)[..., 0]


def _optimum(located: Located, i: int) -> Optimum:
    curve, valley = located.found[i], located.valley(i)
    if valley is None:
        return _make(located, i, "too_few", (None, None), (None, None), 0.0)
    grid = np.linspace(curve.x[0], curve.x[-1], 1001)
    values = valley.value(grid)
    near = grid[values <= values.min() + FLAT_NATS]
    gain = float(values.max() - values.min())
    status = _status(located, i, gain)
    flat = (_scale(near[0]), _scale(near[-1]))
    return _make(located, i, status, _interval(located, i, status), flat, gain)


def _status(located: Located, i: int, gain: float) -> str:
    """What the slopes at both ends say, beyond noise."""
    noise, curve = located.noise, located.found[i]
    used = slice(0, len(curve.x))
    weight = 1 / noise.variance[i, used]
    # Only where a standard error is below a fifth of FLAT_NATS: with more noise, the F test decides.
    if gain < FLAT_NATS and 1 / weight.max() < FLAT_NATS**2 / 25:
        return "flat"
    fitted = located.design.fitted(located.beta, located.shape)[i, used]
    explained = float(weight @ (fitted - np.average(fitted, weights=weight)) ** 2)
    # Two degrees of freedom, slope and bend: the mean is free.
    if stats.f.sf(explained / 2, 2, noise.df) > 0.05:
        return "flat"
    falls, rises = located.falls[i], located.rises[i]
    if falls >= SURE and rises >= SURE:
        return _tried_end(located, i) or "interior"
    if falls <= 1 - SURE and rises <= 1 - SURE:
        return "not_unimodal"
    if falls >= SURE or rises <= 1 - SURE:
        return "right_edge"
    return "left_edge" if rises >= SURE or falls <= 1 - SURE else "flat"


def _tried_end(located: Located, i: int) -> str | None:
    """Of `argmin` alone: the edge, if the best teacher that was tried is the first or the last."""
    if located.method != "argmin":
        return None
    x = located.found[i].x
    return {float(x[0]): "left_edge", float(x[-1]): "right_edge"}.get(float(located.best[i]))


def _interval(located: Located, i: int, status: str) -> Interval:
    """The middle 95 % of the draws; open on the side where the grid ends first.

    The best teacher that was tried stands for all between its neighbours, so `argmin` reaches to these.
    """
    if status in ("flat", "not_unimodal"):
        return None, None
    low, high = np.quantile(located.best_draws[:, i], [0.025, 0.975])
    if located.method == "argmin":
        x = located.found[i].x
        low = x[max(0, np.searchsorted(x, low - 1e-9) - 1)]
        high = x[min(len(x) - 1, np.searchsorted(x, high + 1e-9))]
    low, high = _scale(low), _scale(high)
    return (None if status == "left_edge" else low), (None if status == "right_edge" else high)


def _scale(x: float) -> float:
    return float(np.exp(x))


def _make(located: Located, i: int, status: str, interval: Interval, flat: Interval, gain: float) -> Optimum:
    curve = located.found[i]
    tokens, family, init = (curve.key.get(k) for k in ("data_tokens", "family", "init"))
    return Optimum(
        student_params=curve.student_params,
        teacher_params=_scale(located.best[i]) if status == "interior" else None,
        interval=interval,
        flat_interval=flat,
        status=status,
        family=None if family is None else str(family),
        data_tokens=None if tokens is None else int(tokens),  # type: ignore[call-overload]
        student=str(curve.key["student"]),
        init=None if init is None else str(init),
        teachers=len(curve.x),
        noise=located.noise.run,
        gain=gain,
        tried=tuple(zip(curve.teacher_params.tolist(), curve.loss.tolist(), map(int, curve.count), strict=True)),
        falls=None if status == "too_few" else float(located.falls[i]),
        rises=None if status == "too_few" else float(located.rises[i]),
    )
