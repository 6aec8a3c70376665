"""Linear mixed models: variance components by REML with weak priors, contrasts with t quantiles. numpy and scipy only.

    y = Xβ + Σ_k Z_k u_k + e,   u_k ~ N(0, σ_k² I),   e ~ N(0, σ_e² diag(w))

The standard deviations maximise the restricted likelihood times `p(σ) ∝ σ^(a−1)·exp(−σ/s)` (Chung et al. 2013, on
priors that keep a mode off zero): a component of which eight rungs say nothing is then not taken to be absent.
Degrees of freedom of a contrast are Satterthwaite's, from the curvature of that function.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import linalg, sparse, stats

SHAPE = 1.3  # of the prior: 1 lets a component be zero, 2 holds it off
SCALE = 2.0  # of the prior, in standard deviations of what the fixed effects leave
SMALLEST = 1e-3  # of the same: the least standard deviation that is tried
LEAST_DF = 2.0


@dataclass(frozen=True)
class Contrast:
    """A linear function of the coefficients: its value, standard error and degrees of freedom."""

    value: float
    error: float
    df: float

    @property
    def t(self) -> float:
        """Value over error."""
        return self.value / self.error if self.error > 0 else np.inf * np.sign(self.value)

    def p_above(self) -> float:
        """One-sided p of the value not being above zero."""
        return float(stats.t.sf(self.t, self.df))

    def p(self) -> float:
        """Two-sided p of the value being zero."""
        return float(2 * stats.t.sf(abs(self.t), self.df))


@dataclass(frozen=True)
class Coefficients:
    """Coefficients [P], their covariance [P, P], and what the degrees of freedom of contrasts need."""

    beta: np.ndarray
    covariance: np.ndarray
    sensitivity: np.ndarray  # [K, P, P] derivative of the covariance by each log standard deviation
    certainty: np.ndarray  # [K, K] covariance of the log standard deviations

    def of(self, part: slice) -> "Coefficients":
        """Some of them."""
        sensitivity = self.sensitivity[:, part, part]
        return Coefficients(self.beta[part], self.covariance[part, part], sensitivity, self.certainty)

    def contrast(self, g: np.ndarray) -> Contrast:
        """Of one vector [P]."""
        values, errors, dfs = self.contrasts(g[None])
        return Contrast(float(values[0]), float(errors[0]), float(dfs[0]))

    def contrasts(self, G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, errors and degrees of freedom of several [m, P]."""
        variance = np.einsum("mp,mp->m", G @ self.covariance, G)
        slopes = np.stack([np.einsum("mp,mp->m", G @ by, G) for by in self.sensitivity], -1)
        of_variance = np.einsum("mk,mk->m", slopes @ self.certainty, slopes)
        df = np.where(of_variance > 0, 2 * variance**2 / np.maximum(of_variance, 1e-300), 1e6)
        return G @ self.beta, np.sqrt(np.maximum(variance, 0)), np.clip(df, LEAST_DF, 1e6)


@dataclass(frozen=True, eq=False)
class Mixed:
    """A fitted model: its coefficients [P], standard deviations and random effects. Covariances are made when asked."""

    beta: np.ndarray
    sds: Mapping[str, float]
    effects: Mapping[str, np.ndarray]  # predicted random effects, by component
    certainty: np.ndarray  # [K, K] covariance of the log standard deviations
    problem: "_Problem"
    scale: float
    state: "_State"

    def of(self, part: slice) -> Coefficients:
        """Some of the coefficients.

        β = A'y: what each component adds to the variance of β is A'V_k A.
        """
        problem, state, places = self.problem, self.state, np.arange(self.problem.P)[part]
        inverse = self._inverse(places)
        A = problem._solved(problem.W @ inverse, state.diagonal, state.shrink)
        added = [problem.W[:, columns].T @ A for columns in problem.columns]
        added += [] if problem.absorbed is None else [problem._sums(A)]
        added.append(A[problem.free])
        each = zip(state.sds, added, strict=True)
        sensitivity = self.scale**2 * np.stack([2 * s**2 * one.T @ one for s, one in each])
        return Coefficients(self.beta[part], self.scale**2 * inverse[places], sensitivity, self.certainty)

    def contrast(self, g: np.ndarray) -> Contrast:
        """Of one vector [P]."""
        return self.of(slice(None)).contrast(g)

    @property
    def size(self) -> int:
        """Coefficients and effects together, in the order of the columns of W."""
        return len(self.state.factor)

    def spread(self, G: np.ndarray) -> np.ndarray:
        """Covariance [m, m] of m linear functions [m, size] of coefficients and of the errors of effects."""
        half = linalg.solve_triangular(self.state.factor, G.T, lower=True, check_finite=False)
        return self.scale**2 * half.T @ half

    def part(self, keep: np.ndarray) -> "Mixed":
        """The same from some of the rows, with the standard deviations of all."""
        sds = np.array(list(self.sds.values())) / self.scale
        return _fitted(sds, self.certainty, self.scale, self.problem.part(keep))

    def _inverse(self, places: np.ndarray) -> np.ndarray:
        """Columns of C⁻¹."""
        wanted = np.zeros((self.size, len(places)))
        wanted[places, np.arange(len(places))] = 1.0
        return linalg.cho_solve((self.state.factor, True), wanted, check_finite=False)


