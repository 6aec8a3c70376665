"""The report's figures, as Plotly figures without colours of their own: the page gives them a light or a dark theme.

Every string that came from a user passes through `safe`: Plotly reads a little HTML in titles, names and hover texts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from capacity_gap.report.content import Content, Panel, cell_name, means
from capacity_gap.report.panels import (
    BEST,
    COLOURS,
    GREY,
    by_student,
    colours_of,
    entry,
    first_time,
    ladder_colours,
    panel_grid,
    place_of,
    safe,
    scale_axis,
)
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.curve_words import STATUSES
from capacity_gap.wording.intervals import span

MOST_HEATMAPS = 8
MOST_NAMED = 14  # a longer legend of teachers would push the panels off the page; pointing at a line still names it


def u_curves(content: Content) -> go.Figure:
    """Loss against teacher scale, a panel a student: single runs, means with intervals, the optimum with its own."""
    students, colours = by_student(content.panels), colours_of([p.arm for p in content.panels])
    figure = panel_grid([f"student {s}" for s in students], x="teacher parameters", y=safe(content.metric_name))
    legend: set[str] = set()
    for i, panels in enumerate(students.values()):
        place = place_of(i, figure)
        for panel in panels:
            _curve(figure, panel, content, colours[panel.arm], place, legend)
        scale_axis(figure, [t for p in panels for t in p.curve.teacher_params], place, content.teachers)
    return figure


def _curve(
    figure: go.Figure, panel: Panel, content: Content, colour: str, place: dict[str, int], legend: set[str]
) -> None:
    mean = means(panel.rows, content.teacher, content.metric)
    arm = {"legendgroup": safe(panel.arm), "hoverinfo": "text"}
    half = mean["half"].fillna(0.0)
    figure.add_scatter(
        x=mean[content.teacher],
        y=mean["mean"],
        name=entry(panel.arm),
        mode="lines",
        line={"color": colour, "width": 1.6},
        error_y={"array": half, "thickness": 1, "width": 3, "visible": bool(half.any())},
        hovertext=[
            f"mean of {n:.0f}: {m:.4f}" + (f" ± {h:.4f}" if h == h else "")
            for m, n, h in zip(mean["mean"], mean["count"], mean["half"], strict=True)
        ],
        showlegend=first_time(panel.arm, legend),
        **arm,
        **place,
    )
    figure.add_scatter(
        x=panel.rows[content.teacher],
        y=panel.rows[content.metric],
        mode="markers",
        marker={"color": colour, "size": 6, "opacity": 0.75},
        hovertext=[_cell_text(row, content) for row in panel.rows.to_dict("records")],
        showlegend=False,
        **arm,
        **place,
    )
    _optimum(figure, panel, mean, content, place, legend)


def _cell_text(row: Mapping[Any, Any], content: Content) -> str:
    """What is told of a cell under the pointer."""
    lines = [f"<b>{safe(cell_name(row))}</b>", f"{safe(content.metric)} {row[content.metric]:.4f}"]
    error = row.get(f"{content.metric}_stderr", row.get(f"{content.metric}/stderr"))
    if error is not None and error == error:
        lines[-1] += f" ± {error:.4f} (standard error)"
    lines.append(
        f"teacher / student {row[content.teacher] / row[content.teacher.replace('teacher', 'student', 1)]:.2f}"
    )
    for name, label in (("teacher_loss", "teacher's loss"), ("init_loss", "before training"), ("init", "start")):
        value = row.get(name)
        if value is not None and value == value:
            lines.append(f"{label} {value:.4f}" if isinstance(value, float) else f"{label} {safe(value)}")
    return "<br>".join([*lines, f"cell {safe(str(row['cell'])[:12])}"] if "cell" in row else lines)


def _optimum(
    figure: go.Figure, panel: Panel, mean: pd.DataFrame, content: Content, place: dict[str, int], legend: set[str]
) -> None:
    optimum = panel.optimum
    if optimum is None or optimum.teacher_params is None:
        return
    at = optimum.teacher_params
    low, high = (at if bound is None else bound for bound in optimum.interval)
    height = float(np.interp(math.log(at), np.log(mean[content.teacher]), mean["mean"]))
    figure.add_scatter(
        x=[at],
        y=[height],
        name="best teacher, 95 % interval",
        legendgroup="optimum",
        legendrank=2000,
        mode="markers",
        marker={"color": BEST, "size": 10, "symbol": "diamond"},
        error_x={"array": [high - at], "arrayminus": [at - low], "color": BEST, "thickness": 1.6, "width": 5},
        hoverinfo="text",
        hovertext=f"best teacher {short_scale(at)} (95 % {span(optimum.interval)})"
        f"<br>{at / panel.curve.student_params:.2f} times the student",
        showlegend=first_time("optimum", legend),
        **place,
    )


def ratio_law(content: Content) -> go.Figure:
    """Best teacher over student, with the fitted ratio, 2.5×, and where noise alone would put it."""
    figure = panel_grid([""], x="student parameters", y="best teacher / student")
    figure.update_layout(height=430)
    colours = colours_of([p.arm for p in content.panels])
    students = [p.curve.student_params for p in content.panels]
    span = [min(students) / 1.15, max(students) * 1.15]
    _band(figure, content, span)
    figure.add_scatter(
        x=span, y=[2.5, 2.5], name="2.5 (the paper)", mode="lines", line={"color": GREY, "dash": "dash", "width": 1.4}
    )
    centres = [(p.curve.student_params, math.exp(p.curve.x.mean()) / p.curve.student_params) for p in content.panels]
    figure.add_scatter(
        x=[c[0] for c in centres],
        y=[c[1] for c in centres],
        name="centre of the grid (noise alone)",
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 16, "color": GREY, "line": {"width": 2}},
        hoverinfo="text",
        hovertext=[f"centre of the grid: {c[1]:.2f}" for c in centres],
    )
    seen: set[str] = set()
    for panel in content.panels:
        _ratio_mark(figure, panel, colours[panel.arm], seen)
    scale_axis(figure, students, {}, {p.curve.student_params: p.student for p in content.panels})
    figure.update_yaxes(type="log", tickvals=[1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 30, 50, 100])
    return figure


def _band(figure: go.Figure, content: Content, span: list[float]) -> None:
    law = content.law
    if law is None or law.ratio is None or law.ratio_interval is None:
        return
    low, high = law.ratio_interval
    figure.add_scatter(
        x=[*span, *reversed(span)],
        y=[low, low, high, high],
        mode="lines",  # with few points Plotly would set markers, which look like optima
        fill="toself",
        fillcolor="rgba(209,73,91,0.15)",
        line={"width": 0},
        hoverinfo="skip",
        name="95 % interval",
    )
    figure.add_scatter(x=span, y=[law.ratio] * 2, mode="lines", line={"color": BEST}, name=f"fitted: {law.ratio:.2f}")


def _ratio_mark(figure: go.Figure, panel: Panel, colour: str, seen: set[str]) -> None:
    """An optimum with its interval, or a triangle at the bound that is known."""
    optimum, student = panel.optimum, panel.curve.student_params
    if optimum is None:
        return
    low, high = (None if v is None else v / student for v in optimum.interval)
    ratio = None if optimum.teacher_params is None else optimum.teacher_params / student
    at = next((v for v in (ratio, low, high) if v is not None), None)
    if at is None:
        return
    bar = {} if ratio is None else {"array": [(high or at) - at], "arrayminus": [at - (low or at)], "color": colour}
    word = STATUSES.get(optimum.status, optimum.status)
    symbol = "circle" if ratio else "triangle-up-open" if low else "triangle-down-open"
    figure.add_scatter(
        x=[student],
        y=[at],
        name=entry(panel.arm),
        legendgroup=safe(panel.arm),
        mode="markers",
        marker={"color": colour, "size": 10, "symbol": symbol},
        error_y=bar,
        hoverinfo="text",
        hovertext=f"student {safe(panel.student)}, {safe(panel.arm)}<br>{safe(word)}: {at:.2f}",
        showlegend=first_time(panel.arm, seen),
    )


def heat_map(content: Content) -> go.Figure:
    """What each teacher costs a student, in the metric's unit above the best of its row; a map an arm."""
    arms = list(dict.fromkeys(p.arm for p in content.panels))[:MOST_HEATMAPS]
    figure = panel_grid(arms if len(arms) > 1 else [""], x="teacher", y="student", columns=2)
    for i, arm in enumerate(arms):
        mine = [p for p in content.panels if p.arm == arm]
        _map(figure, mine, content, place_of(i, figure), words=len(arms) == 1)
    tallest = max(len({p.student for p in content.panels if p.arm == a}) for a in arms)
    rows = len(figure._grid_ref)
    figure.update_layout(
        height=rows * max(190, 60 + 32 * tallest) + 110,
        coloraxis={
            "colorscale": [[0, "#2f9e78"], [0.35, "#e3c567"], [1, "#c8553d"]],
            "colorbar": {
                "title": {"text": "<br>".join(filter(None, [content.unit, "above the", "row's best"]))},
                "thickness": 12,
            },
            "cmin": 0,
        },
    )
    return figure


