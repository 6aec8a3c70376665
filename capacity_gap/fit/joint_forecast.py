"""Forecast of which of two teachers is better at a budget that was not run, from the joint model.

The model's own odds are overconfident beyond its budgets, where its slope is assumed linear in log D. So the
last budget is predicted from the earlier ones, and the odds are flattened until they are calibrated on it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import optimize, stats

from capacity_gap.fit.joint import SAME, Cells, Joint, fit_cells
from capacity_gap.fit.joint_fit import JointFit

Pair = tuple[str, str]
LEAST_BUDGETS = 3
FLATTEST = 20.0
FARTHEST = 10.0  # times the largest budget


@dataclass(frozen=True, eq=False)
class Forecast:
    """Odds for budgets beyond those of a grid. `flattened`: what t statistics are divided by, one or more."""

    joint: Joint
    flattened: float

    def order(self, student_params: float, data_tokens: float, *, seeds: int = 3) -> dict[Pair, float]:
        """Of each pair of teachers, smaller first, the probability that the larger one's mean loss comes out lower.

        Args:
            student_params: of the student.
            data_tokens: of the budget.
            seeds: runs that each mean is of.
        """
        for name, given in (("student_params", student_params), ("data_tokens", data_tokens), ("seeds", seeds)):
            if not 0 < given < math.inf:
                raise ValueError(f"{name}={given} must be positive.")
        largest = self.joint.means[1] + self.joint.curve.d_span[1]
        if math.log(data_tokens) - largest > math.log(FARTHEST):
            raise ValueError(
                f"data_tokens={data_tokens:,.0f} is more than {FARTHEST:g} times the largest budget of the fit, "
                f"{math.exp(largest):,.0f}: the extrapolation is too far."
            )
        found = _statistics(self.joint, math.log(student_params), math.log(data_tokens), seeds)
        return {pair: float(stats.t.cdf(t / self.flattened, df)) for pair, (t, df) in found.items()}


def forecast(fit: JointFit) -> Forecast:
    """Odds at other budgets by a fit of three budgets or more.

    Raises:
        ValueError: there are fewer: one is needed to see how far the odds can be trusted.
    """
    cells = fit.joint.cells
    budgets = np.unique(np.round(cells.data, 6))
    if len(budgets) < LEAST_BUDGETS:
        raise ValueError(
            f"a forecast needs at least {LEAST_BUDGETS} budgets, because it is calibrated by predicting the last one "
            f"from the others; there are {len(budgets)}."
        )
    before = fit_cells(coded_anew(cells, cells.data < budgets[-1] - SAME))
    t, df, larger = _seen(before, cells, float(budgets[-1]))

    def surprise(log_factor: float) -> float:
        odds = stats.t.logcdf(np.where(larger, t, -t) / math.exp(log_factor), df)
        return -float(np.mean(odds))

    best = optimize.minimize_scalar(surprise, bounds=(0.0, math.log(FLATTEST)), method="bounded")
    return Forecast(fit.joint, math.exp(float(best.x)))


def coded_anew(cells: Cells, keep: np.ndarray) -> Cells:
    """A subset of the cells, with codes renumbered from zero."""
    part = cells.part(keep)
    groups = {name: np.unique(codes, return_inverse=True)[1] for name, codes in part.groups.items()}
    rungs = dict(enumerate(cells.rungs[code] for code in np.unique(part.groups["rung"])))
    kept = {name: getattr(part, name) for name in ("y", "student", "teacher", "data")}
    return Cells(**kept, curve=np.unique(part.curve, return_inverse=True)[1], groups=groups, rungs=rungs)


def _seen(joint: Joint, cells: Cells, budget: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At one budget of `cells` that `joint` did not see: t and its df of each pair, and whether the larger one won."""
    t, df, larger = [], [], []
    there = np.abs(cells.data - budget) < SAME
    for curve in np.unique(cells.curve[there]):
        mine = there & (cells.curve == curve)
        codes = cells.groups["rung"][mine]
        means = {cells.rungs[c]: float(cells.y[mine][codes == c].mean()) for c in np.unique(codes)}
        seeds = max(1, round(mine.sum() / len(means)))
        found = _statistics(joint, float(cells.student[mine].mean()), budget, seeds)
        for (one, two), (statistic, freedom) in found.items():
            if one in means and two in means:
                t.append(statistic)
                df.append(freedom)
                larger.append(means[two] < means[one])
    return np.array(t), np.array(df), np.array(larger, bool)


def _statistics(joint: Joint, student: float, data: float, seeds: int) -> Mapping[Pair, tuple[float, float]]:
    """Of each pair the expected loss of the smaller teacher less that of the larger over its error, with its df.

    The teachers are those of the fit, with what is known of them: their rung's effect, and that of each trained one.
    What is new at another budget is drawn anew: each teacher's effect there, the slope of that curve, and the runs.
    """
    curve, sds = joint.curve, joint.mixed.sds
    n, d = student - curve.means[0], data - curve.means[1]
    names = [name for name, size in curve.rungs.items() if size > student + SAME]
    codes = {name: code for code, name in joint.cells.rungs.items()}
    z = np.array([curve.rungs[name] for name in names]) - curve.centre(n, d)
    W = np.zeros((len(names), joint.mixed.size))
    W[:, joint.curves : joint.curves + len(curve.coefficients.beta)] = curve.row(z, n, d)
    effects, columns = joint.mixed.effects, joint.mixed.problem.columns
    value = W[:, : len(joint.mixed.beta)] @ joint.mixed.beta
    for component, part in zip(effects, columns, strict=False):
        if component not in ("rung", "teacher"):
            continue
        for i, name in enumerate(names):
            mine = np.unique(joint.cells.groups[component][joint.cells.groups["rung"] == codes[name]])
            W[i, part.start + mine] = 1 / len(mine)
            value[i] += effects[component][mine].mean()
    fresh = sum(sds.get(part, 0.0) ** 2 for part in ("teacher x budget", "teacher x student", "error")) / seeds
    covariance = joint.mixed.spread(W) + fresh * np.eye(len(names))
    covariance += sds.get("slope", 0.0) ** 2 * np.outer(z, z)
    df = curve.contrast(curve.unit("d" if "d" in curve.terms else "1")).df
    found = {}
    for i, j in combinations(range(len(names)), 2):
        g = np.zeros(len(names))
        g[i], g[j] = 1.0, -1.0
        found[names[i], names[j]] = (float(g @ value / math.sqrt(g @ covariance @ g)), df)
    return found
