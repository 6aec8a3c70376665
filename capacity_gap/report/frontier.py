"""Score against training compute: what was paid for what a model can do, with the published models and the Pareto line.

Compute is counted as in `models/accounting.py`, for our records and for published models alike, in one of three ways:
 `student` (its own training: 6·N·D), `distillation` (and the teacher's forward passes: + 2·N_T·D), `total`
(and the training of the teacher that it comes from). A record that lacks a part of the count, as those of published
teachers lack what their training cost, is left out and named: not known is not nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capacity_gap.evaluate.task_scores import metric_direction
from capacity_gap.evaluate.tasks import PAPER
from capacity_gap.models import accounting
from capacity_gap.records import scores_of
from capacity_gap.records.tables import numbers
from capacity_gap.settings.errors import UserError, choose
from capacity_gap.settings.scales import short_scale

PUBLISHED = Path(__file__).with_name("published.csv")
AVERAGE = "average"  # of the six
COMPUTE = {
    "student": ("train_flops",),
    "distillation": ("train_flops", "teacher_flops"),
    "total": ("train_flops", "teacher_flops", "teacher_train_flops"),
}
COLUMNS = ["name", "kind", "flops", "score"]
MOST_NAMED = 5  # cells that one note names


def published_points(metric: str, compute: str = "distillation") -> pd.DataFrame:
    """The published models that have `metric`: `name, kind, flops, score` (0 to 1), one row a model.

    Args:
        metric: a benchmark of the paper, or `average` of its six.
        compute: a key of `COMPUTE`.
    """
    table = pd.read_csv(PUBLISHED)
    named = metric.removeprefix("metrics/")
    if named != AVERAGE and named not in PAPER:
        return pd.DataFrame(columns=COLUMNS)
    score = table[list(PAPER)].mean(axis=1) if named == AVERAGE else table[named]
    flops = [_published_flops(row, table, compute) for row in table.to_dict("records")]
    return pd.DataFrame({"name": table["name"], "kind": table["kind"], "flops": flops, "score": score / 100})


def _published_flops(row: dict[Any, Any], table: pd.DataFrame, compute: str) -> float:
    spent = {"train_flops": accounting.train_flops(_shape(row), int(row["train_tokens"]))}
    if isinstance(row["teacher"], str):
        (teacher,) = table[table["name"] == row["teacher"]].to_dict("records")
        spent["teacher_flops"] = accounting.forward_flops(_shape(teacher), int(row["teacher_forward_tokens"]))
        spent["teacher_train_flops"] = accounting.train_flops(_shape(teacher), int(teacher["train_tokens"]))
    return sum(spent.get(part, 0.0) for part in COMPUTE[compute])


def _shape(row: dict[Any, Any]) -> dict[str, Any]:
    """The config.json of a Llama of this size."""
    return {
        "model_type": "llama",
        "num_hidden_layers": int(row["layers"]),
        "hidden_size": int(row["hidden"]),
        "num_attention_heads": int(row["heads"]),
        "num_key_value_heads": int(row["heads"]),
        "intermediate_size": int(row["neurons"]),
        "vocab_size": int(row["vocabulary"]),
        "tie_word_embeddings": False,
    }


def record_points(frame: pd.DataFrame, metric: str, compute: str = "distillation") -> tuple[pd.DataFrame, list[str]]:
    """Our finished cells that have `metric` and all of `compute`, as `name, kind, flops, score`; and notes on the rest.

    Args:
        frame: records, or a table with their columns. Without `status` every row counts as finished.
        metric: a recorded column, a benchmark, or `average` of the paper's six.
        compute: a key of `COMPUTE`.

    Raises:
        UserError: no record has the metric, none has all of the compute, or a cell holds text for a number.
    """
    finished = frame[frame["status"] == "done"] if "status" in frame else frame
    score = _score(finished, metric)
    scored, score = finished[score.notna()], score[score.notna()]
    if scored.empty:
        raise UserError(_no_score(finished, metric))
    parts = numbers(scored.reindex(columns=list(COMPUTE[compute])), COMPUTE[compute])
    known = parts.notna().all(axis=1)
    notes = _without_compute(parts[~known], _names(scored[~known]), compute)
    if not known.any():
        less = " Published teachers' training is not counted: --compute distillation or student asks for less."
        raise UserError(f"{'; '.join(notes)}.{less if compute == 'total' else ''}")
    points = pd.DataFrame({"name": _names(scored), "kind": "ours", "flops": parts.sum(axis=1), "score": score})
    return points[known], notes


def _score(frame: pd.DataFrame, metric: str) -> pd.Series:
    """The column that `metric` names, missing where a row has none; the average only of rows that have all six."""
    if metric.removeprefix("metrics/") == AVERAGE:
        columns = [f"metrics/{task}" for task in PAPER]
        six = numbers(frame.reindex(columns=columns), columns)
        return six.mean(axis=1, skipna=False)
    column = metric if metric in frame else f"metrics/{metric}"
    return numbers(frame, [column])[column] if column in frame else pd.Series(np.nan, index=frame.index)


def _no_score(finished: pd.DataFrame, metric: str) -> str:
    """What to say when no row has `metric`."""
    scores = scores_of(finished)
    six = f" (the paper's six: {', '.join(PAPER)})" if metric.removeprefix("metrics/") == AVERAGE else ""
    return (
        f"no finished record has {metric}{six}. Recorded scores: {', '.join(scores) or 'none'}; --metric names one of "
        "them, or a loss such as student_loss. Benchmarks are chosen with evaluate=, when cells are run."
    )


def _names(frame: pd.DataFrame) -> pd.Series:
    """`student from teacher`, by their scales where they have no names."""
    return pd.Series([_name(row) for row in frame.to_dict("records")], index=frame.index, dtype=object)


def _name(row: dict[Any, Any]) -> str:
    named = [(row.get(who), row.get(f"{who}_params", np.nan)) for who in ("student", "teacher")]
    return " from ".join(str(s) if not pd.isna(s) else short_scale(float(n)) or "?" for s, n in named)


def _without_compute(parts: pd.DataFrame, names: pd.Series, compute: str) -> list[str]:
    """A line on the rows that lack a part of the count, if there are any."""
    if parts.empty:
        return []
    lacking = ", ".join(str(c) for c in parts if parts[c].isna().any())
    some = list(dict.fromkeys(names))
    more = f" and {len(some) - MOST_NAMED} more" if len(some) > MOST_NAMED else ""
    return [f"{len(parts)} cells lack {lacking} of --compute {compute}: {', '.join(some[:MOST_NAMED])}{more}"]


def pareto(points: pd.DataFrame, *, higher_is_better: bool) -> pd.DataFrame:
    """The points that no cheaper or equally dear one reaches: the frontier, cheapest first."""
    sign = -1.0 if higher_is_better else 1.0
    ordered = points.assign(_cost=sign * points["score"]).sort_values(["flops", "_cost"])
    best = np.minimum.accumulate(ordered["_cost"].to_numpy(float))
    ahead = np.concatenate([[np.inf], best[:-1]])
    return ordered[ordered["_cost"].to_numpy(float) < ahead].drop(columns="_cost")


def frontier_points(
    frame: pd.DataFrame | None, metric: str, compute: str = "distillation"
) -> tuple[pd.DataFrame, list[str]]:
    """Published models and our cells in one table, with a column `pareto`; and notes on the cells that are left out.

    Raises:
        UserError: there is no point at all, none of ours where there are records, or nothing says which way is better.
    """
    choose("--compute", compute, COMPUTE)
    ours, notes = (None, []) if frame is None else record_points(frame, metric, compute)
    parts = [p for p in (published_points(metric, compute), ours) if p is not None and len(p)]
    points = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    free = points["flops"] <= 0  # a log axis has no place for cells without training
    if free.any():
        notes = [*notes, f"{free.sum()} cells left out: they were not trained, and a log axis has no place for them"]
    points = points[~free].reset_index(drop=True)
    if points.empty:
        raise UserError(
            f"there is nothing to draw for {metric}: published models have {', '.join(PAPER)} and their average. "
            f"Give a store, or a table of records, that has it.{''.join(f' {n}.' for n in notes)}"
        )
    best = pareto(points, higher_is_better=better_up(frame, metric))
    return points.assign(pareto=points.index.isin(best.index)), notes


def better_up(frame: pd.DataFrame | None, metric: str) -> bool:
    """Whether more of `metric` is better."""
    if metric.removeprefix("metrics/") == AVERAGE:
        return True
    column = metric if frame is None or metric in frame else f"metrics/{metric}"
    return metric_direction(column, frame) > 0


def plot_frontier(points: pd.DataFrame, metric: str, compute: str, *, higher_is_better: bool) -> Figure:
    """The figure: a marker a kind of model, the Pareto line as steps through the points that it is made of."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    for marker, (kind, group) in zip("osD^vPX", points.groupby("kind", sort=True), strict=False):
        axes.plot(group["flops"], group["score"], marker, ms=6, alpha=0.8, label=str(kind))
    line = pareto(points, higher_is_better=higher_is_better)
    axes.plot(
        line["flops"], line["score"], drawstyle="steps-post", color="#222222", lw=1, label="Pareto line", zorder=0
    )
    _name_points(axes, points if len(points) <= 12 else line)
    axes.margins(x=0.18, y=0.12)
    words = {"student": "the model's own", "distillation": "with the teacher's forward passes", "total": "in total"}
    axes.set_xlabel(f"training compute, FLOPs ({words[compute]})")
    axes.set_ylabel("average of the paper's six benchmarks" if metric == AVERAGE else metric)
    axes.grid(alpha=0.25, lw=0.5)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _name_points(axes: Axes, points: pd.DataFrame) -> None:
    for name, x, y in zip(points["name"], points["flops"], points["score"], strict=True):
        axes.annotate(name, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7)
