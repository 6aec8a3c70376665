"""Score against training compute: what was paid for what a model can do, with the published models and the Pareto line.

Compute is counted by the conventions of `accounting.py`, for our records and for published models alike, in one of
three ways: `student` (its own training: 6·N·D), `distillation` (and the teacher's forward passes: + 2·N_T·D), `total`
(and the training of the teacher that it comes from).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capacity_gap import accounting
from capacity_gap.errors import UserError, choose
from capacity_gap.evaluate.scores import metric_direction

PUBLISHED = Path(__file__).with_name("published.csv")
PAPER = ("mmlu", "ceval-valid", "drop", "humaneval", "bbh", "gsm8k")
COMPUTE = {
    "student": ("train_flops",),
    "distillation": ("train_flops", "teacher_flops"),
    "total": ("train_flops", "teacher_flops", "teacher_train_flops"),
}
COLUMNS = ["name", "kind", "flops", "score"]


def published_points(metric: str, compute: str = "distillation") -> pd.DataFrame:
    """The published models that have `metric`: `name, kind, flops, score` (0 to 1), one row a model.

    Args:
        metric: a benchmark of the paper, or `average` of its six.
        compute: a key of `COMPUTE`.
    """
    table = pd.read_csv(PUBLISHED)
    named = metric.removeprefix("metrics/")
    if named != "average" and named not in PAPER:
        return pd.DataFrame(columns=COLUMNS)
    score = table[list(PAPER)].mean(axis=1) if named == "average" else table[named]
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


def record_points(frame: pd.DataFrame, metric: str, compute: str = "distillation") -> pd.DataFrame:
    """Our finished cells that have `metric`: `name, kind, flops, score`, and under `total` their teachers too.

    Raises:
        UserError: no record has it.
    """
    column = metric if metric in frame else f"metrics/{metric}"
    if column not in frame or not (done := frame[(frame["status"] == "done") & frame[column].notna()]).shape[0]:
        scores = [str(c) for c in frame if str(c).startswith("metrics/") and str(c).count("/") == 1]
        raise UserError(
            f"no finished record has {metric}. Recorded scores: {', '.join(scores) or 'none'}; losses such as "
            "student_loss may be named too. Benchmarks are chosen with evaluate=, when cells are run."
        )
    flops = done[[c for c in COMPUTE[compute] if c in done]].astype(float).fillna(0).sum(axis=1)
    names = done["student"].astype(str) + " from " + done["teacher"].astype(str)
    return pd.DataFrame({"name": names, "kind": "ours", "flops": flops, "score": done[column].astype(float)})


def pareto(points: pd.DataFrame, *, higher_is_better: bool) -> pd.DataFrame:
    """The points that no cheaper or equally dear one reaches: the frontier, cheapest first."""
    sign = -1.0 if higher_is_better else 1.0
    ordered = points.assign(_cost=sign * points["score"]).sort_values(["flops", "_cost"])
    best = np.minimum.accumulate(ordered["_cost"].to_numpy(float))
    ahead = np.concatenate([[np.inf], best[:-1]])
    return ordered[ordered["_cost"].to_numpy(float) < ahead].drop(columns="_cost")


def frontier_points(frame: pd.DataFrame | None, metric: str, compute: str = "distillation") -> pd.DataFrame:
    """Published models and our cells in one table, with a column `pareto`.

    Raises:
        UserError: there is no point at all, or nothing says which way is better.
    """
    choose("--compute", compute, COMPUTE)
    parts: Sequence[pd.DataFrame] = [published_points(metric, compute)]
    if frame is not None and metric != "average":
        parts = [*parts, record_points(frame, metric, compute)]
    points = pd.concat([p for p in parts if len(p)], ignore_index=True) if any(map(len, parts)) else None
    if points is None:
        raise UserError(
            f"there is nothing to draw for {metric}: published models have {', '.join(PAPER)} and their average. "
            "Give a store, or a table of records, that has it."
        )
    free = points["flops"] <= 0  # a log axis has no place for cells without training
    points = points[~free].reset_index(drop=True)
    best = pareto(points, higher_is_better=better_up(frame, metric))
    return points.assign(pareto=points.index.isin(best.index))


def better_up(frame: pd.DataFrame | None, metric: str) -> bool:
    """Whether more of `metric` is better."""
    if metric == "average":
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
    axes.set_ylabel("average of the paper's six benchmarks" if metric == "average" else metric)
    axes.grid(alpha=0.25, lw=0.5)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _name_points(axes: Axes, points: pd.DataFrame) -> None:
    for name, x, y in zip(points["name"], points["flops"], points["score"], strict=True):
        axes.annotate(name, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7)
