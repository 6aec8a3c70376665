"""What all figures of the report have in common: two themes, panels, axes of scales, colours; and text made safe."""

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from capacity_gap.report.content import Panel
from capacity_gap.settings.scales import short_scale

# Each colour can be told from white and from near-black.
COLOURS = ("#4c8dd6", "#e07b39", "#3fa66b", "#c75d9a", "#9a7fd1", "#b8973b", "#45a8b8", "#d65f5f")
LADDER = ["#4b83d8", "#3aa98c", "#cfa03a", "#d2603f"]  # from the smallest teacher to the largest
GREY, BEST = "#8a8f98", "#d1495b"
COLUMNS = 3
PANEL_HEIGHT = 290
WIDTHS = {1: 300, 2: 520, 3: 860}  # pixels of a legend that pages of so many columns have at least
LEGEND_ROW, LETTER, MODEBAR = 20, 6.6, 30  # pixels
ENTRY = 34  # letters in one line of a legend
TICKS = 7  # labels below one panel


def themes() -> dict[str, Any]:
    """The two looks that a figure can have."""
    return {"light": _theme("#1f2328", "#e3e6ea", "#ffffff"), "dark": _theme("#d7dce2", "#343b44", "#22272e")}


def _theme(ink: str, grid: str, paper: str) -> dict[str, Any]:
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": grid}
    return {
        "layout": {
            "font": {"color": ink, "size": 12, "family": "system-ui, sans-serif"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"bgcolor": paper, "bordercolor": grid, "font": {"color": ink}, "align": "left"},
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": ink},
            "coloraxis": {"colorbar": {"outlinewidth": 0}},
        }
    }


def safe(text: Any) -> str:
    """Text that Plotly shows as it is."""
    return html.escape(str(text), quote=False)


def panel_grid(
    titles: Sequence[str], *, x: str, y: str, columns: int = COLUMNS, height: float = PANEL_HEIGHT
) -> go.Figure:
    """Empty panels, a title each, of some height; the legend above them."""
    columns = max(1, min(columns, len(titles)))
    rows = max(1, math.ceil(len(titles) / columns))
    total = rows * height + 90
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[entry(t) for t in titles],
        horizontal_spacing=0.22 / columns,
        vertical_spacing=min(0.9 / max(1, rows - 1), 95 / total) if rows > 1 else 0,
    )
    figure.update_annotations(font_size=12)
    figure.update_layout(
        template=None,
        height=total,
        margin={"l": 66, "r": 20, "t": 80, "b": 72},
        legend={
            **{"orientation": "h", "xref": "container", "x": 0, "yref": "container", "y": 1, "yanchor": "top"},
            "tracegroupgap": 0,
        },
        hovermode="closest",
    )
    for i in range(len(titles)):
        row, column = divmod(i, columns)
        last = i + columns >= len(titles)
        figure.update_xaxes(title_text=x if last else None, row=row + 1, col=column + 1)
        figure.update_yaxes(title_text=y if column == 0 else None, row=row + 1, col=column + 1)
    figure._made_of = {"titles": tuple(titles), "x": x, "y": y}
    return figure


def arranged(figure: go.Figure, columns: int) -> dict[str, Any]:
    """The layout of a figure for a page on which so many panels have room beside one another."""
    rows_before = len(figure._grid_ref)
    height = (figure.layout.height - 90) / rows_before
    bare = panel_grid(**figure._made_of, columns=columns, height=height)
    found, new = figure.to_plotly_json()["layout"], bare.to_plotly_json()["layout"]
    for name in (n for n in [*found] if n[1:].startswith("axis")):
        if name not in new:
            del found[name]  # a place in the last row without a panel
            continue
        title = {**found[name].get("title", {}), "text": new[name].get("title", {}).get("text")}
        found[name] = {**found[name], "domain": new[name]["domain"], "title": title}
    # The buttons of a chart, which phones do without, lie above the legend, titles of panels below it.
    titled = 30 if any(figure._made_of["titles"]) else 10
    bar = MODEBAR if columns > 1 else 0
    top = bar + LEGEND_ROW * _legend_rows(figure, WIDTHS[columns]) + titled
    found |= {"annotations": new.get("annotations", []), "height": bare.layout.height - bare.layout.margin.t + top}
    found["legend"] = {**found["legend"], "y": 1 - bar / found["height"]}
    found["margin"] = {**found["margin"], "t": top}
    if "coloraxis" in found and columns == 1:
        scale = {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "len": 1, "thickness": 10}
        # Its title would lie on it; the caption below the chart says the same.
        found["coloraxis"] = {**found["coloraxis"], "colorbar": scale}
        found["height"] += 30
        found["margin"]["b"] = 110
    return found


def _legend_rows(figure: go.Figure, width: int) -> int:
    """Rows of a legend whose entries are all as wide as the widest, as Plotly sets them."""
    names = [str(t.name) for t in figure.data if t.name and t.showlegend is not False]
    if not names:
        return 0
    lines = max(name.count("<br>") + 1 for name in names)
    widest = max(len(line) for name in names for line in html.unescape(name).split("<br>"))
    return lines * math.ceil(len(names) / max(1, int(width / (LETTER * widest + 48))))


def place_of(i: int, figure: go.Figure) -> dict[str, int]:
    """Row and column of panel i."""
    columns = len(figure._grid_ref[0])
    return {"row": i // columns + 1, "col": i % columns + 1}


def scale_axis(
    figure: go.Figure, values: Iterable[float], place: dict[str, int], names: Mapping[float, str] | None = None
) -> None:
    """A logarithmic axis of parameter counts or tokens, with ticks at the values themselves where they have room."""
    ordered = sorted(set(values))
    room = (ordered[-1] / ordered[0]) ** (1 / (TICKS + 1)) if ordered else 1.0
    ticks: list[float] = []
    for value in ordered:
        if not ticks or value > ticks[-1] * room:
            ticks.append(value)
    text = [safe((names or {}).get(t) or short_scale(t)) for t in ticks]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=text, tickangle=-40, **place)


def by_student(panels: Sequence[Panel]) -> dict[str, list[Panel]]:
    """Panels by student, the smallest first."""
    found: dict[str, list[Panel]] = {}
    for panel in sorted(panels, key=lambda p: p.curve.student_params):
        found.setdefault(panel.student, []).append(panel)
    return found


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; of more than eight, from one end of the ladder's scale to the other."""
    order = list(dict.fromkeys(names))
    if len(order) <= len(COLOURS):
        return dict(zip(order, COLOURS, strict=False))
    return dict(zip(order, ladder_colours(range(len(order))).values(), strict=True))


def ladder_colours(values: Iterable[float]) -> dict[float, str]:
    """A colour for each teacher, from the smallest to the largest."""
    ordered = sorted(set(values))
    places = np.linspace(0, 1, len(ordered)) if len(ordered) > 1 else [0.0]
    return dict(zip(ordered, sample_colorscale(LADDER, list(places)), strict=True))


def entry(text: str) -> str:
    """A name as the legend shows it: long ones in several lines, so that a phone shows all of it."""
    return "<br>".join(safe(line) for line in textwrap.wrap(text, ENTRY) or [text])


def first_time(name: str, seen: set[str]) -> bool:
    """Whether a name comes to the legend for the first time."""
    new = name not in seen
    seen.add(name)
    return new
