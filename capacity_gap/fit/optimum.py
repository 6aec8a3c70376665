"""The optimum of one curve, with what the noise allows one to say about it.

A parabola in x = log teacher scale, `ℓ(x) = a + b·x + c·x²`, is fitted to the means over seeds. Its slope at x is
linear in the estimates, so whether ℓ falls or rises at x is a t-test, and the set of all x whose slope cannot be told
from zero is an exact interval for the vertex (Fieller). An optimum is *interior* only if the slope is negative at the
first teacher and positive at the last beyond noise; noise alone rarely manages both.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.fit.frame import BY, Curve, curves

LEAST_TEACHERS = 4  # a parabola through three points leaves nothing to judge it by
FLAT_NATS = 0.005  # differences below this matter to nobody, and are called flat even without noise
NOISE_FLOOR = 1e-6  # nats: what rounding leaves on a noise-free curve

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

    @property
    def ratio(self) -> float | None:
        """Teacher over student."""
        return None if self.teacher_params is None else self.teacher_params / self.student_params

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Parabola:
    """`ℓ(x) = β₀ + β₁u + β₂u²` with u = x − `centre`; `unit` is (XᵀWX)⁻¹, W the replicates of each point."""

    centre: float
    beta: np.ndarray
    unit: np.ndarray
    residual: float  # weighted sum of squares about the fit
    df: int

    def value(self, x: np.ndarray | float) -> np.ndarray:
        """Fitted loss."""
        u = np.asarray(x) - self.centre
        return self.beta[0] + self.beta[1] * u + self.beta[2] * u * u

    def slope(self, x: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Slope at x and its standard error for unit noise."""
        v = 2.0 * (np.asarray(x) - self.centre)
        variance = self.unit[1, 1] + 2 * v * self.unit[1, 2] + v * v * self.unit[2, 2]
        return self.beta[1] + v * self.beta[2], np.sqrt(variance)

    @property
    def vertex(self) -> float:
        """Where the slope is zero."""
        return self.centre - self.beta[1] / (2 * self.beta[2]) if self.beta[2] else np.inf


def fit_parabola(curve: Curve) -> Parabola:
    """Least squares, each mean weighted by its replicates."""
    centre = float(curve.x.mean())
    u = curve.x - centre
    X = np.stack([np.ones_like(u), u, u * u], axis=1)
    unit = np.linalg.inv(X.T @ (curve.count[:, None] * X))
    beta = unit @ X.T @ (curve.count * curve.loss)
    residual = float(curve.count @ (curve.loss - X @ beta) ** 2)
    return Parabola(centre, beta, unit, residual, len(u) - 3)


def locate_optima(
    frame: pd.DataFrame, *, metric: str | None = None, axis: str = "total", by: Sequence[str] = BY
) -> list[Optimum]:
    """Locates each student's best teacher.

    Args:
        frame: tidy table, one row a run; needs `student_params, teacher_params` and `loss` (or `student_loss`).
        metric: the column to minimise, if another.
        axis: `total` or `non_embedding` parameters.
        by: columns that part curves.

    Returns:
        One optimum a curve. Status `interior`; `left_edge`, `right_edge` (best at the end of the grid, or beyond);
        `flat` (cannot be told from noise); `not_unimodal` (worst in the middle); `too_few` (under four teachers).
    """
    found, _ = curves(frame, metric=metric, axis=axis, by=by)
    return optima_of(found)


def optima_of(found: Sequence[Curve]) -> list[Optimum]:
    """The optimum of each curve; the noise is pooled over all of them."""
    fits = [fit_parabola(c) if len(c.x) >= LEAST_TEACHERS else None for c in found]
    noise = pooled_noise(found, fits)
    return [_optimum(c, f, noise) for c, f in zip(found, fits, strict=True)]


