"""Where the scatter of the curves comes from, and bootstrap draws that have the same.

    mean loss of curve c under teacher k = f_c(x_k) + t_k + misfit_ck + seeds_ck

`t_k` is the error of one trained teacher, shared by every curve it appears in; its variance τ² is the teacher-seed
variance. `misfit_ck` (γ²) belongs to one curve and teacher, and includes what the form cannot fit. `seeds_ck` (σ²/n) is
the error of n replicates. σ² is known from replicates, τ² and γ² from the residuals by the method of moments: their sum
of squares, and that of their sums over each teacher. Without replicates, σ² and γ² are one. Intervals that ignore τ²
are too short, because a teacher's error moves all students' optima together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from capacity_gap.fit.frame import Curve
from capacity_gap.fit.valley import Design

NOISE_FLOOR = 1e-6  # nats: what rounding leaves on a noise-free curve


@dataclass(frozen=True)
class Noise:
    """Variance components in squared nats, and the degrees of freedom of their sum."""

    shared: float  # of a trained teacher
    own: np.ndarray  # [C, K] misfit and seeds of each mean
    run: float  # standard deviation of one run's loss, all causes together
    df: float
    known: bool = True  # False where neither replicates nor residuals identify them

    @property
    def variance(self) -> np.ndarray:
        """Of each mean [C, K]."""
        return self.shared + self.own

    def draws(self, design: Design, count: int, generator: np.random.Generator) -> np.ndarray:
        """Errors [B, C, K] as the means have them; each draw with a variance that the degrees of freedom allow."""
        cluster = design.grid.cluster
        own = generator.standard_normal((count, *cluster.shape)) * np.sqrt(self.own)
        shared = generator.standard_normal((count, int(cluster.max()) + 1))[:, cluster] * np.sqrt(self.shared)
        scale = np.sqrt(self.df / generator.chisquare(self.df, count))
        return (own + shared) * scale[:, None, None]


def components(design: Design, shape: int, found: Sequence[Curve]) -> Noise:
    """The components of the scatter about the fits of one shape."""
    seeds, seeds_df = sum(c.within for c in found), sum(c.within_df for c in found)
    sigma2 = seeds / seeds_df if seeds_df else 0.0
    used = (design.weight > 0).ravel()
    inverse = np.where(design.grid.count > 0, 1 / np.maximum(design.grid.count, 1), 1.0)
    if not used.any():
        run = sigma2**0.5
        return Noise(0.0, np.maximum(sigma2 * inverse, NOISE_FLOOR**2), run, max(seeds_df, 1), known=seeds_df > 0)
    R = _stacked(design.rest[shape])[np.ix_(used, used)]
    Z = np.equal.outer(design.grid.cluster.ravel()[used], design.grid.cluster.ravel()[used]).astype(float)
    e = R @ design.grid.loss.ravel()[used]
    D = np.diag(sigma2 * inverse.ravel()[used])
    shared, misfit = _moments(R, Z, e, D)
    df = _freedom(R, shared * Z + misfit * np.eye(len(e)) + D, seeds_df, extra=shared + misfit > 0)
    own = np.maximum(misfit + sigma2 * inverse, NOISE_FLOOR**2)
    return Noise(shared, own, float(np.sqrt(shared + misfit + sigma2)), df)


def _stacked(blocks: np.ndarray) -> np.ndarray:
    """Block-diagonal matrix of [C, K, K]."""
    C, K, _ = blocks.shape
    whole = np.zeros((C, K, C, K))
    whole[np.arange(C), :, np.arange(C), :] = blocks
    return whole.reshape(C * K, C * K)


def _moments(R: np.ndarray, Z: np.ndarray, e: np.ndarray, D: np.ndarray) -> tuple[float, float]:
    """τ² and γ², neither negative: E[e'Ae] = tr(R'AR·(τ²Z + γ²I + D)) for A = I and A = Z."""
    rows, right = [], []
    for A in (np.eye(len(e)), Z):
        M = R.T @ A @ R
        rows.append([float((M * Z).sum()), float(np.trace(M))])
        right.append(float(e @ A @ e) - float((M * D).sum()))
    system = np.array(rows)
    if abs(np.linalg.det(system)) < 1e-9 * np.abs(system).max() ** 2:  # every teacher stands in one curve only
        return 0.0, max(0.0, right[0] / max(system[0, 1], 1e-12))
    scale = np.abs(system).max(1)
    # Non-negative, because solving the moments exactly can give a negative variance.
    found, _ = optimize.nnls(system / scale[:, None], np.array(right) / scale)
    return float(found[0]), float(found[1])


def _freedom(R: np.ndarray, S: np.ndarray, seeds_df: int, *, extra: bool) -> float:
    """Satterthwaite's degrees of freedom of the residuals' sum of squares under covariance S; replicates' own where
    they explain all of the scatter."""
    A = R @ S @ R.T
    total = float(np.trace(A))
    rest = total**2 / float((A * A).sum()) if total > 0 else float(np.linalg.matrix_rank(R))
    return max(1.0, rest if extra or not seeds_df else rest + seeds_df)
