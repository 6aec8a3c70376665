"""The curse of capacity gap, tested: is the largest teacher worse than the best one? And does a larger student help?

The loss of the largest teacher less that of the best is never negative, whatever the truth, because the best is chosen
after the fact. Hsu's comparison with the best takes that into account: d is the 97.5 % quantile of the largest of
(error of the last − error of teacher k) over k, in standard errors. Then `max_k(ℓ_last − ℓ_k ∓ d·se_k)` are the ends of
a 95 % interval of the excess, and the curse is shown where its lower end is above zero. No form of the curve is
assumed. But where each teacher was trained once and no curve could be fitted, seeds of the student alone do not
identify the teacher-seed variance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.fit.frame import Curve
from capacity_gap.fit.optimum import Located
from capacity_gap.fit.sizes import size_draws
from capacity_gap.records.columns import BY, default_metric, require
from capacity_gap.records.tables import numbers

DRAWS = 4000


@dataclass(frozen=True)
class Curse:
    """Loss under the largest teacher less that under the best one tried, nats, for one curve.

    `interval`: 95 %, its lower end at least 0; `p` of the hypothesis that no smaller teacher is better.
    """

    student: str
    data_tokens: int | None
    largest: float
    best: float
    excess: float
    interval: tuple[float, float]
    p: float


def curses(located: Located, *, seed: int = 0) -> tuple[Curse, ...]:
    """One test a curve with at least two teachers; none where neither seeds nor a fit identify the noise."""
    rng = np.random.default_rng(seed)
    if not located.noise.known:
        return ()
    return tuple(_curse(located, i, rng) for i, c in enumerate(located.found) if len(c.x) > 1)


def _curse(located: Located, i: int, rng: np.random.Generator) -> Curse:
    curve, noise = located.found[i], located.noise
    K = len(curve.x)
    variance = noise.variance[i, :K]
    gap = curve.loss[-1] - curve.loss[:-1]
    error = np.sqrt(variance[-1] + variance[:-1] + _size_variance(curve))
    errors = rng.standard_normal((DRAWS, K)) * np.sqrt(variance)
    # One factor a draw: all teachers share the same estimate of the variance.
    scale = np.sqrt(noise.df / rng.chisquare(noise.df, DRAWS))[:, None]
    errors += size_draws([curve], (DRAWS, 1, K), rng)[:, 0]
    null = ((errors[:, -1:] - errors[:, :-1]) / error * scale).max(1)
    critical = float(np.quantile(null, 0.975))
    low, high = float((gap - critical * error).max()), float((gap + critical * error).max())
    p = float((1 + (null >= (gap / error).max()).sum()) / (1 + DRAWS))
    best = int(curve.loss.argmin())
    tokens = curve.key.get("data_tokens")
    return Curse(
        student=str(curve.key["student"]),
        data_tokens=None if tokens is None else int(tokens),  # type: ignore[call-overload]
        largest=float(curve.teacher_params[-1]),
        best=float(curve.teacher_params[best]),
        excess=float(curve.loss[-1] - curve.loss[best]),
        interval=(max(0.0, low), max(0.0, high)),
        p=p,
    )


def _size_variance(curve: Curve) -> np.ndarray:
    """What adjusting for size adds to the variance of each mean's gap to the last [K−1]."""
    if curve.size_off is None or curve.size_slope is None:
        return np.zeros(len(curve.x) - 1)
    return (((curve.size_off[-1] - curve.size_off[:-1]) @ curve.size_slope.spread.T) ** 2).sum(1)


@dataclass(frozen=True)
class Growth:
    """Under one teacher, how the loss moves with the student: nats per doubling of its parameters, and p of ≥ 0.

    `worse`: pairs of neighbouring students of which the larger has the higher mean loss, of `pairs`.
    """

    teacher: float
    setting: str
    students: int
    per_doubling: float
    interval: tuple[float, float]
    p: float
    pairs: int
    worse: int


def student_growth(
    frame: pd.DataFrame, *, metric: str | None = None, axis: str = "total", by: Sequence[str] = BY
) -> tuple[Growth, ...]:
    """The other half of the paper's observation: under a fixed teacher, does a growing student always improve?

    Args:
        frame: as for `locate_optima`; teachers with at least three students are tested.
        metric: the column to minimise, if another.
        axis: `total` or `non_embedding` parameters.
        by: columns that part settings.
    """
    column, suffix = metric or default_metric(frame), "" if axis == "total" else "_non_embedding"
    require(frame, ["student_params" + suffix, "teacher_params" + suffix, column])
    objective = ["loss"] if column != "loss" and "loss" in frame else []
    names = [c for c in (*objective, *by) if c in frame and frame[c].nunique(dropna=False) > 1]
    frame = numbers(frame, ["student_params" + suffix, "teacher_params" + suffix, column])
    keep = frame[np.isfinite(frame[column])]
    found = []
    for key, group in keep.groupby([*names, "teacher_params" + suffix], dropna=False):
        if group["student_params" + suffix].nunique() > 2:
            setting = ", ".join(f"{n}={v}" for n, v in zip(names, key[:-1], strict=True))
            found.append(_growth(group, "student_params" + suffix, column, float(key[-1]), setting))
    return tuple(found)


def _growth(group: pd.DataFrame, student: str, column: str, teacher: float, setting: str) -> Growth:
    means = group.groupby(student)[column].mean()  # seeds of one student share its misfit: they are no evidence apart
    line = stats.linregress(np.log2(means.index.to_numpy(float)), means.to_numpy(float))
    half = float(stats.t.ppf(0.975, len(means) - 2) * line.stderr)
    t = line.slope / line.stderr if line.stderr > 0 else np.copysign(np.inf, line.slope)
    return Growth(
        teacher=teacher,
        setting=setting,
        students=len(means),
        per_doubling=float(line.slope),
        interval=(float(line.slope) - half, float(line.slope) + half),
        p=float(stats.t.cdf(t, len(means) - 2)),
        pairs=len(means) - 1,
        worse=int((np.diff(means.to_numpy()) > 0).sum()),
    )
