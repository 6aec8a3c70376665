"""The study's main arm as one model of all cells (docs/joint.md), beside the fits of single curves."""

import math
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.intervals import interval
from benchmarks.study_arms import Arm
from benchmarks.study_tables import markdown, within
from capacity_gap.fit import JointFit, SurfaceFit, fit_joint, fit_surface
from capacity_gap.fit.joint_forecast import forecast
from capacity_gap.report.joint_tables import ratio
from capacity_gap.settings.scales import format_scale, short_scale

LARGEST = 1_200_000  # tokens of the budget that is predicted
PAIR = (120_200, 899_712)  # teachers of the break-even budget: those of the contrasts between arms
EVEN = 0.5
LARGEST_WEIGHED = 650_000  # parameters: other KD weights than 0.5 were run with teachers to 600k


def joint_of(arm: Arm) -> JointFit:
    """The model of the cells of an arm, without those that are not pruned."""
    return fit_joint(arm.frame, metric="student_loss")


def _students(arm: Arm) -> list[tuple[float, str]]:
    return sorted({(float(n), str(s)) for n, s in arm.frame[["student_params", "student"]].to_numpy()})


def odds_of(arm: Arm) -> list[dict[str, Any]]:
    """Each student and pair of teachers at the largest budget: predicted odds of the larger one, and the outcome."""
    past = arm.frame[arm.frame["data_tokens"] < LARGEST]
    last = past["data_tokens"].max()
    told, rows = forecast(fit_joint(past, metric="student_loss")), []
    for params, student in _students(arm):
        mine = arm.frame[arm.frame["student"] == student].groupby(["data_tokens", "teacher"])["student_loss"].mean()
        means = {n: mine[n] for n in (last, LARGEST)}
        for (small, large), odds in told.order(params, LARGEST).items():
            if all(name in found for name in (small, large) for found in means.values()):
                before, came = (bool(found[large] < found[small]) for found in (means[last], means[LARGEST]))
                rows.append({"odds": odds, "came": came, "before": before, "flattened": told.flattened})
    return rows


def odds_table(arm: Arm) -> str:
    """Accuracy and confidence of the odds, beside the sign at the last budget."""
    rows = odds_of(arm)
    odds, came, before = (np.array([row[k] for row in rows], float) for k in ("odds", "came", "before"))
    said = np.maximum(odds, 1 - odds)
    right = (odds > EVEN) == came.astype(bool)
    found = [
        ["sign at the last budget", f"{np.mean(before == came):.0%}", "100%", f"{np.mean((before - came) ** 2):.3f}"],
        ["joint model", f"{right.mean():.0%}", f"{said.mean():.0%}", f"{np.mean((odds - came) ** 2):.3f}"],
    ]
    for low, high in ((0.5, 0.7), (0.7, 0.8), (0.8, 1.0)):
        part = (said > low) & (said <= high)
        if part.any():
            name = f"of these, odds of {low:.0%} to {high:.0%} ({part.sum()} pairs)"
            found.append([name, f"{right[part].mean():.0%}", f"{said[part].mean():.0%}", ""])
    return markdown([f"{len(rows)} pairs", "correct", "stated probability", "Brier score"], found)


def free_surface(arm: Arm) -> SurfaceFit:
    """The additive surface with b and d free, without the cells that are not pruned; whole rungs bootstrapped."""
    pruned = arm.frame[arm.frame["teacher_params"] > arm.frame["student_params"] * 1.02]
    named = {"cluster": "teacher_params", "metric": "student_loss", "permutations": 0, "bootstraps": 300}
    return fit_surface(pruned, "additive_free", **named)  # type: ignore[arg-type]