def _map(figure: go.Figure, panels: Sequence[Panel], content: Content, place: dict[str, int], *, words: bool) -> None:
    cells = pd.concat([means(p.rows, content.teacher, content.metric).assign(student=p.student) for p in panels])
    order = list(by_student(panels))
    table = cells.pivot_table(index="student", columns=content.teacher, values="mean").reindex(order)
    above = table.sub(table.min(axis=1), axis=0).to_numpy()
    teachers = [safe(content.rung(t)) for t in table.columns]
    hover = [
        [
            f"student {safe(s)} from {t}<br>{v:.4f}, {a:.4f} above the best" if v == v else ""
            for t, v, a in zip(teachers, row, gap, strict=True)
        ]
        for s, row, gap in zip(order, table.to_numpy(), above, strict=True)
    ]
    said = [[f"{v:.3f}" if v == v else "" for v in row] for row in table.to_numpy()]
    text = {"text": said, "texttemplate": "%{text}"} if words and above.size <= 120 else {}
    figure.add_heatmap(
        z=above,
        x=teachers,
        y=[safe(s) for s in order],
        coloraxis="coloraxis",
        hoverinfo="text",
        hovertext=hover,
        xgap=2 if len(teachers) <= 40 else 0,
        ygap=2,
        textfont={"color": "#111111"},
        **text,
        **place,
    )
    figure.update_xaxes(type="category", showgrid=False, automargin=True, title_standoff=8, **place)
    figure.update_yaxes(type="category", showgrid=False, automargin=True, **place)


