"""The pico study beyond its main arm: other architectures, shapes and text; and what its unpruned cells weigh."""

import pandas as pd

from benchmarks.study_arms import Arm, main_of
from benchmarks.study_surface import surface_of
from benchmarks.study_tables import markdown, ratio_of, ratios_table, within
from capacity_gap.scales import format_scale

SETTINGS = {"family", "shape", "corpus"}
FROM = "180k"  # the smallest teacher that every student of these arms has and is smaller than
UNPRUNED = 1.005  # a student of its teacher's size is the teacher


def elsewhere(arms: list[Arm]) -> list[Arm]:
    """The arms with another architecture, shape or text and nothing else changed, distilled."""
    return [a for a in arms if a.differs and a.differs <= SETTINGS and a.budgets != [0]]


def elsewhere_table(arms: list[Arm]) -> str:
    """One row a student: the best teacher tried, what the curve says, and the largest teacher less the 180k one."""
    main, others = main_of(arms), elsewhere(arms)
    budgets = {n for arm in others for n in arm.budgets}
    rows = []
    for arm in [main, *others]:
        for tokens in (n for n in arm.budgets if n in budgets):
            optima = {o.student: o for o in arm.fit(tokens).optima}
            cells = arm.frame[arm.frame["data_tokens"] == tokens]
            for (params, student), of in cells.groupby(["student_params", "student"]):
                if student in optima:
                    place = [arm.name, str(student), format_scale(tokens), _tried(of, float(params))]
                    rows.append([*place, ratio_of(optima[str(student)]), *_price(of)])
    head = ["arm", "student", "tokens", "best tried", "best teacher over student", "largest teacher"]
    return markdown([*head, f"its loss − that under {FROM}, by seed", "their own losses"], rows)


def _tried(cells: pd.DataFrame, params: float) -> str:
    means = cells.groupby(["teacher_params", "teacher"])["student_loss"].mean()
    size, name = means.idxmin()
    return f"{name} ({size / params:.1f}×)"


def _price(cells: pd.DataFrame) -> list[str]:
    """The largest teacher, its price for each seed, and by how much it is the better model."""
    largest = cells.loc[cells["teacher_params"].idxmax(), "teacher"]
    by = cells.pivot_table(index="seed", columns="teacher", values=["student_loss", "teacher_loss"])
    losses, own = by["student_loss"], by["teacher_loss"]
    price = (losses[largest] - losses[FROM]).dropna()
    return [str(largest), ", ".join(f"{v:.3f}" for v in price), f"{(own[largest] - own[FROM]).mean():.3f}"]


def pruned_only(arm: Arm) -> Arm:
    """An arm without the cells whose student is its teacher, unpruned."""
    kept = arm.frame[arm.frame["teacher_params"] > UNPRUNED * arm.frame["student_params"]]
    return Arm(f"{arm.name}, pruned students only", arm.differs, kept.reset_index(drop=True))


def unpruned_table(arm: Arm) -> str:
    """The headline again, without the cells that are not pruned."""
    return ratios_table(pruned_only(arm))


def unpruned_surface(arm: Arm) -> str:
    """What the surface says of the ratio, with and without them."""
    rows = []
    for each in (arm, pruned_only(arm)):
        found = surface_of(each)
        said = [f"{found.parameters[n]:.2f} ({within(found.intervals[n], '.2f')})" for n in ("ratio", "nu")]
        rows.append([each.name, str(len(each.frame)), *said])
    return markdown(["arm", "cells", "ratio", "nu"], rows)


def together(arms: list[Arm]) -> Arm:
    """Several arms as one table, for a figure of all their curves."""
    return Arm(", ".join(a.name for a in arms), frozenset(), pd.concat([a.frame for a in arms], ignore_index=True))
