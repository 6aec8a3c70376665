"""A plan as text: models with their costs, texts, memory, what the grid cannot find. Imports no torch."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from capacity_gap.cell.pipeline import Cell
from capacity_gap.models.accounting import Memory
from capacity_gap.models.axes import count_params, dims
from capacity_gap.models.defaults import training_only
from capacity_gap.records.record import parting_columns
from capacity_gap.runner.cost import Costs, Curve
from capacity_gap.runner.machines import Worker
from capacity_gap.runner.plan_memory import Need
from capacity_gap.settings.scales import counted, format_scale, short_scale

MOST_ROWS = 8  # teachers, students, or budgets of one student; more are summed up
LEAST_TEACHERS = 4  # of a curve, for an optimum: as in fit/valley.py, which would load pandas
JOINT_TEACHERS = 5  # of the model of all cells, for an optimum: as in fit/joint_fit.py
LEAST_STUDENTS = 3  # for a law: as in fit/law_fit.py
TAKES = (
    f"a curve alone takes {LEAST_TEACHERS} teachers, the model of all cells {JOINT_TEACHERS}; two teachers at two "
    "budgets can give a break-even budget"
)
MUCH = 1 / 3  # share of the time from which held-out evaluation is worth a word
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW in fp32",
    "activations": "activations",
    "teacher": "teacher",
}


def teacher_lines(cells: Sequence[Cell], costs: Costs) -> Iterator[str]:
    """A line for each teacher: its size, and what it costs before any student is trained."""
    rungs = {c.rung: c.teacher_shape for c in cells} | {c.origin: c.family.rungs[c.origin] for c in cells}
    ordered = sorted((r for r in rungs if r in costs.teachers), key=lambda r: count_params(rungs[r]))
    for rung in ordered[:MOST_ROWS]:
        yield f"teacher {rung}: {_shape(rungs[rung])}{_spent(costs.teachers[rung])}"
    if rest := ordered[MOST_ROWS:]:
        spent = {part: sum(costs.teachers[r][part] for r in rest) for part in costs.teachers[rest[0]]}
        yield f"teachers {rest[0]} to {rest[-1]} ({len(rest)} more){_spent(spent)}"
    for rung, keys in {c.rung: training_only(c.teacher_shape) for c in cells}.items():
        if keys:
            yield f"teacher {rung}: {', '.join(keys)} of its config.json is ignored in training"


def _spent(parts: Mapping[str, float]) -> str:
    said = [f"{part} {format_seconds(seconds)}" for part, seconds in parts.items() if seconds >= 0.5]
    return f"; {', '.join(said)}" if said else ""


def student_lines(cells: Sequence[Cell], costs: Costs) -> Iterator[str]:
    """A line for each student: its size, and what each of its curves costs."""
    shapes: dict[int, dict[int, str]] = {}
    for cell in cells:
        shapes.setdefault(cell.student_scale, {})[count_params(cell.student_shape)] = _shape(cell.student_shape)
    ordered, names = sorted(shapes), {c.student_scale: c.student_name for c in cells}
    for scale in ordered[:MOST_ROWS]:
        (first, said), *more = sorted(shapes[scale].items())
        if more:
            said = f"{first:,} to {more[-1][0]:,} parameters, {len(more) + 1} shapes"
        curves = {tokens: curve for (student, tokens), curve in sorted(costs.curves.items()) if student == scale}
        yield f"student {names[scale]}: {said}; curve {_curves(curves)}"
    if rest := ordered[MOST_ROWS:]:
        mine = [curve for (student, _), curve in costs.curves.items() if student in rest]
        ends = f"{names[rest[0]]} to {names[rest[-1]]}"
        yield f"students {ends} ({len(rest)} more); {len(mine)} curves: {_summed(mine)}"


def _curves(curves: Mapping[int, Curve]) -> str:
    tokens = list(curves)
    if len(tokens) <= MOST_ROWS:
        return ", ".join(f"data={format_scale(t)}: {_summed([curve])}" for t, curve in curves.items())
    ends = f"data={format_scale(tokens[0])} to {format_scale(tokens[-1])}"
    return f"of {len(tokens)} budgets {ends}: {_summed(curves.values())}"


def _summed(curves: Collection[Curve]) -> str:
    return f"{counted(sum(c.cells for c in curves), 'cell')} {format_seconds(sum(c.seconds for c in curves))}"


def _shape(shape: Mapping[str, object]) -> str:
    sizes = dims(shape)
    experts = f"{sizes.experts} experts ({sizes.active} a token), " if sizes.experts else ""
    return (
        f"{count_params(shape):,} parameters, {sizes.layers}x{sizes.hidden}x{sizes.heads}x{sizes.neurons}, {experts}"
        f"vocabulary {sizes.vocab:,}"
    )


def evaluation_line(cells: Sequence[Cell], costs: Costs) -> str:
    """What held-out evaluation costs, apart, and what lowers it where that is much."""
    share = costs.evaluation / costs.total if costs.total else 0.0
    said = f"held-out evaluation of {counted(costs.models, 'model')}: {format_seconds(costs.evaluation)}"
    if costs.evaluation:
        said += f", {share:.0%} of the time" if share > 0.005 else ", under 1% of the time"
    if share > MUCH:
        c = cells[0].config.evaluate
        said += f"; evaluate.tokens={c.tokens} and evaluate.ood_tokens={c.ood_tokens} decide it: lower them"
    return said


def memory_lines(found: Mapping[str, Need], worker: Worker) -> Iterator[str]:
    """For each kind of work what one device holds, by parts, and whether it fits."""
    for name, need in found.items():
        fits = f"; {need.advice(worker.memory)}" if worker.memory else ""
        yield f"memory of {'a device' if worker.gpu else 'a worker'}, {name}: {_parts(need.memory)}{fits}"


def _parts(memory: Memory) -> str:
    parts = [f"{said} {format_bytes(size)}" for name, said in PARTS.items() if (size := getattr(memory, name))]
    return f"{format_bytes(memory.total)} ({', '.join(parts)})"


def warnings(cells: Sequence[Cell]) -> list[str]:
    """What a grid cannot estimate in any case: an optimum needs teachers, a law students."""
    curves: dict[tuple, set[str]] = {}
    for cell in cells:
        curves.setdefault(_curve(cell), set()).add(cell.rung)
    if len(cells) == 1:
        return []
    found, counts = [], [len(rungs) for rungs in curves.values()]
    if max(counts) == 1:
        found.append(f"one teacher only: no optimum can be located ({TAKES})")
    elif few := sum(count < LEAST_TEACHERS for count in counts):
        found.append(
            f"{few} of {counted(len(counts), 'curve')} {'has' if few == 1 else 'have'} fewer than {LEAST_TEACHERS} "
            f"teachers: no optimum can be located there ({TAKES})"
        )
    if (students := len({c.student_scale for c in cells})) < LEAST_STUDENTS:
        found.append(f"{counted(students, 'student')} only: no law can be fitted, which needs {LEAST_STUDENTS}")
    return [f"warning: {'; '.join(found)} (this grid alone)"] if found else []


def _curve(cell: Cell) -> tuple:
    """What cells of one curve have in common, as the fit parts them."""
    said = cell.description
    return (cell.student_scale, cell.data_tokens, *(repr(said.get(c)) for c in parting_columns()))


def clock_words(wall_s: float, at_once: int, cards: int | None, queued_s: float) -> str:
    """The time on the clock, and the GPUs it takes where jobs of one machine may have to share them.

    Args:
        wall_s: seconds with `at_once` jobs.
        at_once: jobs at once.
        cards: GPUs that they share; 0: it is not known; None: each has its own, or needs none.
        queued_s: seconds if all share one.
    """
    said = f"about {format_seconds(wall_s)} with {at_once} at once"
    if cards == 0:
        return f"{said} if each has a GPU of its own; about {format_seconds(queued_s)} if they share one"
    return said if cards is None else f"{said}, which share {counted(cards, 'GPU')}"


def stages_line(kinds: Sequence[tuple[str, int, int, float, float]]) -> str:
    """How many stages of each kind are to run, with their seconds, and how many are there already."""
    said = [
        f"{left} {name}" + (f" {format_seconds(seconds)}" if seconds >= 0.5 else "")
        for name, _, left, _, seconds in kinds
        if left
    ]
    there = sum(total - left for _, total, left, _, _ in kinds)
    return f"stages to run: {', '.join(said) or 'none'}; already in the store: {there}"


def format_seconds(seconds: float) -> str:
    """Seconds for display: `40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours = seconds / 3600
    return f"{seconds / 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h" if hours < 1000 else f"{hours:,.0f} h"


def format_bytes(count: float) -> str:
    """Bytes for display: `12 MB`, `3.4 GB`."""
    if count < 1e9:
        return f"{count / 1e3:.3g} kB" if count < 999_500 else f"{count / 1e6:.3g} MB"
    return f"{count / 1e9:.3g} GB" if count < 1e12 else f"{count / 1e9:,.0f} GB"


def format_hours(hours: float) -> str:
    """Device-hours: `0.05`, `3.4`, `1,200`."""
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def about(tokens: float) -> str:
    """Tokens as an estimate is read: `6.8m`."""
    return short_scale(tokens) or "0"
