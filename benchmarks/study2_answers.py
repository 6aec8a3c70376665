"""The registered analysis of study two (docs/study2_registration.md): a function for each question.

It was fixed, and run on simulated data (`benchmarks/study2_power.py`), before any cell. Slopes are nats per unit of log
teacher size; one rung is one observation, the mean over its seeds and students.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.fit import JointFit, fit_joint
from capacity_gap.fit.joint_forecast import forecast

PAIRS = (("95k", 95_000, 450_000), ("70k", 70_000, 900_000), ("110k", 110_000, 2_400_000))  # without any cell
SMALL, LARGE = 120_200, 899_712  # parameters of the rungs whose break-even is asked for
LEVEL = 0.95
SAME_SLOPE = 0.02  # nats per unit of log teacher size: half of what a doubling of the tokens does in study one
FITTED = ("student_params", "teacher_params", "data_tokens", "seed", "teacher_seed", "student", "teacher", "loss")


# Slopes


@dataclass(frozen=True)
class Slope:
    """Loss against log teacher size: nats per unit, and its 95 % interval. `units`: rungs."""

    value: float
    interval: tuple[float, float]
    p: float
    units: int

    @property
    def sign(self) -> str:
        """Which way it goes, if that is established."""
        low, high = self.interval
        return "falls" if high < 0 else "rises" if low > 0 else "open"

    @property
    def small(self) -> bool:
        """Whether the whole interval is within `SAME_SLOPE` of none."""
        return max(map(abs, self.interval)) < SAME_SLOPE

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:+.4f} ({low:+.4f} to {high:+.4f})"


def slope_of(cells: pd.DataFrame, loss: str = "loss") -> Slope:
    """By least squares over rungs. Columns: teacher_params, student, seed and the loss (or difference of losses)."""
    alike = [c for c in ("student", "seed", "data_tokens") if c in cells]
    levels = cells[loss] - cells.groupby(alike)[loss].transform("mean")
    by_rung = levels.groupby(cells["teacher_params"]).mean()
    fit = stats.linregress(np.log(by_rung.index.to_numpy(float)), by_rung.to_numpy())
    half = stats.t.ppf((1 + LEVEL) / 2, len(by_rung) - 2) * fit.stderr
    return Slope(float(fit.slope), (fit.slope - half, fit.slope + half), float(fit.pvalue), len(by_rung))


def differences(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """`one` less `other`, paired by student, teacher and seed."""
    keys = ["student", "teacher_params", "seed"]
    pairs = one.merge(other, on=keys, suffixes=("", "_other"), validate="one_to_one")
    return pairs.assign(loss=pairs["loss"] - pairs["loss_other"])


@dataclass(frozen=True)
class Estimate:
    """A mean in nats, its standard error and the degrees of freedom of that."""

    value: float
    error: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by t."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    def plus(self, other: "Estimate") -> "Estimate":
        """The sum with one of other runs, by Welch and Satterthwaite's degrees of freedom."""
        variances = self.error**2, other.error**2
        freedom = sum(variances) ** 2 / (variances[0] ** 2 / self.freedom + variances[1] ** 2 / other.freedom)
        return Estimate(self.value + other.value, math.sqrt(sum(variances)), freedom)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:+.4f} ({low:+.4f} to {high:+.4f})"


# The questions


def plain(frame: pd.DataFrame, loss: str = "student_loss") -> pd.DataFrame:
    """What the answers read, the loss under its own name."""
    return frame.assign(loss=frame[loss])


def optimum(frame: pd.DataFrame) -> JointFit:
    """Question 1: the joint model of the cells of `study2_optimum` alone."""
    return fit_joint(frame[list(FITTED)], metric="loss")


def optimum_row(fit: JointFit) -> dict[str, Any]:
    """The answer: `yes` by the status law alone."""
    row: dict[str, Any] = {"status": fit.status, "yes": fit.status == "law", "rests_on": " ".join(fit.rests_on)}
    for tokens in fit.budgets:
        found = fit.ratio_at(tokens)
        row |= {f"ratio at {tokens or 0:.0f}": found.value, f"set at {tokens or 0:.0f}": found.interval}
    return row


