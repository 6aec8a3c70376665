"""The report: one HTML file that needs nothing else, neither a network nor another file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from capacity_gap import __version__
from capacity_gap.report.answer import answer_of, sentences
from capacity_gap.report.content import Content, causes, cell_name, constants, costs, gather, tasks
from capacity_gap.report.joint_tables import best_table, even_table
from capacity_gap.report.plots import LOSSES
from capacity_gap.report.rounds import by_what, end_line, rounds_table
from capacity_gap.settings.errors import UserError
from capacity_gap.settings.scales import counted
from capacity_gap.store.files import write_text
from capacity_gap.wording.fit_words import ESTABLISHED, LAWS

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = "page.html.j2"
SLOT = "<!-- watched -->"  # where a page that is watched says so
SENTENCES = 12  # curves whose sentences are shown at once; more are unfolded
HELD_OUT = {
    "student_loss": "held-out loss",
    "student_bits_per_byte": "bits per byte",
    "student_loss_ood": "out of domain",
    "teacher_loss": "its teacher's loss",
    "init_loss": "before training",
}


@dataclass(frozen=True)
class Watched:
    """A page that is written again and again while its grid runs: when it was, how far the grid is, how often."""

    written: str
    progress: str
    every_s: int


def write_report(
    source: str,
    out: Path,
    *,
    sweep: str | None = None,
    axis: str = "total",
    metric: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Content:
    """Writes the report of `source` to `out`; the same records give the same file.

    Args:
        source: a store, or anything that `records.load` reads.
        out: the HTML file.
        sweep: of a store: only this grid.
        axis: count `total` parameters or `non_embedding` ones.
        metric: the column to minimise, by default the held-out loss.
        columns: of a table from elsewhere, what it calls the columns that fits read.

    Raises:
        UserError: there are no records, or the extra `[report]` is not installed.
    """
    content = gather(source, sweep=sweep, axis=axis, metric=metric, columns=columns or {})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(content, out, title=title_of(content, source, sweep))
    return content


def title_of(content: Content, source: str, sweep: str | None) -> str:
    """What a report is called: by its grids, or by its source."""
    return f"Capacity gap: {sweep or ', '.join(content.names) or Path(source).name}"


def write_page(content: Content, out: Path, *, title: str) -> None:
    """Writes the page whole or not at all, so that nobody reads half of it."""
    write_text(out, render(content, title=title))


def watched_page(text: str, watched: Watched) -> str:
    """A rendered page that says when it was written and loads itself again."""
    block = _environment().get_template("watched.html.j2").render(watched=watched)
    return text.replace(SLOT, block, 1)


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def render(content: Content, *, title: str) -> str:
    """The page as text."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("a report needs plotly: pip install 'capacity_gap[report]'.") from error
    from capacity_gap.report import charts
    from capacity_gap.report.panels import themes

    figures = _figures(content)
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=title,
            version=__version__,
            content=content,
            answer=answer_of(content).questions,
            curves=[(words, panel.optimum.status) for panel, words in sentences(content) if panel.optimum],
            most_sentences=SENTENCES,
            status=content.law.status if content.law else "none",
            badge=LAWS.get(content.law.status, content.law.status) if content.law else "no fit",
            verdict=content.law.verdict() if content.law else content.problem,
            alt=_alternatives(content),
            joint=_joint(content),
            rounds=_rounds(content),
            ends={name: end_line(note) for name, note in content.ends.items()},
            null_p=getattr(content.law, "null_p", None),
            summary=content.law.summary() if content.law else None,
            counts=_counts(content),
            constants=constants(content.frame),
            best=_best(content),
            against=("Loss" if content.metric in LOSSES else content.metric_name) + " against teacher",
            failures=[(str(count), cause, first) for cause, count, first in causes(content.failed)],
            costs=_costs(content),
            provenance=_provenance(content.done),
            cells=_cells(content),
            has=figures.keys(),
            heat_maps_left=max(0, len({p.arm for p in content.panels}) - charts.MOST_HEATMAPS),
            figures=embedded({k: _embedded_figure(f) for k, f in figures.items()}),
            themes=embedded(themes()),
            plotly=get_plotlyjs(),
        )
    )


