"""The commands `fit`, `recommend`, `next` and `beside`: what a table of records says about teachers."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capacity_gap.commands import beside_command, next_command
from capacity_gap.commands.options import COLUMNS, WHERE, columns, out_folder, where
from capacity_gap.settings.errors import UserError, shown
from capacity_gap.wording.intervals import span


def add(commands: Any) -> None:
    """Adds the commands to the command line's parser."""
    _add_fit(commands)
    _add_recommend(commands)
    next_command.add(commands)
    beside_command.add(commands)


def _add_fit(commands: Any) -> None:
    told = "Locate each student's best teacher, fit the ratio law, and draw the curves."
    fit = commands.add_parser("fit", description=told)
    fit.add_argument("source", help="a store, a folder of CSV files, a .csv or a .parquet file")
    told = "which parameters are counted; teacher_loss: teachers by their loss, in the model of all cells alone"
    fit.add_argument("--axis", choices=("total", "non_embedding", "teacher_loss"), default="total", help=told)
    fit.add_argument("--metric", help="column to fit (default: student_loss, or loss in foreign tables)")
    fit.add_argument("--columns", type=columns, default={}, metavar="OURS=THEIRS,...", help=COLUMNS)
    fit.add_argument("--where", type=where, action="append", default=[], metavar="COLUMN=VALUE,...", help=WHERE)
    fit.add_argument("--by", help="columns that part curves, such as family,data_tokens (default: every setting)")
    fit.add_argument(
        "--method",
        choices=("asymmetric", "quadratic", "local", "argmin"),
        default="asymmetric",
        help="how the optimum of a curve is found (default: %(default)s; argmin is the paper's)",
    )
    fit.add_argument("--sweep", metavar="NAME", help="of a store: only the cells of this sweep (`store ls` names them)")
    fit.add_argument("--surface", action="store_true", help="also the additive loss surface (docs/surfaces.md)")
    fit.add_argument("--joint", action="store_true", help="all that the model of all cells says (docs/joint.md)")
    fit.add_argument(
        "--out",
        type=out_folder,
        help="folder for law.json, joint.json, optima.csv and the figures; without it, only text",
    )
    fit.set_defaults(run=run_fit)


def _add_recommend(commands: Any) -> None:
    told = "Say which rung of a ladder to take as the teacher, and how sure that is."
    recommend = commands.add_parser("recommend", description=told)
    recommend.add_argument("--student", required=True, help="total parameters, such as 1b")
    recommend.add_argument(
        "--family", required=True, help="the ladder, such as qwen2_5; or models, ORG/NAME,FOLDER,..."
    )
    recommend.add_argument(
        "--data", default="20x", help="distillation tokens, such as 10b, or 20x parameters (default)"
    )
    recommend.add_argument(
        "--fit",
        type=Path,
        help="a law.json, joint.json or surface.json of `fit` (default: that of results/pico2)",
    )
    recommend.set_defaults(run=run_recommend)


def run_fit(given: argparse.Namespace) -> int:
    """Prints the summary of a fit, and writes its files if asked."""
    from capacity_gap import records
    from capacity_gap.cell.outdated import without_outdated
    from capacity_gap.evaluate.task_scores import as_loss, measured
    from capacity_gap.fit.frame import curves
    from capacity_gap.fit.law import law_from
    from capacity_gap.fit.optimum import locate
    from capacity_gap.records.columns import AXES, BY, renamed, rows_where
    from capacity_gap.store.files import write_text

    frame = _of_sweep(given.source, given.sweep) if given.sweep else records.load(given.source)
    frame, stale = without_outdated(renamed(frame, given.columns), given.source)
    frame = rows_where(frame, dict(given.where))
    by = [c for c in given.by.split(",") if c] if given.by is not None else BY
    frame, metric = as_loss(frame, given.metric)
    axis = given.axis if given.axis in AXES else "total"
    try:
        found, notes = curves(frame, metric=metric, axis=axis, by=by)
        located = locate(found, method=given.method)
    except ValueError as error:
        raise UserError("; ".join([str(error), *stale])) from error
    law = law_from(located, axis=axis, notes=[*stale, *notes])
    sentences = law.sentences(measure=measured(metric))
    print("\n".join([law.summary(), "", *sentences]))
    surface = _surface(frame, axis, metric) if given.surface else None
    joint = _joint(frame, given, metric)
    if joint is not None and (law.status == "law") != (joint.status == "law"):
        print(
            "  Where the two differ, the model of all cells stands: it shares curvature and each teacher's error over "
            "all curves, and averages over their shape (docs/joint.md)."
        )
    if given.out:
        _write_fit(law, sentences, located, joint, given.out, metric)
        if surface is not None:
            write_text(given.out / "surface.json", surface.to_json() + "\n")
    return 0


def _surface(frame, axis: str, metric: str | None):  # type: ignore[no-untyped-def]
    """The additive surface of runs of one kind, printed; None, and why, where there are several kinds."""
    from capacity_gap.surfaces.fitting import fit_surface
    from capacity_gap.surfaces.runs import mixed

    if differ := mixed(frame):
        print(f"\nno surface: the runs differ in {differ}. Fit a table of one kind.")
        return None
    surface = fit_surface(frame, metric=metric, axis=axis)
    print("\n" + surface.summary())
    return surface


def _joint(frame, given: argparse.Namespace, metric: str | None):  # type: ignore[no-untyped-def]
    """One model of all cells, printed; None, and why, where the table does not allow it."""
    from capacity_gap.fit import fit_joint

    try:
        fit = fit_joint(frame, axis=given.axis, metric=metric)
    except ValueError as error:
        print(f"\nno model of all cells: {error}")
        return None
    lines = list(_joint_lines(fit))
    print("\n" + "\n".join(lines if given.joint else lines[:2]))
    if fit.status != "law" and given.axis == "total" and given.metric is None:
        _print_deciding(frame, given.source)
    return fit