def growth(cells: pd.DataFrame) -> Slope:
    """Question 2: how the slope moves with every doubling of the tokens. Below zero: the best teacher grows."""
    budgets = np.log2(cells["data_tokens"].to_numpy(float))
    keys = ["student", "teacher_params", "seed"]
    centred = budgets - cells.groupby(keys)["data_tokens"].transform(lambda d: np.log2(d.astype(float)).mean())
    weights = pd.Series(np.asarray(centred), index=cells.index)
    each = (weights * cells["loss"]).groupby([cells[k] for k in keys]).sum() / (weights**2).groupby(
        [cells[k] for k in keys]
    ).sum()
    return slope_of(each.rename("loss").reset_index())


def starts(frame: pd.DataFrame) -> dict[str, Any]:
    """Questions 2: for each start its growth and its slope at each budget, and pruned less pretrained, paired."""
    taught = frame[frame["kd_weight"] > 0]
    found: dict[str, Any] = {}
    for start, cells in taught.groupby("init"):
        if cells["data_tokens"].nunique() > 1:
            found[f"{start}: growth per doubling"] = growth(cells)
        for tokens, mine in cells.groupby("data_tokens"):
            found[f"{start}: slope at {tokens:,.0f}"] = slope_of(mine)
    arms = dict(list(taught.groupby("init")))
    if {"pruned", "pretrained"} <= set(arms):
        keys = ["student", "teacher_params", "seed", "data_tokens"]
        both = arms["pretrained"].merge(arms["pruned"], on=keys, suffixes=("", "_other"), validate="one_to_one")
        found["pretrained less pruned: growth"] = growth(both.assign(loss=both["loss"] - both["loss_other"]))
    return found


def taught_less_direct(frame: pd.DataFrame) -> pd.DataFrame:
    """Controls of question 2: the best rung's mean loss, and every rung's, less that of direct training."""
    rows = []
    for (start, student, tokens), cells in frame.groupby(["init", "student", "data_tokens"]):
        direct = cells[cells["kd_weight"] == 0].set_index("seed")["loss"]
        taught = cells[cells["kd_weight"] > 0]
        if direct.empty or taught.empty:
            continue
        gain = taught["loss"] - taught["seed"].map(direct)
        by_rung = gain.groupby(taught["teacher"]).mean()
        row = {"start": start, "student": student, "tokens": int(tokens), "direct": direct.mean()}
        rows.append(row | {"mean gain": -gain.mean(), "best": by_rung.idxmin(), "its gain": -by_rung.min()})
    return pd.DataFrame(rows)


def seen(disjoint: pd.DataFrame, overlapping: pd.DataFrame) -> dict[str, Slope]:
    """Question 4: the slope on text behind the teacher's less that on its own text, at the budgets that both have."""
    pruned, found = disjoint[(disjoint["init"] == "pruned") & (disjoint["kd_weight"] > 0)], {}
    change = {}
    for tokens, cells in pruned.groupby("data_tokens"):
        other = overlapping[overlapping["data_tokens"] == tokens]
        if len(other):
            change[tokens] = differences(cells, other)
            found[f"at {tokens:,.0f}"] = slope_of(change[tokens])
    found["mean of the budgets"] = slope_of(pd.concat(change.values(), ignore_index=True))
    return found


def tuned(frame: pd.DataFrame, *, by: str = "student_loss_validation") -> pd.DataFrame:
    """Question 5: one row a student, teacher, budget and seed, its rate and KD weight chosen on the other seeds.

    Chosen by the mean of `by` over the other seeds, and judged by `loss` on the seed that is left out.
    """
    settings, rows = ["learning_rate", "kd_weight"], []
    for keys, cells in frame.groupby(["student", "teacher_params", "data_tokens"]):
        for seed in sorted(cells["seed"].unique()):
            others = cells[cells["seed"] != seed].groupby(settings)[by].mean()
            rate, weight = others.idxmin()
            mine = cells[(cells["seed"] == seed) & (cells["learning_rate"] == rate) & (cells["kd_weight"] == weight)]
            row = dict(zip(("student", "teacher_params", "data_tokens"), keys, strict=True)) | {"seed": seed}
            row |= {"student_params": mine["student_params"].iloc[0], "loss": mine["loss"].iloc[0]}
            rows.append(row | {"teacher_seed": seed, "learning_rate": rate, "kd_weight": weight})
    return pd.DataFrame(rows)


