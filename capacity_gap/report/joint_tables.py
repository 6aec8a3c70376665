"""What the model of all cells says, as tables and a figure."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from capacity_gap.fit.joint_fit import JointFit
from capacity_gap.report.plots import POINT
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.intervals import ends, marks

Table = tuple[list[str], list[list[str]]]
POINTS = 60  # of a line in the figure
WIDEST = 4  # panels beside one another
LOWEST, HIGHEST = 0.5, 64.0  # ratios that are drawn
PAPER = 2.5


def ratio(params: float, interval: Sequence[float], student: float) -> str:
    """A best teacher and its set as ratios to its student; ≥ and ≤ where the set is open."""
    low, high = ends([x / student for x in interval])
    said = marks((low, high), "{:.1f}".format)
    return said if low is None or high is None else f"{params / student:.1f} ({said})"


def best_table(fit: JointFit) -> Table:
    """Best ratio with its set, and the likeliest rung, for each student and budget."""
    budgets, rows = fit.budgets, []
    for name, params in fit.students.items():
        cells = []
        for tokens in budgets:
            best = fit.best_teacher(params, tokens)
            likely = max(best.probabilities, key=lambda n: best.probabilities[n])
            sure = f"{likely} {best.probabilities[likely]:.0%}"
            cells.append(f"{ratio(best.params, best.interval, params)}; {sure}" if fit.curve.powers else sure)
        rows.append([name, *cells])
    return ["student", *(f"{short_scale(n)} tokens" if n else "best teacher / student" for n in budgets)], rows


def even_table(fit: JointFit, pair: tuple[float, float] | None = None) -> Table:
    """Tokens above which the larger of two teachers wins, for each student; no rows where all have one budget."""
    rows = []
    for name, params in fit.students.items() if "d" in fit.curve.terms else ():
        found = fit.break_even(params, *(pair or (None, None)))
        tokens = short_scale(found.tokens) if math.isfinite(found.tokens) else "–"
        per = f"{found.tokens / params:.1f}" if math.isfinite(found.tokens) else "–"
        rows.append([name, tokens, marks(found.interval), per, "yes" if found.established else "no"])
    return ["student", "tokens", "95 % set", "tokens a parameter", "established"], rows


def plot_joint(fit: JointFit) -> Figure:
    """The best teacher over its student: against tokens, a panel a student, or against students where all budgets are
    alike. Bands are 95 % sets, which may be open at an end; dotted: no optimum was established.
    """
    sizes, budgets = list(fit.students.items()), fit.budgets
    alone = budgets == [None]
    shown = [("all students", sizes[0][1])] if alone else sizes
    width = min(len(shown), WIDEST)
    rows = math.ceil(len(shown) / width)
    figure = Figure(figsize=(max(5.2, 2.9 * width), 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, width, squeeze=False, sharex=True, sharey=True).flatten()
    ticks = [size for _, size in sizes] if alone else [float(x or 0) for x in budgets]
    at = np.geomspace(ticks[0], ticks[-1], POINTS)
    ends = [PAPER / 2, 2 * PAPER]
    for axes, (name, size) in zip(panels, shown, strict=False):
        found = [(x, fit.optimum(x)) if alone else (size, fit.optimum(size, x)) for x in at]
        ends += _panel(axes, at, found, ticks, sure=fit.status in ("law", "provisional"))
        axes.set_title(name if alone else f"student {name}", fontsize=9)
    for unused in panels[len(shown) :]:
        unused.set_visible(False)
    panels[0].set_ylim(max(LOWEST, min(ends) / 1.2), min(HIGHEST, max(ends) * 1.2))
    panels[0].legend(loc="best", fontsize=6, frameon=False)
    figure.supxlabel("student parameters" if alone else "tokens of distillation", fontsize=9)
    figure.supylabel("best teacher / student", fontsize=9)
    figure.suptitle(f"one model of all {len(fit.joint.cells.y)} cells: {fit.status}", fontsize=9)
    return figure


def _panel(axes, at, found, ticks: Sequence[float], *, sure: bool) -> list[float]:  # type: ignore[no-untyped-def]
    """Draws one panel; returns how far it reaches down and up."""
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    values = np.array([best.value / size for size, best in found])
    low, high = (np.array([best.interval[i] / size for size, best in found]) for i in (0, 1))
    low, high = np.maximum(low, LOWEST / 9), np.minimum(high, 9 * HIGHEST)
    axes.plot(at, values, color=POINT, lw=1.5, ls="-" if sure else ":", label="estimate")
    axes.fill_between(at, low, high, color=POINT, alpha=0.15, lw=0, label="95 % set")
    axes.axhline(PAPER, color="#999999", lw=0.8, ls="--", label="the paper's 2.5×")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_scale(count)))
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda r, _: f"{r:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, lw=0.5)
    return [float(np.nanmin(low)), float(np.nanmax(high))]