def _print_deciding(frame, source: str) -> None:  # type: ignore[no-untyped-def]
    """Which cells would decide what is missing, where that can be said."""
    from capacity_gap.report.next_pool import deciding
    from capacity_gap.settings.places import TOOL_WORDS

    if cells := deciding(frame):
        print(f"  Of all curves, the cells that would say most for their cost: {'; '.join(cells)}.")
        print("  Prefer these: the sentence of a curve says what that curve alone lacks.")
        print(f"  `{' '.join(TOOL_WORDS)} next {source} --goal law` tells why, and the command.")


def _joint_lines(fit: Any) -> Iterator[str]:
    """What the model of all cells says, line by line."""
    from capacity_gap.settings.scales import short_scale
    from capacity_gap.wording.fit_words import ESTABLISHED

    cells = fit.joint.cells
    yield f"one model of all {len(cells.y)} cells: {fit.status}"
    yield f"  {fit.verdict()}"
    odds = fit.status in ESTABLISHED
    if fit.curve.powers and not odds:
        yield "  no rung has a probability of being best, since no optimum is established (docs/joint.md)"
    for student in fit.students.values():
        for tokens in fit.budgets if fit.curve.powers else []:
            best = fit.best_teacher(student, tokens)
            likely = [f"{name} {p:.0%}" for name, p in best.probabilities.items() if odds and p >= SHOWN]
            told = f"; best rung: {', '.join(likely)}" if likely else ""
            at = f" at {short_scale(tokens)} tokens" if tokens is not None else ""
            size = f"{short_scale(best.params)} (95 % {span(best.interval)})" if best.params == best.params else NOWHERE
            yield f"  student {short_scale(student)}{at}: {size}{told}"
        if "d" in fit.curve.terms:
            even = fit.break_even(student)
            if even.tokens != even.tokens:
                yield f"  student {short_scale(student)}: the order of these two does not change between the budgets"
                continue
            said = f"95 % {span(even.interval)}" if even.established else "not established"
            pair = " beats ".join(reversed(fit.curve.shared))
            yield f"  student {short_scale(student)}: {pair} above {short_scale(even.tokens)} tokens ({said})"
    scatter = ", ".join(f"{name} {1e3 * sd:.1f}" for name, sd in fit.sds.items())
    yield f"  standard deviations, 1/1000: {scatter}"
    for name, found in fit.exponents().items():
        known = f"{found.value:.2f} (95 % {span(found.interval, _two, least=-math.inf)})"
        yield f"  {name} = {known if found.value == found.value else 'not known'}"
    if tests := fit.tests():
        yield "  " + ", ".join(f"p of {name}: {p:.2g}" for name, p in tests.items())


def _two(value: float) -> str:
    return f"{value:.2f}"


NOWHERE = "no best size inside the ladder"
SHOWN = 0.05  # the least probability of being best that is printed


def _of_sweep(source: str, name: str):  # type: ignore[no-untyped-def]
    """The records of one sweep's cells."""
    from capacity_gap.records.load import sweep_frame
    from capacity_gap.store.contents import open_store

    return sweep_frame(open_store(source), name)


def _write_fit(law, sentences, located, joint, out: Path, metric: str | None) -> None:  # type: ignore[no-untyped-def]
    import pandas as pd

    from capacity_gap.records.tables import write_csv
    from capacity_gap.report.joint_tables import plot_joint
    from capacity_gap.report.plots import plot_curves, plot_law, save_figure
    from capacity_gap.store.files import write_json

    out.mkdir(parents=True, exist_ok=True)
    law.save(out / "law.json")
    rows = [{**o.to_dict(), "sentence": said} for o, said in zip(law.optima, sentences, strict=True)]
    write_csv(pd.DataFrame(rows).drop(columns="tried"), out / "optima.csv")
    write_csv(located.residuals(), out / "residuals.csv", float_format="%.6g")
    drawn = {"curves": plot_curves(located, metric=metric), "law": plot_law(law)}
    tables = [out / name for name in ("law.json", "optima.csv", "residuals.csv")]
    for stale in ("joint.json", "joint.png", "joint.svg"):
        (out / stale).unlink(missing_ok=True)  # of an earlier table: `recommend` reads it beside law.json
    if joint is not None:
        drawn |= {"joint": plot_joint(joint)} if joint.curve.powers else {}
        write_json(out / "joint.json", joint.to_dict())
        tables.append(out / "joint.json")
    figures = [path for name, figure in drawn.items() for path in save_figure(figure, out / name)]
    print("\nwritten: " + ", ".join(str(p) for p in (*tables, *figures)))


def run_recommend(given: argparse.Namespace) -> int:
    """Prints the ladder with what the fit says of each rung."""
    from capacity_gap.models.folders import named_family
    from capacity_gap.report.recommend import read_fit, recommend
    from capacity_gap.settings.scales import parse_scale, parse_tokens

    ladder = named_family(given.family)
    student = ladder.student_params(parse_scale(given.student, key="--student"))
    tokens = parse_tokens(given.data, params=student, key="--data")
    law, surface, joint = read_fit(given.fit)
    try:
        told = recommend(ladder, student, tokens, law, surface, joint).summary()
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if given.fit is None or isinstance(error, UserError):
            raise
        why = f"{type(error).__name__}: {shown(error)}"
        raise UserError(f"--fit={given.fit} was not written by `fit`, or changed since ({why}). Fit again.") from error
    print(told)
    return 0
