"""The figures of docs/study2.md, from its records."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.study2_answers import slope_of
from capacity_gap.report.plots import BAND, BEST, BUDGETS, POINT
from capacity_gap.settings.scales import short_scale

TICKS = (120_000, 250_000, 500_000, 1_000_000)


def plot_forecast(told: pd.DataFrame, came: pd.DataFrame) -> Figure:
    """Question 3, a panel a curve: what came (losses less the curve's mean), and the set the forecast had named."""
    curves = list(told.groupby(["data_tokens", "student"]))
    figure, panels = _panels(len(curves))
    for axes, ((tokens, student), odds) in zip(panels, curves, strict=True):
        mine = came[(came["student"] == student) & (came["data_tokens"] == tokens)]
        sizes, low, high = mine["teacher_params"], odds["best_low"].fillna(0).iloc[0], odds["best_high"].iloc[0]
        edges = sizes.min() / 1.1, sizes.max() * 1.6
        ends = max(low, edges[0]), min(high, edges[1]) if high == high else edges[1]
        axes.axvspan(*ends, color=BAND, alpha=0.25, lw=0, label="forecast, 95 %")
        axes.plot(sizes, mine["loss"] - mine["loss"].mean(), ".", color=POINT, alpha=0.45, ms=5, label="a seed")
        means = mine.groupby("teacher_params")["loss"].mean() - mine["loss"].mean()
        axes.plot(means.index, means, color=POINT, lw=1.2, label="mean of seeds")
        axes.plot(means.idxmin(), means.min(), "*", color=BEST, ms=11, ls="none", label="best teacher")
        axes.set_xlim(*edges)
        axes.set_title(f"student {student}, {short_scale(tokens)} tokens", fontsize=9)
    panels[0].legend(fontsize=7, loc="upper right")
    figure.supxlabel("teacher parameters", fontsize=9)
    panels[0].set_ylabel("loss less the mean of the curve, nats", fontsize=9)
    return figure


def plot_starts(frame: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Question 2, a panel a start: mean loss of both students less its mean over rungs, a fitted slope a budget."""
    taught = frame[frame["kd_weight"] > 0]
    present = [start for start in names if start in set(taught["init"])]
    budgets = sorted(taught["data_tokens"].unique())
    figure, panels = _panels(len(present))
    for axes, start in zip(panels, present, strict=True):
        for tokens, colour in zip(budgets, BUDGETS, strict=False):
            mine = taught[(taught["init"] == start) & (taught["data_tokens"] == tokens)]
            if mine.empty:
                continue
            means = mine.groupby("teacher_params")["loss"].mean()
            means -= means.mean()
            slope = slope_of(mine)
            sizes = means.index.to_numpy(float)
            axes.plot(sizes, means, "o", color=colour, ms=3.5)
            line = slope.value * (np.log(sizes) - np.log(sizes).mean())
            half = (slope.interval[1] - slope.interval[0]) / 2
            label = f"{short_scale(tokens)} tokens: {slope.value:+.3f} ± {half:.3f}"
            axes.plot(sizes, line, color=colour, lw=1.3, label=label)
        axes.set_title(f"{names[start]} start", fontsize=9)
        axes.legend(fontsize=7, title="slope and 95 % half width, nats per unit", title_fontsize=7)
    figure.supxlabel("teacher parameters", fontsize=9)
    panels[0].set_ylabel("loss less the mean over rungs, nats", fontsize=9)
    return figure


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(3.1 * count, 3.2), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks(TICKS)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_scale(count)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=7)
        axes.axhline(0, color="#999999", lw=0.6)
        axes.grid(alpha=0.25, lw=0.5)
    return figure, panels