def weights_table(arms: list[Arm]) -> str:
    """Each KD weight of one budget as one model of its cells: best ratios, and how much worse 600k is than 120k."""
    budget = 300_000
    named = {0.25: "KD weight 0.25", 0.5: "main", 1.0: "KD weight 1.0"}
    held = [a for a in arms if a.name in named.values()]
    cells = pd.concat([a.frame[a.frame["data_tokens"] == budget] for a in held])
    run = [set(cells.loc[cells["kd_weight"] == weight, "student"]) for weight in named]
    cells = cells[cells["student"].isin(set.intersection(*run)) & (cells["teacher_params"] <= LARGEST_WEIGHED)]
    losses = cells.pivot_table(index=["kd_weight", "student", "seed"], columns="teacher", values="student_loss")
    apart = (losses["600k"] - losses["120k"]).groupby(["kd_weight", "seed"]).mean().unstack("kd_weight")
    rows = []
    for weight in named:
        fit = fit_joint(cells[cells["kd_weight"] == weight], metric="student_loss")
        best = {name: fit.best_teacher(params, budget) for name, params in fit.students.items()}
        ratios = [ratio(best[name].params, best[name].interval, params) for name, params in fit.students.items()]
        rows.append([f"{weight:g}", *ratios, _mean(apart[weight])])
    rows.append(["1.0 less 0.25", *[""] * len(fit.students), _mean(apart[1.0] - apart[0.25])])
    return markdown(["KD weight", *fit.students, "600k less 120k, nats"], rows)


def _mean(values: pd.Series) -> str:
    """Mean over seeds with a t-interval."""
    mean, half = interval(values.to_numpy())
    return f"{mean:+.3f} ± {half:.3f}".replace("-", "−")


def standing_table(fit: JointFit, arm: Arm) -> str:
    """Earlier results, from single curves or the surface, beside those of the joint model."""
    tests, powers = fit.tests(), fit.exponents()
    students = {name: params for params, name in _students(arm)}
    curves = {(str(o.student), o.data_tokens): o for o in arm.law.optima}
    rows = []
    for student, tokens in (("55k", 300_000), ("40k", 600_000), ("55k", 600_000)):
        was, params = curves[student, tokens], students[student]
        best = fit.best_teacher(params, tokens)
        ends = [math.nan if x is None else x for x in was.interval]
        said = f"best ratio of {student} at {format_scale(tokens)}: " + (
            ratio(was.teacher_params, ends, params) if was.teacher_params else was.status
        )
        now = ratio(best.params, best.interval, params)
        rows.append([said, now, "the interval was too narrow: it ignored uncertainty in the curve's shape"])
    between = {name: f"{e.value:.2f} ({e.interval[0]:.2f} to {e.interval[1]:.2f})" for name, e in powers.items()}
    between = {name: text.replace(" to inf", " up") for name, text in between.items()}
    rows.append(
        [
            "the best teacher grows with tokens",
            f"d = {between['d']}; d = 0 has p {tests['d = 0']:.1g}",
            "stands",
        ]
    )
    rows.append(
        [
            "ratio ∝ (tokens a parameter)^ν, ν = 0.81 (0.54 to 1.11)",
            f"b = {between['b']}, so the ratio depends on tokens; b + d = 1 has p {tests['b + d = 1']:.1g}",
            "withdrawn: ν is an artefact of a form that fixes b + d = 1",
        ]
    )
    free = free_surface(arm)
    said = ", ".join(f"{n} = {free.parameters[n]:.2f} ({within(free.intervals[n], '.2f')})" for n in ("b", "d"))
    rows.append(["the same surface with b and d free", said, "agrees with the joint model"])
    verdict = "stands" if fit.status in ("no_optimum", "break_even") else f"stands as `{fit.status}` only"
    without = f"without {' or '.join(fit.rests_on)} there is no optimum" if fit.rests_on else "no rung is decisive"
    rows.append(["no single ratio is established", f"status `{fit.status}`: {without}", verdict])
    even = [fit.break_even(params, *PAIR) for params in students.values()]
    held = sum(found.established for found in even)
    found = f"120k and 900k break even at {short_scale(even[0].tokens)} (40k) to {short_scale(even[-1].tokens)} (110k)"
    rows.append(["large teachers win at 1.2M, small ones at 300k", f"{found}; established for {held} of 4", "stands"])
    return markdown(["earlier result", "joint model", "verdict"], rows)