def recipe(frame: pd.DataFrame, usual: pd.DataFrame, one: pd.DataFrame) -> dict[str, Estimate]:
    """Question 5: what tuning changes of the contrast of the 900k teacher with the 120k one, and what is left of it.

    The change is paired by teacher, student and seed; its error is that of tuned less usual, pooled over all teachers,
    students and budgets. Added to the recipe's contrast, over the seeds of both studies, it is the contrast with tuned
    settings.

    Args:
        frame: cells of `study2_recipe`.
        usual: those of them at the recipe's rate and weight.
        one: study one's cells of the main arm.
    """
    picked, found = tuned(frame), {}
    keys = ["student", "teacher_params", "data_tokens", "seed"]
    pairs = picked.merge(usual[[*keys, "loss"]], on=keys, suffixes=("", "_usual"), validate="one_to_one")
    change = pairs.assign(loss=pairs["loss"] - pairs["loss_usual"])
    groups = change.groupby(keys[:3])["loss"]
    freedom = len(change) - groups.ngroups
    variance = float((change["loss"] - groups.transform("mean")).pow(2).sum() / freedom)
    for tokens, mine in change.groupby("data_tokens"):
        each = contrast(mine)
        count = len(each) * mine["student"].nunique()
        shift = Estimate(float(each.mean()), math.sqrt(2 * variance / count), freedom)
        both = (f[(f["data_tokens"] == tokens) & f["student"].isin(mine["student"])] for f in (one, usual))
        before = mean_of(pd.concat([contrast(cells) for cells in both]))
        found[f"recipe, both studies, {tokens:,.0f}"] = before
        found[f"tuned less recipe, {tokens:,.0f}"] = shift
        found[f"tuned, {tokens:,.0f}"] = before.plus(shift)
    return found


def stands(found: dict[str, Estimate]) -> str:
    """Whether a small teacher is better at the least budget and a large one at the most, with tuned settings."""
    first, last = [e for name, e in found.items() if name.startswith("tuned, ")]
    if first.interval[0] > 0 > last.interval[1]:
        return "stands"
    return "falls" if first.interval[1] < 0 or last.interval[0] > 0 else "undecided"


def contrast(cells: pd.DataFrame) -> pd.Series:
    """For each seed the loss under the 900k teacher less that under the 120k one, the mean over students."""
    by = cells.groupby(["seed", "student", "teacher_params"])["loss"].mean().unstack()
    return (by[LARGE] - by[SMALL]).groupby("seed").mean()


def mean_of(values: pd.Series) -> Estimate:
    """Of one value a seed."""
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))), len(values) - 1)


def rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean validation loss of each start, budget and rate over the tuning seeds, and which rate is taken."""
    found = frame.groupby(["init", "data_tokens", "learning_rate"])["student_loss_validation"].mean().reset_index()
    least = found.groupby(["init", "data_tokens"])["student_loss_validation"].transform("min")
    return found.assign(taken=found["student_loss_validation"] == least)


# Question 3


def foretold(one: pd.DataFrame, two: pd.DataFrame) -> pd.DataFrame:
    """For each pair of student and budget without a cell: each pair of teachers, and the odds of the larger one."""
    cells = pd.concat([frame[list(FITTED)] for frame in (one, two)], ignore_index=True)
    fit = fit_joint(cells, metric="loss")
    told, rows = forecast(fit), []
    for student, params, tokens in PAIRS:
        best = fit.best_teacher(params, tokens)
        for (small, large), odds in told.order(params, tokens, seeds=2).items():
            row = {"student": student, "data_tokens": tokens, "small": small, "large": large, "odds": odds}
            row |= {"p_best_small": best.probabilities.get(small), "p_best_large": best.probabilities.get(large)}
            ends = [x if math.isfinite(x) else None for x in best.interval]
            rows.append(row | {"best_low": ends[0], "best": best.params, "best_high": ends[1]})
    return pd.DataFrame(rows)


def judged(told: pd.DataFrame, came: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Question 3: Brier scores of the odds beside those of the nearest curve that was run and even odds, a row a curve.

    `regret`: of the likeliest rung, its mean loss less the least mean loss. `before`: cells that hold that curve.
    """
    rows = []
    for (student, tokens), odds in told.groupby(["student", "data_tokens"]):
        means = came[(came["student"] == student) & (came["data_tokens"] == tokens)].groupby("teacher")["loss"].mean()
        odds = odds[odds["small"].isin(means.index) & odds["large"].isin(means.index)]
        if odds.empty:
            continue
        larger = (means[odds["large"]].to_numpy() < means[odds["small"]].to_numpy()).astype(float)
        naive = _nearest(before, student, int(tokens), odds)
        best = {**dict(zip(odds["small"], odds["p_best_small"], strict=True))}
        best |= dict(zip(odds["large"], odds["p_best_large"], strict=True))
        taken = max(best, key=lambda name: best[name])
        row = {
            "student": student,
            "data_tokens": tokens,
            "pairs": len(odds),
            "brier": ((odds["odds"] - larger) ** 2).mean(),
        }
        row |= {"brier, nearest budget": ((naive - larger) ** 2).mean(), "brier, even odds": 0.25}
        row |= {"right": ((odds["odds"] > 0.5) == (larger > 0.5)).mean(), "taken": taken, "best": means.idxmin()}
        row |= {"probability of the best": best[means.idxmin()], "regret": means[taken] - means.min()}
        rows.append(row | {"regret of the mean rung": means.mean() - means.min()})
    return pd.DataFrame(rows)


