"""The form of a curve: a parabola in a warped log teacher scale, fitted to many curves and many draws at once.

    ℓ(x) = β₀ + β₁·w(x) + β₂·w(x)²,   w(x) = (e^{κ(x−c)} − 1)/κ,   x = log teacher scale

κ = 0 is the parabola; κ > 0 rises more steeply to the right of the minimum, κ < 0 to its left. A parabola through an
asymmetric curve finds a biased minimum; κ, one number for all curves of a table, takes the bias out at the cost of one
parameter. For a given κ everything is linear in the losses, so a thousand bootstraps are a matrix product. The centre c
is a matter of units only: w for another c is an affine function of w.

Shape suffixes: B draws, C curves, K teachers (padded: weight 0 where a curve has fewer), Q shapes κ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from capacity_gap.fit.frame import Curve

LEAST_TEACHERS = 4  # three parameters through three points leave nothing to judge them by
# κ times half the median span of the curves: at ±2 one end of the grid is stretched fifty times more than the other.
SHAPES = tuple(np.linspace(-2, 2, 65))
CLEAR = 0.0005  # level at which the gain of an asymmetric shape must be significant
METHODS = ("asymmetric", "quadratic", "local", "argmin")
CLOSE = 0.6  # `local`: the tricube window's half-width, as a share of the curve's span


@dataclass(frozen=True)
class Grid:
    """Curves as padded arrays [C, K]: x, loss, count (0 where there is no teacher) and cluster numbers."""

    x: np.ndarray
    loss: np.ndarray
    count: np.ndarray
    cluster: np.ndarray
    first: np.ndarray  # [C] smallest x
    last: np.ndarray  # [C] largest x

    @classmethod
    def of(cls, found: Sequence[Curve]) -> "Grid":
        """Pads curves to one length; the pads repeat the last teacher, with no weight."""
        width = max(len(c.x) for c in found)
        names = sorted({name for c in found for name in _names(c)})
        number = {name: i for i, name in enumerate(names)}

        places = np.minimum(np.arange(width), np.array([len(c.x) for c in found])[:, None] - 1)
        starts = np.cumsum([0, *(len(c.x) for c in found[:-1])])[:, None]

        def padded(values: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate(values)[starts + places]

        return cls(
            x=padded([c.x for c in found]),
            loss=padded([c.loss for c in found]),
            count=padded([c.count for c in found]) * (places == np.arange(width)),
            cluster=padded([np.array([number[n] for n in _names(c)]) for c in found]),
            first=np.array([c.x[0] for c in found]),
            last=np.array([c.x[-1] for c in found]),
        )

    @property
    def centre(self) -> np.ndarray:
        """Middle of each curve's span [C]."""
        return (self.first + self.last) / 2

    @property
    def teachers(self) -> np.ndarray:
        """How many each curve has [C]."""
        return (self.count > 0).sum(1)

    @property
    def scale(self) -> float:
        """Half the median span: what the shapes κ are measured by."""
        long = self.teachers >= LEAST_TEACHERS
        return float(np.median((self.last - self.first)[long if long.any() else slice(None)])) / 2 or 1.0


def _names(curve: Curve) -> Sequence[str]:
    return curve.clusters or [repr(float(n)) for n in curve.teacher_params]


def warp(x: np.ndarray, centre: np.ndarray | float, kappa: np.ndarray | float) -> np.ndarray:
    """w(x); for κ = 0 simply x − c."""
    u = np.asarray(x) - centre
    safe = np.where(np.asarray(kappa) == 0, 1.0, kappa)
    # expm1, because e^{κu} − 1 loses its digits for small κu.
    return np.where(np.asarray(kappa) == 0, u, np.expm1(safe * u) / safe)


def unwarp(w: np.ndarray, centre: np.ndarray | float, kappa: np.ndarray | float) -> np.ndarray:
    """x(w); values beyond the range of the warp give ∓∞."""
    safe = np.where(np.asarray(kappa) == 0, 1.0, kappa)
    inside = 1 + safe * np.asarray(w)
    bent = np.where(inside > 0, np.log(np.where(inside > 0, inside, 1.0)) / safe, -np.sign(safe) * np.inf)
    return np.where(np.asarray(kappa) == 0, w, bent) + centre