def fit_mixed(
    y: np.ndarray,
    X: np.ndarray,
    groups: Mapping[str, np.ndarray],
    known: np.ndarray | None = None,
    *,
    near: Mapping[str, float] | None = None,
    wanted: Collection[str] = (),
) -> Mixed:
    """Fits by restricted likelihood.

    Args:
        y: [n].
        X: [n, P], of full rank.
        groups: of each random effect its matrix Z [n, m].
        known: variance [n] of rows whose error is known; 0 where it is estimated.
        near: standard deviations to start from.
        wanted: components whose predicted effects are asked for: the largest of the others may be absorbed.
    """
    ols = np.linalg.lstsq(X, y, rcond=None)[0]
    rest = (y - X @ ols)[known == 0] if known is not None else y - X @ ols
    scale = max(float(np.sqrt(rest @ rest / max(1, len(rest) - X.shape[1]))), 1e-9)
    fixed = np.zeros(len(y)) if known is None else known / scale**2
    problem = _Problem.of(groups, fixed, X, y / scale, wanted)
    start = np.full(len(problem.names), 0.4)
    if near:
        start = np.array([near[n] / scale if n in near else s for n, s in zip(problem.names, start, strict=True)])
    phi, certainty = problem.solved(np.clip(np.log(start), LOW + 0.1, HIGH - 0.1))
    return _fitted(np.exp(phi), certainty, scale, problem)


LOW, HIGH = np.log(SMALLEST), np.log(10.0)
STEPS = 60  # of the damped Newton iteration, of which a dozen are usual
CLOSE = 1e-5  # of the gradient
LARGE, FILLED = 100_000, 1 / 8  # a matrix of more entries is sparse where it has a smaller share of them


@dataclass(frozen=True)
class _State:
    """What Henderson's equations give at some standard deviations."""

    value: float
    factor: np.ndarray  # Cholesky's, of C [P + q, P + q]
    solution: np.ndarray  # coefficients and effects [P + q]
    sds: np.ndarray
    shrink: np.ndarray  # [m] of the absorbed component: D⁻¹ = E − Z diag(shrink) Z'
    diagonal: np.ndarray  # [n] of E


