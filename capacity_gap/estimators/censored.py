"""Regression with censored responses (Tobit) of known standard errors, for many draws at once.

    y_c = x_c·β + ε_c,  ε_c ~ N(0, s_c²)

where of some y_c only a bound is known: the best teacher lies at or beyond the end of the grid. The log-likelihood,
Σ_seen log φ((y − xβ)/s) + Σ_above log Φ((xβ − y)/s) + Σ_below log Φ((y − xβ)/s), is concave: Newton's method finds its
maximum from the least squares through the seen responses.

Shape suffixes: B draws, C responses, P parameters.
"""

import numpy as np
from scipy import optimize, special

SEEN, ABOVE, BELOW = 0, 1, -1  # above: the response is at least y
STEPS = 25


def tobit(X: np.ndarray, y: np.ndarray, kind: np.ndarray, error: np.ndarray) -> np.ndarray:
    """β [B, P] that maximises the likelihood of each draw.

    Args:
        X: regressors [C, P].
        y: responses, or bounds [B, C].
        kind: SEEN, ABOVE or BELOW for each [B, C].
        error: standard errors s [C].
    """
    weight = 1 / error**2
    beta = _start(X, y, kind, weight)
    for _ in range(STEPS if (kind != SEEN).any() else 0):
        z = (y - beta @ X.T) / error
        score, curvature = _derivatives(z, kind)
        gradient = (score / error) @ X
        hessian = np.einsum("bc,cp,cq->bpq", curvature * weight, X, X) + 1e-9 * np.eye(X.shape[1])
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # Far in a censored tail the curvature is nearly zero, and a full Newton step overshoots.
        beta = beta + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-8:
            break
    return beta


def _start(X: np.ndarray, y: np.ndarray, kind: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Least squares through the seen responses; draws that have too few use the bounds as responses."""
    W = np.where(kind == SEEN, 1.0, 1e-3) * weight
    normal = np.einsum("bc,cp,cq->bpq", W, X, X) + 1e-12 * np.eye(X.shape[1])
    return np.linalg.solve(normal, ((W * y) @ X)[..., None])[..., 0]


def _derivatives(z: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d log L/d(xβ/s) and −d²log L/d(xβ/s)² of each response at z = (y − xβ)/s."""
    side = np.where(kind == ABOVE, -z, z)  # log Φ(side) is the censored likelihood
    # φ/Φ by logarithms: far in the tail both underflow, and their quotient would be 0/0.
    mills = np.exp(-0.5 * side**2 - 0.5 * np.log(2 * np.pi) - special.log_ndtr(side))
    score = np.where(kind == SEEN, z, np.where(kind == ABOVE, mills, -mills))
    return score, np.where(kind == SEEN, 1.0, mills * (mills + side))


def scatter(residual: np.ndarray, error: np.ndarray, parameters: int) -> float:
    """ω, the scatter between students beyond the optima's own errors (Paule and Mandel 1982).

    Solves Σ e²/(s² + ω²) = n − p; 0 where the errors explain all.
    """
    df = len(residual) - parameters
    if df < 1:
        return 0.0

    def excess(omega2: float) -> float:
        return float((residual**2 / (error**2 + omega2)).sum()) - df

    high = float((residual**2).sum()) + 1e-12
    return float(optimize.brentq(excess, 0.0, high)) ** 0.5 if excess(0.0) > 0 > excess(high) else 0.0
