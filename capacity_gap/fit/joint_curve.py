"""The curve of the joint model, apart from its data: what questions need, and what `joint.json` keeps.

The loss at a teacher, less a level that all teachers share, is linear in the coefficients. A derivative, or a
difference of two teachers, is so too. Sets for the best teacher and the break-even budget are therefore Fieller's
(1954): the values around the estimate at which a t test does not reject. Far from it others may be held too, where the
curve is flat or turns down again; these are no part of a set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from capacity_gap.estimators.mixed import Coefficients, Contrast

LEVEL = 0.95
GRID = 400  # points on which a set is looked for
BEYOND = math.log(4.0)  # how far beyond the grid
NAMES = {2: "κ", 3: "λ", 4: "μ"}  # coefficients of z², z³, z⁴, over factorials
DRAWS = 2000
SEED = 0


@dataclass(frozen=True)
class Centre:
    """Where z is zero: log N_T = at + b·log(N_S/N̄) + d·log(D/D̄)."""

    at: float
    b: float
    d: float

    def __call__(self, n: np.ndarray | float, d: np.ndarray | float) -> Any:
        """At a student `n` and a budget `d`, in logs off their means."""
        return self.at + self.b * n + self.d * d


@dataclass(frozen=True)
class Set:
    """All values that a test does not reject: an interval, or one that is open at an end of where was looked."""

    value: float
    low: float
    high: float
    bounded: bool


@dataclass(frozen=True, eq=False)
class JointCurve:
    """Coefficients of slope and shape with all that their contrasts need. Sizes and budgets are logs."""

    centre: Centre
    means: tuple[float, float]  # of log N_S and log D
    terms: tuple[str, ...]  # of the slope: "1", "n", "d"
    powers: tuple[int, ...]  # of z besides the first
    coefficients: Coefficients
    z_span: tuple[float, float]  # of the cells
    n_span: tuple[float, float]  # of their students and budgets, off the means
    d_span: tuple[float, float]
    rungs: Mapping[str, float]  # log size of each teacher that was tried
    effects: np.ndarray  # [R] of those rungs: what the curve does not fit
    spread: np.ndarray  # covariance of coefficients and effects [p + R, p + R]
    rung_sd: float  # of a rung that was not tried
    shared: tuple[str, str]  # the smallest and the largest teacher that all curves have
    map_sd: float = 0.0  # of log sizes about their map, where the axis is the teacher's loss

    def row(self, z: Any, n: Any, d: Any, *, derivative: bool = False) -> np.ndarray:
        """The loss at z less that at 0, or its derivative, as a function of the coefficients [m, p]."""
        z, n, d = np.broadcast_arrays(*(np.asarray(x, float) for x in (z, n, d)))
        by = {"1": np.ones_like(z), "n": n, "d": d}
        first = np.ones_like(z) if derivative else z
        slope = [first * by[t] for t in self.terms]
        shape = [z ** (p - 1) / math.factorial(p - 1) if derivative else z**p / math.factorial(p) for p in self.powers]
        return np.stack([*slope, *shape], -1)

    def unit(self, name: str) -> np.ndarray:
        """The vector that takes one coefficient; zero for one that the model has not."""
        names = [*self.terms, *(NAMES[p] for p in self.powers)]
        return np.array([float(n == name) for n in names])

    def contrast(self, g: np.ndarray) -> Contrast:
        """Of one vector [p]."""
        return self.coefficients.contrast(g)

    def value(self, name: str) -> float:
        """One coefficient."""
        return float(self.unit(name) @ self.coefficients.beta)

    def slope(self, z: np.ndarray) -> np.ndarray:
        """The derivative at the mean student and budget."""
        return self.row(z, 0.0, 0.0, derivative=True) @ self.coefficients.beta

    def optimum(self, n: float, d: float, level: float = LEVEL) -> Set:
        """log N_T of the best teacher of a student and a budget (logs off their means)."""
        grid = np.linspace(self.z_span[0] - BEYOND, self.z_span[1] + BEYOND, GRID)
        value, error, df = self.coefficients.contrasts(self.row(grid, n, d, derivative=True))
        at = root(grid, value)
        if not math.isfinite(at):
            return Set(math.nan, -math.inf, math.inf, False)
        t, shift = value / error, self.centre(n, d)
        held = np.abs(t) <= stats.t.ppf((1 + level) / 2, df)
        first, last = _around(held, int(np.argmin(np.abs(grid - at))))
        # Below the set the loss must fall, above it rise: else there is no minimum between.
        falls, rises = first > 0 and t[first - 1] < 0, last < GRID - 1 and t[last + 1] > 0
        # The map from losses to sizes has an error of its own.
        of_map = float(stats.norm.ppf((1 + level) / 2)) * self.map_sd
        below, above = (float(np.hypot(at - grid[i], of_map)) for i in (first, last))
        low, high = at - below if falls else -math.inf, at + above if rises else math.inf
        return Set(at + shift, low + shift, high + shift, bool(falls and rises))

    def difference(self, small: float, large: float, n: float, d: np.ndarray) -> np.ndarray:
        """The loss under the larger teacher less that under the smaller one at budgets `d`: rows [m, p]."""
        low, high = (np.asarray(x - self.centre(n, d)) for x in (small, large))
        return self.row(high, n, d) - self.row(low, n, d)

    def break_even(self, small: float, large: float, n: float, level: float = LEVEL) -> Set:
        """log D off its mean above which the larger of two teachers (logs) wins.

        It is established only where the smaller one wins at the least budget of the grid and the larger one at the
        most, each by a one-sided test at half of what the level leaves: then the set lies between the two.
        """
        grid = np.linspace(*self.d_span, GRID)
        value, error, df = self.coefficients.contrasts(self.difference(small, large, n, grid))
        t, limit = value / error, np.asarray(stats.t.ppf((1 + level) / 2, df))
        at = root(grid, -value)
        bounded = bool(t[0] > limit[0] and t[-1] < -limit[-1])
        if not math.isfinite(at):
            return Set(math.nan, -math.inf, math.inf, False)
        return Set(at, *_ends(grid, np.abs(t) <= limit, at), bounded)

    def exponent(self, name: str) -> Set:
        """b ("n") or d ("d") of log N_T* = a + b·log N_S + d·log D."""
        centre = self.centre.b if name == "n" else self.centre.d
        grid = np.linspace(centre - 8, centre + 8, 16 * GRID + 1)
        rows = self.unit(name) + (grid - centre)[:, None] * self.unit("κ")
        value, error, df = self.coefficients.contrasts(rows)
        bend = self.value("κ")
        if bend <= 0:
            return Set(math.nan, -math.inf, math.inf, False)
        at = centre - self.value(name) / bend
        if not grid[0] < at < grid[-1]:
            return Set(at, -math.inf, math.inf, False)
        held = np.abs(value / error) <= stats.t.ppf((1 + LEVEL) / 2, df)
        low, high = _ends(grid, held, at)
        return Set(at, low, high, math.isfinite(high - low))

    def draws(self, sizes: Mapping[str, float], n: float, d: float) -> np.ndarray:
        """Losses under teachers of some sizes (logs), but for a level: posterior draws [DRAWS, R].

        A name that was tried has its own effect, what the curve does not fit of it; any other has a new one.
        """
        names, teacher = list(self.rungs), np.array(list(sizes.values()))
        rows = self.row(teacher - self.centre(n, d), n, d)
        W = np.zeros((len(teacher), len(self.spread)))
        W[:, : rows.shape[1]] = rows
        mean, fresh = rows @ self.coefficients.beta, np.zeros(len(teacher))
        for i, name in enumerate(sizes):
            if name in self.rungs and len(self.effects):
                W[i, rows.shape[1] + names.index(name)] = 1.0
                mean[i] += self.effects[names.index(name)]
            else:
                fresh[i] = self.rung_sd**2
        covariance = W @ self.spread @ W.T + np.diag(fresh)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        generator = np.random.default_rng(SEED)
        last = self.coefficients.contrast(np.eye(rows.shape[1])[len(self.terms) - 1 + bool(self.powers)])
        df = min(last.df, 1e3)
        normal = generator.standard_normal((DRAWS, len(teacher))) * np.sqrt(np.maximum(values, 0))
        return mean + (normal @ vectors.T) * np.sqrt(df / generator.chisquare(df, (DRAWS, 1)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        c = self.coefficients
        return {
            "centre": [self.centre.at, self.centre.b, self.centre.d],
            "means": list(self.means),
            "terms": list(self.terms),
            "powers": list(self.powers),
            "beta": c.beta.tolist(),
            "covariance": c.covariance.tolist(),
            "sensitivity": c.sensitivity.tolist(),
            "certainty": c.certainty.tolist(),
            "z_span": list(self.z_span),
            "n_span": list(self.n_span),
            "d_span": list(self.d_span),
            "rungs": dict(self.rungs),
            "effects": self.effects.tolist(),
            "spread": self.spread.tolist(),
            "rung_sd": self.rung_sd,
            "shared": list(self.shared),
            "map_sd": self.map_sd,
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "JointCurve":
        """Reads what `to_dict` wrote."""
        parts = (np.asarray(given[k], float) for k in ("beta", "covariance", "sensitivity", "certainty"))
        return cls(
            Centre(*map(float, given["centre"])),
            _pair(given["means"]),
            tuple(map(str, given["terms"])),
            tuple(map(int, given["powers"])),
            Coefficients(*parts),
            _pair(given["z_span"]),
            _pair(given["n_span"]),
            _pair(given["d_span"]),
            {str(k): float(v) for k, v in given["rungs"].items()},
            np.asarray(given["effects"], float),
            np.asarray(given["spread"], float),
            float(given["rung_sd"]),
            (str(given["shared"][0]), str(given["shared"][1])),
            float(given["map_sd"]),
        )


def _pair(given: Sequence[Any]) -> tuple[float, float]:
    low, high = given
    return float(low), float(high)


def root(grid: np.ndarray, slope: np.ndarray) -> float:
    """Where a derivative goes from below to above zero, nearest to the middle; NaN if nowhere."""
    up = np.flatnonzero((slope[:-1] < 0) & (slope[1:] >= 0))
    if not len(up):
        return math.nan
    i = up[np.argmin(np.abs(up - len(grid) / 2))]
    return float(grid[i] - slope[i] * (grid[i + 1] - grid[i]) / (slope[i + 1] - slope[i]))


def _ends(grid: np.ndarray, held: np.ndarray, at: float) -> tuple[float, float]:
    """The least and largest value held around `at`; infinite where all are, up to an end of the grid."""
    first, last = _around(held, int(np.argmin(np.abs(grid - at))))
    return (grid[first] if first > 0 else -math.inf), (grid[last] if last < len(grid) - 1 else math.inf)


def _around(held: np.ndarray, i: int) -> tuple[int, int]:
    """The first and last of the neighbours of `i` that are held too."""
    first = last = i
    while first > 0 and held[first - 1]:
        first -= 1
    while last < len(held) - 1 and held[last + 1]:
        last += 1
    return first, last
