"""The pico study beyond its main arm: other architectures, shapes and text; and the influence of its unpruned cells."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import t, ttest_ind

from benchmarks.study_arms import Arm, main_of
from benchmarks.study_surface import surface_of
from benchmarks.study_tables import markdown, ratio_of, ratios_table, within
from capacity_gap.fit import SurfaceFit
from capacity_gap.settings.scales import format_scale

SETTINGS = {"family", "shape", "corpus"}
FROM = "180k"  # the smallest teacher that every student of these arms has and is smaller than
NEXT = "270k"
EVERYWHERE = "80k"  # the student that the main arm and every architecture have
LEAST = 79_000  # parameters of the students that every architecture has
UNPRUNED = 1.005  # a student of its teacher's size is the teacher


def elsewhere(arms: list[Arm]) -> list[Arm]:
    """The arms with another architecture, shape or text and nothing else changed, distilled."""
    return [a for a in arms if a.differs and a.differs <= SETTINGS and a.budgets != [0]]


def elsewhere_table(arms: list[Arm]) -> str:
    """One row a student: the best teacher tried, the fitted ratio, and the largest teacher less the 180k one, in the
    student's loss, before training and by itself.
    """
    main, others = main_of(arms), elsewhere(arms)
    budgets = {n for arm in others for n in arm.budgets}
    rows = []
    for arm in [main, *others]:
        for tokens in (n for n in arm.budgets if n in budgets):
            optima = {o.student: o for o in arm.fit(tokens).optima}
            cells = arm.frame[arm.frame["data_tokens"] == tokens]
            for student, of in _by_student(cells):
                if student in optima:
                    place = [arm.name, student, format_scale(tokens), _tried(of)]
                    rows.append([*place, ratio_of(optima[student]), *_compared(of)])
    head = ["arm", "student", "tokens", "best tried", "best teacher over student", "largest teacher"]
    less = f"largest − {FROM}"
    return markdown(
        [*head, f"student's loss, {less}, by seed", f"initial loss, {less}", f"teacher's loss, {less}"], rows
    )


def _by_student(cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The cells of each student, smallest first; under shapes of its teachers' own its size varies a little."""
    for student in cells.groupby("student")["student_params"].mean().sort_values().index:
        yield str(student), cells[cells["student"] == student]


def _tried(cells: pd.DataFrame) -> str:
    means = cells.groupby(["teacher_params", "teacher"])["student_loss"].mean()
    size, name = means.idxmin()
    return f"{name} ({size / cells['student_params'].mean():.1f}×)"


def _compared(cells: pd.DataFrame) -> list[str]:
    """The largest teacher and its differences in the student's loss by seed, initial loss and own loss."""
    price, start, own = (price_of(cells, loss=of) for of in ("student_loss", "init_loss", "teacher_loss"))
    largest = cells.loc[cells["teacher_params"].idxmax(), "teacher"]
    return [str(largest), ", ".join(f"{v:.3f}" for v in price), f"{start.mean():.2f}", f"{own.mean():.3f}"]


def price_of(cells: pd.DataFrame, *, over: str = FROM, loss: str = "student_loss") -> pd.Series:
    """A loss under the largest teacher less that under a smaller one, for each seed, the mean over students."""
    found = []
    for _, of in cells.groupby("student"):
        table = of.pivot_table(index="seed", columns="teacher", values=loss)
        largest = of.loc[of["teacher_params"].idxmax(), "teacher"]
        found.append(table[largest] - table[over])
    return pd.concat(found, axis=1).mean(axis=1).dropna()