@dataclass(frozen=True)
class Design:
    """The linear maps from losses to coefficients for every shape: `hat` [Q, C, 3, K], residuals `rest` [Q, C, K, K].

    `left` and `right` [Q, C, 3] turn coefficients into the slope dℓ/dw at a curve's ends.
    """

    grid: Grid
    kappas: np.ndarray  # [Q]
    weight: np.ndarray  # [C, K] one over the variance of a mean, up to a factor
    hat: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, grid: Grid, weight: np.ndarray, shapes: Sequence[float] = SHAPES) -> "Design":
        """Least squares for each shape; a curve with too few teachers gets none (zeros)."""
        kappas = np.asarray(shapes) / grid.scale
        w = warp(grid.x, grid.centre[:, None], kappas[:, None, None])  # [Q, C, K]
        X = np.stack([np.ones_like(w), w, w * w], axis=-1)  # [Q, C, K, 3]
        enough = grid.teachers >= LEAST_TEACHERS
        W = np.where(enough[:, None], weight * (grid.count > 0), 0.0)
        normal = np.einsum("qcki,ck,qckj->qcij", X, W, X)
        normal[:, ~enough] = np.eye(3)
        hat = np.linalg.solve(normal, np.einsum("qcki,ck->qcik", X, W))
        rest = np.eye(grid.x.shape[1]) - np.einsum("qcki,qcil->qckl", X, hat)
        return cls(grid, kappas, W, hat, rest * (W > 0)[:, :, None])

    @cached_property
    def held_out(self) -> np.ndarray:
        """Leave-one-teacher-out residuals as a linear map of the losses [Q, C, K, K]: e/(1 − h)."""
        own = np.einsum("qckk->qck", self.rest)
        # 1 − h = 0 where the other teachers do not determine the fit.
        return self.rest / np.maximum(own, 1e-6)[..., None]

    def shape_of(self, loss: np.ndarray) -> np.ndarray:
        """The shape with the least squared error on left-out teachers, all curves together [B], for losses [B, C, K].

        The plain parabola (κ = 0) stays unless another shape predicts clearly better: an asymmetry that cannot be told
        from noise widens the interval of the optimum two- to threefold.
        """
        if len(self.kappas) == 1:
            return np.zeros(len(loss), dtype=int)
        by_curve = loss.transpose(1, 0, 2) * np.ones(())  # [C, B, K], contiguous for the products below
        error = np.stack([self._error(part, by_curve) for part in self.held_out], axis=1)  # [B, Q]
        plain = int(np.flatnonzero(self.kappas == 0)[0])
        used = self.weight > 0
        # Three coefficients a curve, and one κ for all of them.
        df = max(1, int(used.sum()) - 3 * int(used.any(1).sum()) - 1)
        gain = 1 + stats.f.isf(CLEAR, 1, df) / df
        return np.where(error.min(1) * gain < error[:, plain], error.argmin(1), plain)

    def _error(self, part: np.ndarray, by_curve: np.ndarray) -> np.ndarray:
        """Weighted squared error on left-out teachers [B]; `part` [C, K, K], `by_curve` [C, B, K]."""
        left_out = np.matmul(by_curve, (part * np.sqrt(self.weight)[..., None]).transpose(0, 2, 1))
        return np.einsum("cbk,cbk->b", left_out, left_out)

    def coefficients(self, loss: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """β [B, C, 3] of losses [B, C, K], each draw with its own shape [B]."""
        beta = np.empty((*loss.shape[:2], 3))
        for q in np.unique(shape):
            mine = shape == q
            beta[mine] = np.matmul(loss[mine].transpose(1, 0, 2), self.hat[q].transpose(0, 2, 1)).transpose(1, 0, 2)
        return beta

    def fitted(self, beta: np.ndarray, q: int) -> np.ndarray:
        """Fitted means at the teachers [C, K] for coefficients [C, 3]."""
        w = warp(self.grid.x, self.grid.centre[:, None], self.kappas[q])
        return beta[:, :1] + beta[:, 1:2] * w + beta[:, 2:] * w * w

    def ends(self, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """w at the first and the last teacher of each curve, per draw [B, C]."""
        kappa = self.kappas[shape][:, None]
        grid = self.grid
        return warp(grid.first, grid.centre, kappa), warp(grid.last, grid.centre, kappa)

    def slopes(self, beta: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """dℓ/dw at both ends [B, C]: of the same sign as dℓ/dx."""
        low, high = self.ends(shape)
        return beta[..., 1] + 2 * beta[..., 2] * low, beta[..., 1] + 2 * beta[..., 2] * high

    def best(self, beta: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """Where each fitted curve is least within its grid, as log teacher scale [B, C]."""
        low, high = self.ends(shape)
        curved = beta[..., 2] > 0
        vertex = -beta[..., 1] / np.where(curved, 2 * beta[..., 2], 1.0)
        better_end = np.where(_value(beta, low) <= _value(beta, high), low, high)
        w = np.where(curved, np.clip(vertex, low, high), better_end)
        return unwarp(w, self.grid.centre, self.kappas[shape][:, None])


def _value(beta: np.ndarray, w: np.ndarray) -> np.ndarray:
    return beta[..., 0] + beta[..., 1] * w + beta[..., 2] * w * w


@dataclass(frozen=True)
class Valley:
    """One fitted curve: coefficients [3], its centre and shape κ."""

    beta: np.ndarray
    centre: float
    kappa: float

    def value(self, x: np.ndarray | float) -> np.ndarray:
        """Fitted loss at log teacher scale x."""
        return _value(self.beta, warp(np.asarray(x, float), self.centre, self.kappa))


def near_the_best(grid: Grid, weight: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Weights of a local fit: tricube in the distance from `best` [C], never to fewer than four teachers."""
    span = (grid.last - grid.first)[:, None]
    distance = np.abs(grid.x - best[:, None]) + np.where(grid.count > 0, 0, np.inf)
    fourth = np.sort(distance, axis=1)[:, LEAST_TEACHERS - 1 : LEAST_TEACHERS] * 1.5
    width = np.maximum(CLOSE * span, np.where(np.isfinite(fourth), fourth, CLOSE * span))
    return weight * np.clip(1 - (np.where(np.isfinite(distance), distance, width) / width) ** 3, 0, 1) ** 3
