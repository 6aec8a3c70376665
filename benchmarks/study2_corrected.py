"""Corrections and additions to the registered analysis of study two, made before any cell was read (docs/study2.md).

The registered numbers stay in `study2_answers.py` and are printed too. Where a verdict differs the question is open.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.study2_answers import (
    FITTED,
    LEVEL,
    PAIRS,
    Slope,
    differences,
    slope_of,
    starts,
    tuned,
)
from capacity_gap.fit import JointFit, fit_joint
from capacity_gap.fit.joint_fit import CONDITIONS
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.intervals import marks

Tables = tuple[pd.DataFrame, pd.DataFrame]  # of one curve: losses and the other measure, a row a rung, a column a seed


def excess(frame: pd.DataFrame, other: str, *, better: int, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Question 6 without the bias of the registered excess, which grows with the noise of the second measure.

    With A = mean of sign × sign over pairs of rungs (ties count 0), two noisy views of one order have
    A_across = √(A_loss · A_other). `excess` is half of what is lacking to that: 0 if both order teachers alike.
    """
    rng = np.random.default_rng(seed)
    curves = [_tables(cells, other, better) for _, cells in frame.groupby(["student", "data_tokens"])]
    rungs = np.array(sorted(frame["teacher_params"].unique()))
    drawn = [_excess(curves, rng.choice(rungs, len(rungs))) for _ in range(draws)]
    low, high = np.nanquantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {"excess": _excess(curves, rungs), "excess_low": float(low), "excess_high": float(high)}


def _tables(cells: pd.DataFrame, other: str, better: int) -> Tables:
    loss, value = (cells.pivot_table(index="teacher_params", columns="seed", values=name) for name in ("loss", other))
    return loss, -better * value


def _excess(curves: Sequence[Tables], rungs: np.ndarray) -> float:
    own_loss, own_other, across = 0.0, 0.0, 0.0
    for by_loss, by_other in curves:
        here = rungs[np.isin(rungs, by_loss.index)]
        i, j = np.triu_indices(len(here), 1)
        loss, other = (np.sign(t.loc[here].to_numpy()[i] - t.loc[here].to_numpy()[j]) for t in (by_loss, by_other))
        own_loss += float((loss[:, 0] * loss[:, 1]).sum())
        own_other += float((other[:, 0] * other[:, 1]).sum())
        across += float((loss[:, 0] * other[:, 1] + loss[:, 1] * other[:, 0]).sum()) / 2
    pairs = sum(len(t[0]) * (len(t[0]) - 1) / 2 for t in curves)
    return float((np.sqrt(max(own_loss, 0.0) * max(own_other, 0.0)) - across) / 2 / pairs)


def pooled(*parts: pd.DataFrame) -> JointFit:
    """One model of cells of both studies: of the first two parts it is question 1's secondary model."""
    columns = [*FITTED, *(c for c in ("family", *CONDITIONS) if all(c in frame for frame in parts))]
    return fit_joint(pd.concat([frame[columns] for frame in parts], ignore_index=True), metric="loss")


def set_held(told: pd.DataFrame, came: pd.DataFrame) -> pd.DataFrame:
    """Question 3: whether the 95 % set of the forecast holds the rung of the least mean loss, a row a curve."""
    rows = []
    for (student, tokens), odds in told.groupby(["student", "data_tokens"]):
        mine = came[(came["student"] == student) & (came["data_tokens"] == tokens)]
        if mine.empty:
            continue
        means = mine.groupby(["teacher", "teacher_params"])["loss"].mean()
        best, params = means.idxmin()
        low, high = float(odds["best_low"].fillna(0).iloc[0]), float(odds["best_high"].fillna(np.inf).iloc[0])
        row = {"student": student, "tokens": short_scale(tokens), "95 % set of the best teacher": marks((low, high))}
        rows.append(row | {"best rung": best, "in the set": "yes" if low <= params <= high else "no"})
    return pd.DataFrame(rows)