def pooled_noise(found: Sequence[Curve], fits: Sequence[Parabola | None]) -> tuple[float, int]:
    """Variance of one run and its degrees of freedom: the larger of what seeds and the fits' residuals say.

    Residuals hold what seeds cannot show: the luck of a teacher that all runs share, and the form's own misfit.
    """
    seeds, seeds_df = sum(c.within for c in found), sum(c.within_df for c in found)
    rest, rest_df = sum(f.residual for f in fits if f), sum(f.df for f in fits if f)
    options = [(total / df, df) for total, df in ((seeds, seeds_df), (rest, rest_df)) if df > 0]
    return max(options) if options else (np.inf, 1)


def _optimum(curve: Curve, fit: Parabola | None, noise: tuple[float, int]) -> Optimum:
    variance, df = noise
    if fit is None:
        return _make(curve, "too_few", (None, None), (None, None), variance, 0.0)
    t = stats.t.ppf(0.975, df) * np.sqrt(max(variance, NOISE_FLOOR**2))
    ends = (float(curve.x[0]), float(curve.x[-1]))
    status, gain = _status(curve, fit, ends, variance, df, t)
    interval = _interval(fit, t, ends, status)
    return _make(curve, status, interval, _flat(fit, ends), variance, gain, fit.vertex)


def _status(
    curve: Curve, fit: Parabola, ends: tuple[float, float], variance: float, df: int, t: float
) -> tuple[str, float]:
    """What the slopes at both ends say, beyond noise."""
    grid = np.linspace(*ends, 201)
    values = fit.value(grid)
    gain = float(values.max() - values.min())
    if gain < FLAT_NATS and variance < FLAT_NATS**2 / 25:
        return "flat", gain
    explained = float(curve.count @ (fit.value(curve.x) - np.average(curve.loss, weights=curve.count)) ** 2)
    if stats.f.sf(explained / 2 / max(variance, NOISE_FLOOR**2), 2, df) > 0.05:
        return "flat", gain
    (left, left_se), (right, right_se) = fit.slope(ends[0]), fit.slope(ends[1])
    falls, rises = left < -t * left_se, right > t * right_se
    if falls and rises:
        return "interior", gain
    if left > t * left_se and right < -t * right_se:
        return "not_unimodal", gain
    if falls or right < -t * right_se:
        return "right_edge", gain
    if rises or left > t * left_se:
        return "left_edge", gain
    return "flat", gain


def _interval(fit: Parabola, t: float, ends: tuple[float, float], status: str) -> Interval:
    """The x whose slope cannot be told from zero; open on the side where the grid ends first."""
    if status in ("flat", "not_unimodal"):
        return None, None
    grid = np.linspace(*ends, 2001)
    slope, error = fit.slope(grid)
    undecided = grid[np.abs(slope) <= t * error]
    if status == "interior":
        first, last = (undecided[0], undecided[-1]) if len(undecided) else (fit.vertex, fit.vertex)
        return _scale(first), _scale(last)
    if status == "right_edge":
        return _scale(undecided[0] if len(undecided) else ends[1]), None
    return None, _scale(undecided[-1] if len(undecided) else ends[0])


def _flat(fit: Parabola, ends: tuple[float, float]) -> Interval:
    grid = np.linspace(*ends, 2001)
    values = fit.value(grid)
    near = grid[values <= values.min() + FLAT_NATS]
    return _scale(near[0]), _scale(near[-1])


def _scale(x: float) -> float:
    return float(np.exp(x))


def _make(
    curve: Curve, status: str, interval: Interval, flat: Interval, variance: float, gain: float, vertex: float = np.nan
) -> Optimum:
    tokens, family, init = (curve.key.get(k) for k in ("data_tokens", "family", "init"))
    return Optimum(
        student_params=curve.student_params,
        teacher_params=_scale(vertex) if status == "interior" else None,
        interval=interval,
        flat_interval=flat,
        status=status,
        family=None if family is None else str(family),
        data_tokens=None if tokens is None else int(tokens),  # type: ignore[call-overload]
        student=str(curve.key["student"]),
        init=None if init is None else str(init),
        teachers=len(curve.x),
        noise=float(np.sqrt(variance)) if np.isfinite(variance) else 0.0,
        gain=gain,
    )