def prices_table(arms: list[Arm]) -> str:
    """Excess loss of students of 80k and more under the largest teacher, by architecture, at the budget that all have.

    Two seeds identify their variance poorly, so the first differences from the main arm use one variance for all
    architectures; beside them, each with its own (Welch), over another teacher, and for the one student that all have.
    """
    kept = [main_of(arms), *(a for a in elsewhere(arms) if a.differs == {"family"})]
    if len(kept) == 1:
        return markdown([], [])
    tokens = max(set.intersection(*(set(a.budgets) for a in kept)))
    cells = [a.frame[(a.frame["data_tokens"] == tokens) & (a.frame["student_params"] > LEAST)] for a in kept]
    prices = [price_of(c).to_numpy() for c in cells]
    further = [price_of(c, over=NEXT).to_numpy() for c in cells]
    one = [price_of(c[c["student"] == EVERYWHERE]).to_numpy() for c in cells]
    rows = []
    for i, (arm, price) in enumerate(zip(kept, prices, strict=True)):
        said = [", ".join(f"{v:.3f}" for v in price), _plus_minus(price.mean(), _pooled(prices) / np.sqrt(len(price)))]
        less = [_less(prices, i), _welch(price, prices[0]), _less(further, i), _less(one, i)] if i else [""] * 4
        rows.append([arm.name, *said, *less])
    head = [
        "architecture",
        f"900k − {FROM}, by seed",
        "mean",
        "difference from main",
        "separate variances",
        f"difference over {NEXT}",
    ]
    return markdown([*head, f"difference, {EVERYWHERE} student"], rows)


def _plus_minus(value: float, half: float) -> str:
    return f"{value:.3f} ± {half:.3f}"


def _pooled(groups: list[np.ndarray]) -> float:
    """Half of a 95 % interval of a single value, one variance for all groups: seeds less groups degrees of freedom."""
    freedom = sum(len(g) - 1 for g in groups)
    return float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom) * t.ppf(0.975, freedom))


def _less(groups: list[np.ndarray], i: int) -> str:
    """The mean of one group less that of the first."""
    half = _pooled(groups) * np.sqrt(1 / len(groups[i]) + 1 / len(groups[0]))
    return _plus_minus(groups[i].mean() - groups[0].mean(), half)


def _welch(one: np.ndarray, other: np.ndarray) -> str:
    found = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return _plus_minus(one.mean() - other.mean(), (found.high - found.low) / 2)


def shapes_table(arms: list[Arm]) -> str:
    """Loss under a shape of each teacher's own proportions less that under the common one, by student and teacher.

    The mean over seeds; a dash where it is the same shape, and so the same model.
    """
    commons = {_family(a): a for a in elsewhere(arms) if a.differs == {"family"}}
    found, teachers = [], dict[float, str]()
    for arm in (a for a in elsewhere(arms) if a.differs == {"family", "shape"}):
        by = ["student", "seed", "teacher", "teacher_params"]
        both = arm.frame.merge(commons[_family(arm)].frame, on=by, suffixes=("", "_common"))
        both["cost"] = both["student_loss"] - both["student_loss_common"]
        for student, cells in _by_student(both):
            costs = cells.groupby("teacher")["cost"].mean()
            found.append((_family(arm), student, {t: "–" if c == 0 else f"{c:+.3f}" for t, c in costs.items()}))
        teachers |= dict(zip(both["teacher_params"].round(-4), both["teacher"], strict=True))
    columns = [name for _, name in sorted(teachers.items())]
    return markdown(["arm", "student", *columns], [[a, s, *(c.get(t, "") for t in columns)] for a, s, c in found])


def _family(arm: Arm) -> str:
    return str(arm.frame["family"].iloc[0])


def pruned_only(arm: Arm) -> Arm:
    """An arm without the cells whose student is its teacher, unpruned."""
    kept = arm.frame[arm.frame["teacher_params"] > UNPRUNED * arm.frame["student_params"]]
    return Arm(f"{arm.name}, pruned students only", arm.differs, kept.reset_index(drop=True))


def unpruned_table(arm: Arm) -> str:
    """The headline again, without the cells that are not pruned."""
    return ratios_table(pruned_only(arm))


def unpruned_surface(arm: Arm, surface: SurfaceFit) -> str:
    """The surface's ratio and exponent, with and without unpruned cells."""
    kept = pruned_only(arm)
    rows = []
    for each, found in ((arm, surface), (kept, surface_of(kept))):
        said = [f"{found.parameters[n]:.2f} ({within(found.intervals[n], '.2f')})" for n in ("ratio", "nu")]
        rows.append([each.name, str(len(each.frame)), *said])
    return markdown(["arm", "cells", "ratio", "nu"], rows)


def together(arms: list[Arm]) -> Arm:
    """Several arms as one table, for a figure of all their curves."""
    return Arm(", ".join(a.name for a in arms), frozenset(), pd.concat([a.frame for a in arms], ignore_index=True))