def picks(grid: pd.DataFrame) -> pd.DataFrame:
    """Question 5: how many of the chosen settings are the lowest, middle and highest that were tried."""
    chosen = tuned(grid)
    rates = grid.groupby("student")["learning_rate"].agg(lambda r: tuple(sorted(r.unique())))
    places = [rates[s].index(rate) for s, rate in zip(chosen["student"], chosen["learning_rate"], strict=True)]
    weights = sorted(grid["kd_weight"].unique())
    chosen = chosen.assign(rate=places, weight=chosen["kd_weight"].map(weights.index))
    rows = []
    for (tokens, teacher), mine in chosen.groupby(["data_tokens", "teacher_params"]):
        row = {"tokens": short_scale(tokens), "teacher": short_scale(teacher)}
        for name, of in (("rate", rates.iloc[0]), ("weight", weights)):
            row[f"{name}: lowest, middle, highest"] = ", ".join(str((mine[name] == k).sum()) for k in range(len(of)))
        rows.append(row)
    return pd.DataFrame(rows)


def by_student(frame: pd.DataFrame) -> dict[str, dict[str, Slope]]:
    """Question 2: slopes and growth for each student alone. An interval over rungs is conditional on its students: what
    tilts a whole curve moves all rungs together and does not show in their scatter."""
    return {str(student): starts(cells) for student, cells in frame.groupby("student")}


def seen_by_curve(disjoint: pd.DataFrame, overlapping: pd.DataFrame) -> dict[str, Slope]:
    """Question 4: the change of slope for each student and budget, whose spread the pooled interval leaves out."""
    pruned = disjoint[(disjoint["init"] == "pruned") & (disjoint["kd_weight"] > 0)]
    found = {}
    for (student, tokens), cells in pruned.groupby(["student", "data_tokens"]):
        other = overlapping[(overlapping["data_tokens"] == tokens) & (overlapping["student"] == student)]
        if len(other):
            found[f"{student} at {tokens:,.0f}"] = slope_of(differences(cells, other))
    return found


def hedged_brier(told: pd.DataFrame, came: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Question 3: the baseline "as in the nearest curve" with odds instead of certainty, a row a curve.

    Its odds are how often one curve of `before` orders a pair as its own nearest other curve does.
    """
    means = before.groupby(["student_params", "data_tokens", "teacher"])["loss"].mean().unstack()
    hedge, rows = _agreement(means), []
    sizes = {name: params for name, params, _ in PAIRS}
    for (student, tokens), odds in told.groupby(["student", "data_tokens"]):
        mine = came[(came["student"] == student) & (came["data_tokens"] == tokens)]
        losses = mine.groupby("teacher")["loss"].mean()
        odds = odds[odds["small"].isin(losses.index) & odds["large"].isin(losses.index)]
        if odds.empty:
            continue
        nearest = _near(means, sizes[student], tokens)
        won = losses[odds["large"]].to_numpy() < losses[odds["small"]].to_numpy()
        said = [_said(nearest, *pair) for pair in odds[["small", "large"]].to_numpy()]
        base = np.where(said, hedge, 1 - hedge)
        row = {"student": student, "data_tokens": tokens, "pairs": len(odds), "hedge": hedge}
        rows.append(row | {"brier": ((odds["odds"] - won) ** 2).mean(), "hedged": ((base - won) ** 2).mean()})
    return pd.DataFrame(rows)


def _near(means: pd.DataFrame, params: float, tokens: float) -> pd.DataFrame:
    """The curves, nearest first in log student size and log tokens."""
    sizes, budgets = (means.index.get_level_values(i).to_numpy(float) for i in (0, 1))
    return means.iloc[np.argsort(np.hypot(np.log(sizes / params), np.log(budgets / tokens)))]


def _said(nearest: pd.DataFrame, small: str, large: str) -> bool:
    first = nearest[[small, large]].dropna().iloc[0]
    return bool(first[large] < first[small])


def _agreement(means: pd.DataFrame) -> float:
    """How often a curve and its nearest other curve order a pair of teachers alike."""
    alike = []
    for params, tokens in means.index:
        own, others = means.loc[(params, tokens)].dropna(), means.drop((params, tokens))
        nearest = _near(others, params, tokens)
        for k, small in enumerate(own.index):
            for large in own.index[k + 1 :]:
                if nearest[[small, large]].dropna().empty:
                    continue
                alike.append(_said(nearest, small, large) == bool(own[large] < own[small]))
    return float(np.mean(alike))