def _nearest(before: pd.DataFrame, student: str, tokens: int, odds: pd.DataFrame) -> np.ndarray:
    """1 where the larger teacher of a pair won in the curve that is nearest of those that have both, else 0.

    Near in log student size and log tokens alike.
    """
    params = {name: size for name, size, _ in PAIRS}[student]
    means = before.groupby(["student_params", "data_tokens", "teacher"])["loss"].mean().unstack()
    sizes, budgets = (means.index.get_level_values(i).to_numpy(float) for i in (0, 1))
    means = means.iloc[np.argsort(np.hypot(np.log(sizes / params), np.log(budgets / tokens)))]
    won = []
    for small, large in odds[["small", "large"]].to_numpy():
        nearest = means[[small, large]].dropna().iloc[0]
        won.append(float(nearest[large] < nearest[small]))
    return np.array(won)


# Question 6


def one_loss(frame: pd.DataFrame, other: str, *, better: int, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Question 6: does the teacher of the least held-out loss win by another measure too? Over pairs of teachers.

    `discordant`: the share of pairs of one curve that the two measures order differently, by means over seeds;
    `across`: the same between the loss of one seed and the other measure of the other seed; `own`: of each measure
    between the two seeds, the mean of both, what noise alone does. `excess`: across less own, its interval by drawing
    rungs. `regret`: of the teacher with the least held-out loss, in the other measure; `range` of its means in a curve.
    `better`: 1 if a larger value of `other` is better, −1 if a smaller one is.
    """
    rng = np.random.default_rng(seed)
    curves = [_by_rung(cells, other, better) for _, cells in frame.groupby(["student", "data_tokens"])]
    rungs = np.array(sorted(frame["teacher_params"].unique()))
    drawn = [_discordance(curves, rng.choice(rungs, len(rungs)))["excess"] for _ in range(draws)]
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return _discordance(curves, rungs) | {"excess_low": float(low), "excess_high": float(high)}


def _by_rung(cells: pd.DataFrame, other: str, better: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of one curve the held-out losses and the other measure, less is better: a row a rung, a column a seed."""
    losses, others = (
        cells.pivot_table(index="teacher_params", columns="seed", values=name) for name in ("loss", other)
    )
    return losses, -better * others


def _discordance(curves: Sequence[tuple[pd.DataFrame, pd.DataFrame]], rungs: np.ndarray) -> dict[str, float]:
    """The numbers of `one_loss` over some rungs; one that was drawn twice makes no pair with itself."""

    def differ(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean(np.sign(one[i] - one[j]) != np.sign(other[i] - other[j])))

    rows = []
    for by_loss, by_other in curves:
        here = rungs[np.isin(rungs, by_loss.index)]
        i, j = np.triu_indices(len(here), 1)
        i, j = i[here[i] != here[j]], j[here[i] != here[j]]
        loss, other = (table.loc[here].to_numpy() for table in (by_loss, by_other))
        means = other.mean(1)
        row = {"discordant": differ(loss.mean(1), means)}
        row["across"] = (differ(loss[:, 0], other[:, 1]) + differ(loss[:, 1], other[:, 0])) / 2
        row["own"] = (differ(loss[:, 0], loss[:, 1]) + differ(other[:, 0], other[:, 1])) / 2
        row |= {"regret": means[loss.mean(1).argmin()] - means.min(), "range": np.ptp(means)}
        rows.append(row)
    found = pd.DataFrame(rows).mean().to_dict()
    return found | {"excess": found["across"] - found["own"]}