def data_scale(content: Content) -> go.Figure | None:
    """Loss against distillation tokens, a panel a student and a line a teacher; None with one budget alone."""
    students = {s: _budgets(panels) for s, panels in by_student(content.panels).items()}
    students = {s: rows for s, rows in students.items() if rows["data_tokens"].nunique() > 1}
    if not students:
        return None
    figure = panel_grid([f"student {s}" for s in students], x="distillation tokens", y=safe(content.metric_name))
    colours = ladder_colours(t for rows in students.values() for t in rows[content.teacher])
    legend: set[str] = set()
    for i, rows in enumerate(students.values()):
        for teacher, mine in rows.groupby(content.teacher):
            line = mine.groupby("data_tokens")[content.metric].mean()
            _teacher_line(figure, content, line, float(str(teacher)), colours, place_of(i, figure), legend)
        scale_axis(figure, [t for t in rows["data_tokens"] if t > 0], place_of(i, figure))
    return figure


def _budgets(panels: Sequence[Panel]) -> pd.DataFrame:
    """The rows of the arm that has most of them, whatever their budget of tokens."""
    arms: dict[str, list[pd.DataFrame]] = {}
    for panel in panels:
        key = str({k: v for k, v in panel.curve.key.items() if k != "data_tokens"})
        arms.setdefault(key, []).append(panel.rows)
    rows = max((pd.concat(parts) for parts in arms.values()), key=len)
    return rows if "data_tokens" in rows else rows.assign(data_tokens=np.nan)


def _teacher_line(
    figure: go.Figure,
    content: Content,
    line: pd.Series,
    teacher: float,
    colours: dict[float, str],
    place: dict[str, int],
    legend: set[str],
) -> None:
    name = f"teacher {safe(content.rung(teacher))}"
    figure.add_scatter(
        x=line.index.to_numpy(),
        y=line.to_numpy(),
        name=name,
        legendgroup=name,
        legendrank=1000 + sorted(colours).index(teacher),
        mode="lines+markers" if len(line) < 12 else "lines",
        line={"color": colours[teacher], "width": 1.5},
        hoverinfo="text",
        hovertext=[
            f"{name}<br>{short_scale(x)} tokens: {y:.4f}" for x, y in zip(line.index.to_numpy(float), line, strict=True)
        ],
        showlegend=len(colours) <= MOST_NAMED and first_time(name, legend),
        **place,
    )