def embedded(value: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _embedded_figure(figure: Any) -> dict[str, Any]:
    """A figure with its layouts for three, two and one panels beside one another."""
    from plotly.utils import PlotlyJSONEncoder

    from capacity_gap.report.panels import arranged

    made = json.loads(figure.to_json())
    layouts = {n: json.loads(json.dumps(arranged(figure, n), cls=PlotlyJSONEncoder)) for n in (1, 2, 3)}
    return {"data": made["data"], "layout": layouts.pop(3), "narrower": layouts}


def _alternatives(content: Content) -> dict[str, str]:
    """What each chart shows, for those who cannot see it: its numbers are in the sentences and tables of the page."""
    many = counted(len({p.student for p in content.panels}), "student")
    return {
        "curves": f"Chart: {content.metric_name} against teacher parameters, a panel for each of {many}. The sentences "
        "under Each student say what it shows.",
        "ratio": f"Chart: best teacher over student against student parameters, for {many}, with bounds where only "
        "these are known.",
        "heat": f"Heat map: {content.metric_name} of each teacher above the best one's, for {many}.",
        "data": f"Chart: {content.metric_name} against distillation tokens, a line for each teacher of {many}.",
        "dynamics_ce": f"Chart: training cross-entropy against distillation tokens, a line for each teacher of {many}.",
        "dynamics_kl": f"Chart: divergence from the teacher against distillation tokens, for {many}.",
        "scores": f"Chart: benchmark scores against teacher parameters, a line for each of {many}.",
        "cost": f"Chart: FLOPs of training and of teachers' forward passes, for each of {many}.",
    }


def _figures(content: Content) -> dict[str, Any]:
    """Every figure that these records can fill, by the name of its place in the page."""
    from capacity_gap.report import charts

    if not content.panels:
        return {}
    named = tasks(content.done)
    made = {
        "curves": charts.u_curves(content),
        "ratio": charts.ratio_law(content),
        "heat": charts.heat_map(content),
        "data": charts.data_scale(content),
        "dynamics_ce": charts.dynamics(content, "ce"),
        "dynamics_kl": charts.dynamics(content, "kl"),
        "scores": charts.scores(content, named) if named else None,
        "cost": charts.cost(content),
    }
    return {k: figure for k, figure in made.items() if figure is not None}


def _counts(content: Content) -> Mapping[str, int]:
    frame = content.frame
    wanted = ("student", "teacher", "data_tokens", "seed", "teacher_seed")
    found = {"done": len(content.done), "failed": len(content.failed)}
    return found | {c: int(frame[c].nunique()) for c in wanted if c in frame and frame[c].notna().any()}


def _best(content: Content) -> tuple[list[str], list[list[str]]]:
    """For each curve its best cell with all its scores: the table's head and its rows."""
    named = {c: label for c, label in HELD_OUT.items() if c in content.done and content.done[c].notna().any()}
    named |= {c: c.removeprefix("metrics/") for c in tasks(content.done)}
    rows = []
    for panel in sorted(content.panels, key=lambda p: p.curve.student_params):
        best = panel.rows.sort_values(content.metric).iloc[0]
        rows.append([panel.student, panel.arm, cell_name(best), *(_score(best, c) for c in named)])
    head = ["student", "arm", "best cell", *named.values()]
    several = len({p.arm for p in content.panels}) > 1
    return ([*head], rows) if several else ([head[0], *head[2:]], [[row[0], *row[2:]] for row in rows])


def _score(row: pd.Series, name: str) -> str:
    value, error = row[name], row.get(f"{name}_stderr", row.get(f"{name}/stderr"))
    if value != value:
        return "–"
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and error == error else "")


def _rounds(content: Content) -> list[tuple[str, str, list[list[Any]]]]:
    """Of each adaptive grid and question: its name, the question, and a row a round, its reasons last."""
    return [
        (name, what, [[*row, why] for row, why in rounds_table(n)])
        for name, notes in content.rounds.items()
        for what, n in by_what(notes)
    ]


def _joint(content: Content) -> dict[str, Any] | None:
    """What the model of all cells says, for the page."""
    if content.joint is None:
        return None
    found = content.joint
    scatter = ", ".join(f"{name} {1e3 * sd:.1f}" for name, sd in found.sds.items())
    tests = ", ".join(f"{name}: p = {p:.2g}" for name, p in found.tests().items())
    best = [best_table(found)] if found.status in ESTABLISHED else []
    tables = [table for table in (*best, even_table(found)) if table[1]]
    return {"status": found.status, "verdict": found.verdict(), "tables": tables, "sds": scatter, "tests": tests}


def _costs(content: Content) -> list[tuple[str, str]]:
    """What the cells took, in words: what nobody recorded is not 0."""
    said = (
        ("students", "training the students", "{:.3g} FLOPs", 1.0),
        ("forward", "teachers' forward passes", "{:.3g} FLOPs", 1.0),
        ("teachers", "training the teachers, each once", "{:.3g} FLOPs", 1.0),
        ("seconds", "time of distillation", "{:.2f} hours of one worker", 1 / 3600),
        ("memory", "peak memory of one cell", "{:.0f} MB", 1e-6),
    )
    taken = costs(content.done)
    return [
        (label, "not recorded" if (value := taken[name]) is None else words.format(value * by))
        for name, label, words, by in said
    ]


def _provenance(done: pd.DataFrame) -> list[tuple[str, str]]:
    names = {"git_commit": "commit", "device": "device", "threads": "threads", "ranks": "ranks", "created": "recorded"}
    versions = {c: c.removeprefix("version/") for c in done.columns if str(c).startswith("version/")}
    found = []
    for column, label in {**names, **versions}.items():
        values = sorted({str(v) for v in done[column].dropna()}) if column in done else []
        if values:
            many = column == "created" and len(values) > 1
            found.append((label, f"{values[0]} to {values[-1]}" if many else ", ".join(values)))
    return found


def _cells(content: Content) -> str:
    """All cells, the best first, as one block of text: a thousand of them must not slow the page down."""
    frame = content.frame.sort_values(content.metric) if content.metric in content.frame else content.frame
    rows = [
        (cell_name(row), str(row.get("status", "done")), *(_number(row.get(c)) for c in (content.metric, "init_loss")))
        for row in frame.to_dict("records")
    ]
    rows.insert(0, ("cell", "status", content.metric, "before training"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {status:<7} {loss:>12} {start:>16}" for name, status, loss, start in rows)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and value == value else "–"
