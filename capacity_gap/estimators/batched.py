"""Many small robust fits at once: every start, bootstrap and permutation is one row of one array.

Problem k minimises, within bounds, F_k(θ) = Σᵢ wₖᵢ·H_δ(rᵢ)/δ with r = log L̂(θ) − log L and Huber's H_δ (½r² up to δ,
δ|r| − ½δ² beyond). Dividing by δ makes F a sum of absolute relative errors, whatever δ is. A bootstrap is nothing but
another row of weights, so the data are stored once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Columns = Mapping[str, Array]  # each [n], or [B, n] where problems see different values
Model = Callable[[Array, Columns, bool], tuple[Array, Array | None]]  # θ [B,p] → L [B,n], ∂L/∂θ [B,p,n]

POINTS_AT_ONCE = 25_000  # problems × runs in one block; measured best of 6,000 to 100,000
DAMPING = (1e-9, 1e12)
LEAST_SHIFT = 1e-3  # of the curvature's diagonal, at damping 1


@dataclass(frozen=True)
class Minima:
    """What was found: `theta` [B, p], `value` [B] (F at it), `steps` [B] tried, `converged` [B]."""

    theta: Array
    value: Array
    steps: Array
    converged: Array


@dataclass(frozen=True)
class Problem:
    """One set of runs and the form that should pass through it.

    `target` is log L [n]; `lower`, `upper` [p] may hold infinities; `free` [p] says which parameters move at all.
    """

    model: Model
    columns: Columns
    target: Array
    lower: Array
    upper: Array
    free: Array
    delta: float

    def value(self, theta: Array, weights: Array, columns: Columns) -> tuple[Array, Array, Array]:
        """F [B], residuals [B, n], and ∂log L̂/∂θ [B, p, n]."""
        loss, slopes = self.model(theta, columns, True)
        assert slopes is not None
        slopes /= loss[:, None, :]
        residual = np.log(loss) - self.target
        return huber(residual, weights, self.delta), residual, slopes


def huber(residual: Array, weights: Array, delta: float) -> Array:
    """F [B] = Σᵢ wᵢ·H_δ(rᵢ)/δ; infinite where a residual is not a number."""
    size = np.abs(residual)
    # Both branches of H_δ in one expression: m·(|r| − ½m) with m = min(|r|, δ).
    inside = np.minimum(size, delta)
    total = np.einsum("bn,bn->b", weights, inside * (size - 0.5 * inside)) / delta
    return np.where(np.isfinite(total), total, np.inf)


def minimise(
    problem: Problem, start: Array, weights: Array, *, tolerance: float = 1e-9, most_steps: int = 300
) -> Minima:
    """Minimises every problem from its own start.

    Args:
        problem: what all have in common.
        start: θ [B, p].
        weights: of the runs, [B, n], or [n] if the same for all.
        tolerance: a problem ends when an accepted step lowers F by less than this part of max(F, 1).
        most_steps: of one problem; one that takes them all has not converged.
    """
    size, (count, _) = len(problem.target), start.shape
    weights = np.broadcast_to(weights, (count, size))
    block = max(1, POINTS_AT_ONCE // size)
    parts = []
    for first in range(0, count, block):
        rows = slice(first, first + block)
        columns = {k: c[rows] if c.ndim == 2 else c for k, c in problem.columns.items()}
        parts.append(_minimise_block(problem, start[rows], weights[rows], columns, tolerance, most_steps))
    return Minima(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _minimise_block(
    problem: Problem, start: Array, weights: Array, columns: Columns, tolerance: float, most_steps: int
) -> tuple[Array, Array, Array, Array]:
    """Levenberg–Marquardt with one damping number μ a problem; problems leave the block as they converge."""
    state = _State(problem, np.clip(start, problem.lower, problem.upper), weights, columns)
    count = len(start)
    found = (state.theta.copy(), np.full(count, np.inf), np.zeros(count, int), np.zeros(count, bool))
    where = np.arange(count)
    for step in range(1, most_steps + 1):
        done = state.advance(tolerance)
        leaving = done | (step == most_steps)
        if leaving.any():
            out = where[leaving]
            found[0][out], found[1][out] = state.theta[leaving], state.f[leaving]
            found[2][out], found[3][out] = step, done[leaving]
            where = where[~leaving]
            if not len(where):
                break
            state.keep(~leaving)
    return found


class _State:
    """The problems of one block that have not converged yet."""

    def __init__(self, problem: Problem, theta: Array, weights: Array, columns: Columns):
        self.problem, self.theta, self.weights, self.columns = problem, theta, weights, dict(columns)
        self.mu = np.ones(len(theta))
        with np.errstate(all="ignore"):
            self.f, self.residual, self.slopes = problem.value(theta, weights, self.columns)

    def keep(self, rows: Array) -> None:
        """Drops the other problems."""
        for name in ("theta", "weights", "mu", "f", "residual", "slopes"):
            setattr(self, name, getattr(self, name)[rows])
        self.columns = {k: c[rows] if c.ndim == 2 else c for k, c in self.columns.items()}

    def advance(self, tolerance: float) -> Array:
        """One step of every problem; returns which have converged."""
        p = self.problem
        with np.errstate(all="ignore"):
            gradient, hessian = self._model()
            trial = np.clip(self.theta + self._step(gradient, hessian), p.lower, p.upper)
            f, residual, slopes = p.value(trial, self.weights, self.columns)
            step = trial - self.theta
            predicted = -np.einsum("bp,bp->b", gradient, step) - 0.5 * np.einsum("bp,bpq,bq->b", step, hessian, step)
            fall = self.f - f
            good = np.isfinite(f) & (fall > 0)
            trust = np.where(good, fall / np.maximum(predicted, 1e-300), 0.0)
        small = tolerance * np.maximum(self.f, 1.0)
        # Done: a step with little damping gained nothing, the predicted fall is negligible, or damping is at its limit.
        nothing = ~good & (np.abs(predicted) <= small)
        done = (good & (fall <= small) & (self.mu <= 10)) | nothing | (self.mu >= DAMPING[1])
        self.theta = np.where(good[:, None], trial, self.theta)
        self.f = np.where(good, f, self.f)
        if good.all():
            self.residual, self.slopes = residual, slopes
        else:
            self.residual[good], self.slopes[good] = residual[good], slopes[good]
        # With factors of 10 every other step was rejected (docs/decisions.md).
        grown = np.where(trust > 0.75, self.mu / 3, np.where(trust > 0.25, self.mu, self.mu * 2))
        self.mu = np.clip(np.where(good, grown, self.mu * 4), *DAMPING)
        return done

    def _model(self) -> tuple[Array, Array]:
        """Gradient [B, p] and curvature [B, p, p] of F.

        Runs within δ count fully. Those beyond, where H is linear, count with κ·δ/|r|: κ = 1 is iterative reweighting,
        which majorises F and so is safe; κ → 0 is Newton's step, which is fast at the end. κ is the damping, up to 1.
        """
        delta = self.problem.delta
        size = np.abs(self.residual)
        pull = np.clip(self.residual, -delta, delta) * (self.weights / delta)
        outside = np.minimum(self.mu, 1.0)[:, None] * (delta / np.maximum(size, delta))
        curve = np.where(size <= delta, 1.0, outside) * (self.weights / delta)
        gradient = np.matmul(self.slopes, pull[:, :, None])[:, :, 0]
        return gradient, np.matmul(self.slopes * curve[:, None, :], self.slopes.transpose(0, 2, 1))

    def _step(self, gradient: Array, hessian: Array) -> Array:
        """(C + μ·diag C)·s = −g over the parameters that may move: free, and not held at a bound by the gradient.

        Where that leads across bounds, what crosses stops at its bound and the others are solved for anew.
        """
        p = self.problem
        pinned = ((self.theta <= p.lower) & (gradient > 0)) | ((self.theta >= p.upper) & (gradient < 0)) | ~p.free
        step = _solve(hessian, -gradient, ~pinned, self.mu)
        stop = np.clip(self.theta + step, p.lower, p.upper) - self.theta
        # With clipping alone a third of the fits crept along their bounds (docs/decisions.md).
        crossing = (stop != step) & ~pinned & (np.abs(stop - step) > 1e-12)
        rows = np.flatnonzero(crossing.any(axis=1))
        if len(rows):
            fixed = np.where(crossing[rows], stop[rows], 0.0)
            right = -gradient[rows] - np.einsum("bpq,bq->bp", hessian[rows], fixed)
            step[rows] = fixed + _solve(hessian[rows], right, ~pinned[rows] & ~crossing[rows], self.mu[rows])
        return step


def _solve(hessian: Array, right: Array, moving: Array, mu: Array) -> Array:
    """Damped steps [B, p]; zero where a parameter does not move, or the system is not finite."""
    index = np.arange(hessian.shape[1])
    diagonal = hessian[:, index, index]
    # A parameter without curvature, such as the exponent of a vanished term, must not make the matrix singular.
    floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    matrix = np.where(moving[:, :, None] & moving[:, None, :], hessian, 0.0)
    matrix[:, index, index] += np.where(moving, LEAST_SHIFT * mu[:, None] * diagonal + floor, 1.0)
    right = np.where(moving, right, 0.0)
    bad = ~(np.isfinite(matrix).all(axis=(1, 2)) & np.isfinite(right).all(axis=1))
    matrix[bad], right[bad] = np.eye(len(index)), 0.0
    return np.linalg.solve(matrix, right[:, :, None])[:, :, 0]