def dynamics(content: Content, part: str) -> go.Figure | None:
    """One part of the training loss against tokens, a panel a student and a line a teacher (mean over seeds)."""
    students = {s: _longest(panels, content) for s, panels in by_student(content.panels).items()}
    curves_ = {s: _training(rows, content, part) for s, rows in students.items()}
    curves_ = {s: lines for s, lines in curves_.items() if lines}
    if not curves_:
        return None
    label = {"ce": "cross-entropy", "kl": "KL to teacher"}[part]
    figure = panel_grid([f"student {s}" for s in curves_], x="distillation tokens", y=f"{label}, nats/token")
    colours = ladder_colours(t for lines in curves_.values() for t in lines)
    legend: set[str] = set()
    for i, lines in enumerate(curves_.values()):
        for teacher, line in lines.items():
            _teacher_line(figure, content, line, teacher, colours, place_of(i, figure), legend)
    figure.update_xaxes(tickformat="~s")
    return figure


def _longest(panels: Sequence[Panel], content: Content) -> pd.DataFrame:
    """The rows with the largest budget, of the arm that has most."""
    rows = _budgets(panels)
    longest = rows["data_tokens"].max()
    return rows[rows["data_tokens"] == longest] if longest == longest else rows


def _training(rows: pd.DataFrame, content: Content, part: str) -> dict[float, pd.Series]:
    found: dict[float, list[pd.DataFrame]] = {}
    for _, row in rows.iterrows():
        history = content.histories.get(str(row.get("cell")))
        if history is not None and part in history:
            found.setdefault(float(row[content.teacher]), []).append(history[["tokens", part]])
    return {t: pd.concat(parts).groupby("tokens")[part].mean() for t, parts in sorted(found.items())}


def scores(content: Content, names: Sequence[str]) -> go.Figure:
    """Benchmark scores with their standard errors against teacher scale, a panel a task and a line a student."""
    figure = panel_grid([n.removeprefix("metrics/") for n in names], x="teacher parameters", y="score")
    colours = colours_of(list(by_student(content.panels)))
    legend: set[str] = set()
    for i, name in enumerate(names):
        place = place_of(i, figure)
        for student, panels in by_student(content.panels).items():
            rows = _longest(panels, content).dropna(subset=[name])
            mean = rows.groupby(content.teacher)[name].mean()
            error = rows.groupby(content.teacher)[f"{name}/stderr"].mean() if f"{name}/stderr" in rows else mean * 0
            figure.add_scatter(
                x=mean.index.to_numpy(),
                y=mean.to_numpy(),
                error_y={"array": error.fillna(0).to_numpy(), "thickness": 1, "width": 3},
                name=entry(f"student {student}"),
                legendgroup=safe(student),
                mode="lines+markers",
                line={"color": colours[student], "width": 1.5},
                showlegend=first_time(student, legend),
                **place,
            )
        scale_axis(figure, content.done[content.teacher].dropna(), place, content.teachers)
    return figure


def cost(content: Content) -> go.Figure | None:
    """FLOPs by student: its own training, and its teachers' forward passes."""
    students = {s: pd.concat([p.rows for p in panels]) for s, panels in by_student(content.panels).items()}
    parts = {"train_flops": "training the students", "teacher_flops": "the teachers' forward passes"}
    known = [c for c in parts if c in content.done and content.done[c].notna().any()]
    if "train_flops" not in known:
        return None
    figure = panel_grid([""], x="FLOPs", y="student")
    figure.update_layout(height=150 + 34 * len(students), barmode="stack", showlegend=True)
    for column, colour in zip(known, COLOURS, strict=False):
        sums = [rows[column].sum(min_count=1) for rows in students.values()]
        named = {"y": [safe(s) for s in students], "name": parts[column], "marker_color": colour}
        figure.add_bar(x=sums, orientation="h", **named)
    figure.update_yaxes(type="category", title_text="student", automargin=True)
    figure.update_xaxes(tickformat="~s")
    return figure
