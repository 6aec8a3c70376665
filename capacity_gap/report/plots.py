"""Figures from a fitted table, for PNG and SVG. No global state: every function returns a new figure."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from capacity_gap.fit.frame import Curve
from capacity_gap.fit.law_fit import LawFit
from capacity_gap.fit.optimum import FLAT_NATS, Located, Optimum
from capacity_gap.fit.valley import Valley
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.curve_words import STATUSES
from capacity_gap.wording.fit_words import LAWS
from capacity_gap.wording.intervals import span

POINT, LINE, BEST, BAND = "#4c6a92", "#222222", "#c1432e", "#e9a23b"
BUDGETS = (POINT, "#2a9d8f", "#e9a23b", "#8d5a97", "#555555")
WIDEST = 6  # settings that find room beside one another
LOSSES = (None, "loss", "student_loss")  # the columns that a fit takes when none is named


def plot_curves(located: Located, *, metric: str | None = None) -> Figure:
    """Loss against teacher scale, a panel a curve: means over seeds with their standard errors, the fitted form, the
    optimum with its interval, and the flat region. `metric`: what was fitted, if not the held-out loss.
    """
    places, rows, columns = _places(located.found)
    figure = Figure(figsize=(4.2 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for i, (curve, optimum) in enumerate(zip(located.found, located.optima, strict=True)):
        error = np.sqrt(located.noise.variance[i, : len(curve.x)])
        _panel(axes[places[i]], curve, optimum, located.valley(i), error)
        axes[places[i]].set_title(f"{', '.join(_named(curve, located.found))}\n{_said(optimum)}", fontsize=9)
    for unused in set(range(rows * columns)) - set(places):
        axes[unused].set_visible(False)
    figure.legend(
        handles=_legend(located), loc="outside upper center", ncols=2 if columns < 3 else 5, fontsize=7, frameon=False
    )
    figure.supxlabel("teacher parameters (above: teacher / student)", fontsize=9)
    figure.supylabel("held-out loss, nats per token" if metric in LOSSES else metric, fontsize=9)
    return figure


def _places(found: Sequence[Curve]) -> tuple[list[int], int, int]:
    """The panel of each curve, row by row, and how many rows and columns: students and settings, where these cross."""
    students = sorted({_student(c) for c in found})
    settings = sorted({_setting(c) for c in found})
    across, down = [students.index(_student(c)) for c in found], [settings.index(_setting(c)) for c in found]
    columns, rows = len(students), len(settings)
    if rows > columns:
        across, down, columns, rows = down, across, rows, columns
    if rows > 1 and columns <= WIDEST:
        return [i * columns + j for i, j in zip(down, across, strict=True)], rows, columns
    width = min(3 if len(found) < 12 else 4, len(found))
    return list(range(len(found))), math.ceil(len(found) / width), width


def _student(curve: Curve) -> tuple[float, str]:
    return curve.student_params, str(curve.key["student"])


def _setting(curve: Curve) -> tuple[tuple[float, str], ...]:
    """All that tells a curve apart but its student; numbers sort as numbers."""
    values = [v for k, v in sorted(curve.key.items()) if k != "student"]
    return tuple((float(v), "") if isinstance(v, (int, float, np.number)) else (math.inf, str(v)) for v in values)


def _legend(located: Located) -> list[Artist]:
    """What the marks of the panels mean; only those that are there."""
    statuses = {o.status for o in located.optima}
    marks: list[Artist] = [
        Line2D([], [], color=POINT, marker="o", ms=4, ls="", label="mean over seeds ± standard error")
    ]
    if "interior" in statuses:
        marks.append(Line2D([], [], color=LINE, lw=1, label="fitted curve"))
        marks.append(Line2D([], [], color=BEST, marker="D", ms=6, ls="", label="optimum, 95 % interval"))
    if statuses - {"interior"}:
        marks.append(Line2D([], [], color=LINE, lw=1, ls=":", label="fitted, but its minimum is not beyond noise"))
    if any(None not in o.flat_interval for o in located.optima):
        marks.append(Patch(color=BAND, alpha=0.18, label=f"within {FLAT_NATS} of the fitted minimum"))
    return marks


def _panel(axes: Axes, curve: Curve, optimum: Optimum, valley: Valley | None, error: np.ndarray) -> None:
    axes.set_xscale("log")
    if valley:
        grid = np.linspace(curve.x[0], curve.x[-1], 200)
        sure = optimum.status == "interior"
        axes.plot(np.exp(grid), valley.value(grid), color=LINE, lw=1, ls="-" if sure else ":")
        low, high = optimum.flat_interval
        if low is not None and high is not None:
            axes.axvspan(low, high, color=BAND, alpha=0.18, lw=0)
    axes.errorbar(curve.teacher_params, curve.loss, yerr=error, fmt="o", color=POINT, ms=4, lw=0.8, alpha=0.8)
    if optimum.teacher_params is not None and valley:
        low, high = optimum.interval
        best = float(valley.value(math.log(optimum.teacher_params)))
        reach = [[optimum.teacher_params - (low or 0)], [(high or 0) - optimum.teacher_params]]
        axes.errorbar(optimum.teacher_params, best, xerr=reach, fmt="D", color=BEST, ms=6, capsize=3, zorder=5)
    _scales(axes, curve.teacher_params)
    above = axes.secondary_xaxis("top", functions=(_over(curve.student_params), _times(curve.student_params)))
    above.xaxis.set_major_formatter(FuncFormatter(lambda r, _: f"{r:g}×"))
    above.xaxis.set_minor_formatter(NullFormatter())
    above.set_xticks(ratio_ticks(*(x / curve.student_params for x in axes.get_xlim())))
    above.tick_params(labelsize=7)


def _named(curve: Curve, found: Sequence[Curve]) -> list[str]:
    """What a panel shows: student, tokens, a start that is not pruned, and whatever else varies in the figure."""
    tokens, init = (curve.key.get(k) for k in ("data_tokens", "init"))
    said = [f"student {curve.key['student']}"]
    said += [f"{short_scale(float(tokens))} tokens"] if tokens else []  # type: ignore[arg-type]
    said += [str(init)] if init not in (None, "pruned") else []
    for name, value in curve.key.items():
        if name not in ("student", "data_tokens", "init") and len({c.key[name] for c in found}) > 1:
            said.append(f"{name} {value}" if isinstance(value, (int, float, np.number)) else str(value))
    return said


def _said(optimum: Optimum) -> str:
    """What is known of the best teacher, in a few words."""
    if optimum.ratio is not None:
        return f"best teacher at {optimum.ratio:.2f}×"
    if optimum.interval != (None, None):
        return f"best teacher: {span(optimum.interval)}"
    return STATUSES[optimum.status]


def _over(student: float) -> Callable[[Any], Any]:
    return lambda teacher: np.asarray(teacher) / student


def _times(student: float) -> Callable[[Any], Any]:
    return lambda ratio: np.asarray(ratio) * student


def ratio_ticks(low: float, high: float) -> list[float]:
    """Ticks of the ratio axis: powers of two, or halves of an octave where these are fewer than two."""
    for step in (1.0, 0.5, 0.25):
        powers = np.arange(math.ceil(math.log2(low) / step), math.floor(math.log2(high) / step) + 1) * step
        if len(powers) > 1:
            break
    return [float(f"{2**p:.2g}") for p in powers if low <= float(f"{2**p:.2g}") <= high]


def _scales(axes: Axes, ticks: np.ndarray) -> None:
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_scale(count)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="x", rotation=40)
    axes.grid(alpha=0.25, lw=0.5)


def plot_law(law: LawFit) -> Figure:
    """Best teacher against student on log axes: optima with intervals, bounds as arrows, the fitted ratio, 2.5×."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    budgets = sorted({o.data_tokens or 0 for o in law.optima})
    for optimum in law.optima:
        at = budgets.index(optimum.data_tokens or 0)
        _mark(axes, optimum, BUDGETS[at % len(BUDGETS)], 1.03 ** (at - (len(budgets) - 1) / 2))
    for at, tokens in enumerate(budgets if len(budgets) > 1 else []):
        axes.plot([], [], "o", color=BUDGETS[at % len(BUDGETS)], ms=5, label=f"{short_scale(tokens) or 0} tokens")
    students = np.array(sorted({o.student_params for o in law.optima}))
    span = np.array([students[0] / 1.2, students[-1] * 1.2])
    axes.plot(span, span, color="#999999", lw=0.8, ls=":", label="teacher = student")
    axes.plot(span, 2.5 * span, color="#999999", lw=0.8, ls="--", label="2.5× (the paper)")
    if law.ratio is not None and law.ratio_interval is not None:
        axes.plot(span, law.ratio * span, color=BEST, lw=1.2, label=f"fitted: {law.ratio:.2f}×")
        axes.fill_between(
            span, law.ratio_interval[0] * span, law.ratio_interval[1] * span, color=BEST, alpha=0.12, lw=0
        )
    _scales(axes, students)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: short_scale(count)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("student parameters", fontsize=9)
    axes.set_ylabel("best teacher's parameters", fontsize=9)
    axes.set_title(LAWS[law.status], fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _mark(axes: Axes, optimum: Optimum, color: str, aside: float) -> None:
    """One optimum: a point with its interval, or an arrow from the bound that is known; a little aside of others."""
    low, high = optimum.interval
    x = optimum.student_params * aside
    if optimum.teacher_params is not None and low is not None and high is not None:
        axes.plot([x, x], [low, high], color=color, lw=1)
        axes.plot(x, optimum.teacher_params, "o", color=color, ms=5)
    elif low is not None:
        axes.plot(x, low, marker=r"$\uparrow$", color=color, ms=11)
    elif high is not None:
        axes.plot(x, high, marker=r"$\downarrow$", color=color, ms=11)


def save_figure(figure: Figure, stem: Path, *, dpi: int = 130) -> list[Path]:
    """Writes `stem.png`, of so many dots an inch, and `stem.svg`; the same figure gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_suffix(s) for s in (".png", ".svg")]
    with rc_context({"svg.hashsalt": "capacity_gap"}):
        figure.savefig(files[0], dpi=dpi, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None})
    return files