@dataclass(frozen=True)
class _Problem:
    """The restricted likelihood as a function of log standard deviations, in units of what fixed effects leave.

    By Henderson's mixed-model equations: with W = [X U], D the covariance of errors and of one component whose groups
    part the rows, C = W'D⁻¹W + diag(0, Θ⁻¹), it is log|D| + log|Θ| + log|C| + y'Py. Only C is dense.
    """

    names: list[str]  # of the components: those in U, the absorbed one if any, the error
    columns: list[slice]  # of each component of U, in W
    W: np.ndarray  # [n, P + q]
    absorbed: np.ndarray | None  # code of each row in the absorbed component; −1 for rows of known error
    fixed: np.ndarray
    y: np.ndarray
    P: int

    @classmethod
    def of(
        cls,
        groups: Mapping[str, np.ndarray],
        fixed: np.ndarray,
        X: np.ndarray,
        y: np.ndarray,
        wanted: Collection[str] = (),
    ) -> "_Problem":
        """Absorbs the component with the most groups among those that part the rows and are not `wanted`."""
        free = fixed == 0
        parts = [n for n, Z in groups.items() if np.isin(Z, (0, 1)).all() and (Z[free].sum(1) == 1).all()]
        parts = [n for n in parts if n not in wanted]
        most = max(parts, key=lambda n: groups[n].shape[1], default=None)
        inside = [n for n in groups if n != most]
        blocks, columns, at = [X], [], X.shape[1]
        for name in inside:
            blocks.append(groups[name])
            columns.append(slice(at, at + groups[name].shape[1]))
            at += groups[name].shape[1]
        codes = None if most is None else np.where(free, groups[most].argmax(1), -1)
        names = [*inside, *([most] if most else []), "error"]
        return cls(names, columns, np.hstack(blocks), codes, fixed, y, X.shape[1])

    def part(self, keep: np.ndarray) -> "_Problem":
        """Some of the rows, and the levels and curves that they have."""
        codes = None if self.absorbed is None else self.absorbed[keep]
        found = _Problem(self.names, self.columns, self.W[keep], codes, self.fixed[keep], self.y[keep], self.P)
        if codes is None or self.absorbed is None or codes.max() == self.absorbed.max():
            found.__dict__["_products"] = self._less(~keep)
        return found

    def _less(self, out: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any, np.ndarray]:
        """`_products` without some of the rows, by taking off theirs: levels count in whole numbers, so exactly."""
        own, known, sums, sizes = self._products
        free = self.W[out & self.free]
        fixed, variances = self.W[out & ~self.free], self.fixed[out & ~self.free]
        own, known = own - free.T @ free, known - (fixed / variances[:, None]).T @ fixed
        if self.absorbed is not None:
            Z = self._indicator[out]
            dense = sums if isinstance(sums, np.ndarray) else sums.toarray()
            sums, sizes = _thin(dense - Z.T @ self.W[out]), sizes - np.asarray(Z.sum(0)).ravel()
        return own, known, sums, sizes

    @property
    def free(self) -> np.ndarray:
        """Which rows have an error to be estimated."""
        return self.fixed == 0

    def _sums(self, A: np.ndarray) -> np.ndarray:
        """Z'A for the absorbed component."""
        return self._indicator.T @ A

    def _solved(self, A: np.ndarray, diagonal: np.ndarray, shrink: np.ndarray) -> np.ndarray:
        """D⁻¹A."""
        found = A * (diagonal if A.ndim == 1 else diagonal[:, None])
        if self.absorbed is not None:
            less = shrink if A.ndim == 1 else shrink[:, None]
            found -= self._indicator @ (less * self._sums(A))
        return found

    @cached_property
    def _indicator(self) -> Any:
        """Z of the absorbed component, sparse [n, m]."""
        assert self.absorbed is not None
        rows = np.flatnonzero(self.free)
        shape = (len(self.y), int(self.absorbed.max()) + 1)
        return sparse.csr_matrix((np.ones(len(rows)), (rows, self.absorbed[rows])), shape=shape)

    @cached_property
    def _products(self) -> tuple[np.ndarray, np.ndarray, Any, np.ndarray]:
        """W'W over the rows with errors, W'W over the others by their variances, Z'W, and rows a group."""
        free, W = self.free, self.W
        known = (W[~free] / self.fixed[~free, None]).T @ W[~free]
        if self.absorbed is None:
            return W[free].T @ W[free], known, np.empty((0, W.shape[1])), np.empty(0)
        return W[free].T @ W[free], known, _thin(self._sums(W)), self._sums(np.ones(len(W)))

    def at(self, phi: np.ndarray) -> _State:
        """Solves the equations. The value is that of −log(likelihood · prior)."""
        sds = np.exp(phi)
        own, known, sums, sizes = self._products
        error = sds[-1] ** 2
        diagonal = 1 / np.where(self.free, error, self.fixed + (self.fixed == 0))
        shrink, log_D = np.empty(0), np.log(error) * self.free.sum()
        C = own / error + known
        if self.absorbed is not None:
            theta = sds[-2] ** 2
            shrink = theta / (error * (error + sizes * theta))
            C = C - _gram(sums, shrink)
            log_D += float(np.log1p(sizes * theta / error).sum())
        log_theta = 0.0
        for s, columns in zip(sds, self.columns, strict=False):
            index = np.arange(columns.start, columns.stop)
            C[index, index] += 1 / s**2
            log_theta += 2 * np.log(s) * len(index)
        # Levels that some rows left out have no row any more.
        empty = np.flatnonzero(np.diag(C) == 0)
        C[empty, empty] = 1.0
        L = linalg.cholesky(C, lower=True, check_finite=False)
        Dy = self._solved(self.y, diagonal, shrink)
        solution = linalg.cho_solve((L, True), self.W.T @ Dy, check_finite=False)
        rest = float(self.y @ Dy - solution @ (self.W.T @ Dy))
        value = 0.5 * (log_D + log_theta + 2 * float(np.log(np.diag(L)).sum()) + rest)
        value += float((sds[:-1] / SCALE - (SHAPE - 1) * phi[:-1]).sum())  # the error has no prior
        return _State(value, L, solution, sds, shrink, diagonal)

    def curved(self, state: _State) -> tuple[np.ndarray, np.ndarray]:
        """Gradient, and curvature by average information (Gilmour, Thompson and Cullis 1995)."""
        sds, W = state.sds, self.W
        inverse = _inverse(state.factor)
        own, _, sums, sizes = self._products
        error = sds[-1] ** 2
        Py = self._solved(self.y - W @ state.solution, state.diagonal, state.shrink)
        traces, work = [], []
        for s, columns in zip(sds, self.columns, strict=False):
            q = columns.stop - columns.start
            traces.append(q / s**2 - np.trace(inverse[columns, columns]) / s**4)
            work.append(W[:, columns] @ (W[:, columns].T @ Py))
        if self.absorbed is not None:
            # D⁻¹Z = Z diag(1/error − shrink·sizes), so Z'D⁻¹W is Z'W times that.
            each = 1 / error - state.shrink * sizes
            traces.append(float((sizes * each).sum() - np.einsum("ij,ij->", _gram(sums, each**2), inverse)))
            work.append(self._indicator @ self._sums(Py))
        inner, trace = own / error**2, self.free.sum() / error
        if self.absorbed is not None:
            twice = 2 * state.shrink / error - state.shrink**2 * sizes
            inner = inner - _gram(sums, twice)
            trace -= float((state.shrink * sizes).sum())
        traces.append(trace - float(np.einsum("ij,ij->", inner, inverse)))
        work.append(np.where(self.free, Py, 0.0))
        stacked = np.stack(work, 1)
        through = self._solved(stacked, state.diagonal, state.shrink)
        projected = through - self._solved(W @ (inverse @ (W.T @ through)), state.diagonal, state.shrink)
        slope = (np.array(traces) - stacked.T @ Py) * sds**2
        bend = 2 * np.outer(sds**2, sds**2) * (stacked.T @ projected)
        slope[:-1] += sds[:-1] / SCALE - (SHAPE - 1)
        bend[np.diag_indices(len(sds) - 1)] += sds[:-1] / SCALE
        return slope, (bend + bend.T) / 2

    def _of_data(self, slope: np.ndarray, phi: np.ndarray) -> np.ndarray:
        """The gradient without the prior's part."""
        return slope - np.append(np.exp(phi[:-1]) / SCALE - (SHAPE - 1), 0.0)

    def solved(self, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best log standard deviations, and their covariance."""
        state, damp = self.at(phi), 1e-3
        slope, bend = self.curved(state)
        for _ in range(STEPS):
            free = ~(((phi <= LOW) & (slope > 0)) | ((phi >= HIGH) & (slope < 0)))
            if np.abs(slope[free]).max(initial=0.0) < CLOSE:
                break
            step = np.zeros(len(phi))
            # In log standard deviations curvature is 4θ²·L'' + 4θ·L', and average information has only the first.
            steep = bend + np.diag(2 * np.maximum(self._of_data(slope, phi), 0))
            scaled = steep + damp * np.diag(np.maximum(np.diag(steep), 0.05))
            step[free] = np.linalg.solve(scaled[np.ix_(free, free)], -slope[free])
            new = np.clip(phi + np.clip(step, -1.5, 1.5), LOW, HIGH)
            tried = self.at(new)
            same = 1e-7 + 1e-9 * abs(state.value)  # differences of rounding
            if tried.value > state.value + same:
                damp = max(damp, 1e-3) * 10
                if damp > 1e6:
                    break
                continue
            done = state.value - tried.value < same
            phi, damp, state = new, damp / 5, tried
            slope, bend = self.curved(state)
            if done:
                break
        values, vectors = np.linalg.eigh(bend)
        # A direction in which nothing is known: as uncertain as a factor of e.
        return phi, (vectors / np.maximum(values, 1.0)) @ vectors.T


def _thin(sums: np.ndarray) -> Any:
    """The same, sparse where it is large and mostly zeros: each curve meets few levels."""
    large = sums.size > LARGE and np.count_nonzero(sums) < sums.size * FILLED
    return sparse.csr_matrix(sums) if large else sums


def _gram(sums: Any, weights: np.ndarray) -> np.ndarray:
    """sums' diag(weights) sums."""
    if isinstance(sums, np.ndarray):
        return (sums * weights[:, None]).T @ sums
    return (sums.multiply(weights[:, None]).T @ sums).toarray()


def _inverse(L: np.ndarray) -> np.ndarray:
    """Of C, from its Cholesky factor."""
    found, _ = linalg.lapack.dpotri(L, lower=1)
    return np.tril(found) + np.tril(found, -1).T


def _fitted(sds: np.ndarray, certainty: np.ndarray, scale: float, problem: _Problem) -> Mixed:
    state, names = problem.at(np.log(sds)), problem.names
    return Mixed(
        scale * state.solution[: problem.P],
        {name: float(scale * s) for name, s in zip(names, sds, strict=True)},
        {name: scale * state.solution[columns] for name, columns in zip(names, problem.columns, strict=False)},
        certainty,
        problem,
        scale,
        state,
    )
