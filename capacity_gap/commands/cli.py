"""`python -m capacity_gap COMMAND`: what is done with records once they are there. Heavy imports wait until needed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from capacity_gap import __version__
from capacity_gap.cell.config import default_store
from capacity_gap.commands import report_commands, store_commands
from capacity_gap.settings.errors import ConfigError, UserError


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(
        prog="capacity_gap",
        description="From which teacher should a student of N parameters be distilled? "
        "Cells and grids are run by run.py; these commands work on what they recorded.",
    )
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="locate each student's best teacher, fit the ratio law, draw the curves")
    fit.add_argument("source", help="a store, a folder of CSV files, a .csv or a .parquet file")
    fit.add_argument("--axis", choices=("total", "non_embedding"), default="total", help="which parameters are counted")
    fit.add_argument(
        "--metric",
        help="column to fit (default: student_loss, or loss in foreign tables)",
    )
    fit.add_argument("--by", help="columns that part curves, such as family,data_tokens (default: every setting)")
    fit.add_argument(
        "--method",
        choices=("asymmetric", "quadratic", "local", "argmin"),
        default="asymmetric",
        help="how the optimum of a curve is found (default: %(default)s; argmin is the paper's)",
    )
    fit.add_argument("--sweep", metavar="NAME", help="of a store: only the cells of this sweep (`store ls` names them)")
    fit.add_argument("--surface", action="store_true", help="also the additive loss surface (docs/surfaces.md)")
    fit.add_argument("--out", type=Path, help="folder for law.json, optima.csv and the figures; without it, only text")
    fit.set_defaults(run=run_fit)
    frontier = commands.add_parser("frontier", help="draw score against training compute, with the published models")
    frontier.add_argument("source", nargs="?", help="as for fit; without it, the published models alone")
    frontier.add_argument("--metric", default="average", help="a benchmark or recorded column (default: %(default)s)")
    frontier.add_argument("--compute", default="distillation", help="student, distillation (default) or total")
    frontier.add_argument("--out", type=Path, help="stem of the .png, .svg and .csv; without it, only text")
    frontier.set_defaults(run=run_frontier)
    _add_evaluate(commands)
    plan = commands.add_parser("plan", help="what a grid would run and cost; takes what `run.py -m` takes")
    plan.add_argument("overrides", nargs=argparse.REMAINDER, help="such as +sweeps=quick, or student=60k,90k teacher=…")
    plan.set_defaults(run=run_plan)
    status = commands.add_parser("status", help="how far the grids of a store are, from any machine, at any time")
    status.add_argument("store", nargs="?", default=default_store(), help="default: %(default)s")
    status.add_argument("--sweep", metavar="NAME", help="only this sweep (`store ls` names them)")
    status.add_argument("--failed", action="store_true", help="why cells failed: cause, end of the log, how to rerun")
    status.set_defaults(run=run_status)
    fetch = commands.add_parser("fetch", help="download checkpoints for machines without a network")
    fetch.add_argument("what", nargs="+", help="repositories, or FAMILY:RUNG such as qwen2_5:1.5b")
    fetch.set_defaults(run=run_fetch)
    _add_recommend(commands)
    report_commands.add(commands)
    export = commands.add_parser("export", help="a cell's model: sharded safetensors, tokenizer, model card")
    export.add_argument("cell", help="the beginning of a recorded cell's digest (column `cell` of the records)")
    export.add_argument("out", type=Path, help="a folder that is empty or not there yet")
    export.add_argument("--store", default=default_store(), help="default: %(default)s")
    export.add_argument("--shard", default="2GB", help="largest size of one file (default: %(default)s)")
    export.set_defaults(run=run_export)
    store_commands.add(commands)
    return root


def _add_recommend(commands) -> None:  # type: ignore[no-untyped-def]
    recommend = commands.add_parser(
        "recommend", help="which rung of a ladder to take as the teacher, and how sure that is"
    )
    recommend.add_argument("--student", required=True, help="total parameters, such as 1b")
    recommend.add_argument("--family", required=True, help="the ladder, such as qwen2_5")
    recommend.add_argument(
        "--data", default="20x", help="distillation tokens, such as 10b, or 20x parameters (default)"
    )
    recommend.add_argument(
        "--fit", type=Path, help="a law.json or surface.json of `fit` (default: the study's, results/pico)"
    )
    recommend.set_defaults(run=run_recommend)


def run_recommend(given: argparse.Namespace) -> int:
    """Prints the ladder with what the fit says of each rung."""
    from capacity_gap.models.ladders import family
    from capacity_gap.report.recommend import read_fit, recommend
    from capacity_gap.settings.scales import parse_scale, parse_tokens

    ladder, student = family(given.family), parse_scale(given.student, key="--student")
    tokens = parse_tokens(given.data, params=student, key="--data")
    law, surface = read_fit(given.fit)
    print(recommend(ladder, student, tokens, law, surface).summary())
    return 0


def _add_evaluate(commands) -> None:  # type: ignore[no-untyped-def]
    evaluate = commands.add_parser("evaluate", help="score any model on benchmarks, for tables of comparison")
    evaluate.add_argument("model", help="a model folder, or a repository of the hub")
    evaluate.add_argument("--tasks", help="name or name:shots, with commas (default: the paper's, or the folder's)")
    evaluate.add_argument("--task-folder", type=Path, help="task files of your own, or a suite of a store")
    evaluate.add_argument("--tokenizer", help="where the model's tokenizer is, if not beside it")
    evaluate.add_argument("--limit", type=int, help="only so many questions of each task")
    evaluate.add_argument("--batch-size", type=int, default=8, help="sequences at once (default: %(default)s)")
    evaluate.add_argument("--device", default="auto", help="default: %(default)s")
    evaluate.add_argument("--dtype", default="fp32", help="fp32 (default) or bf16")
    evaluate.add_argument("--allow-code-execution", action="store_true", help="let tasks run what the model writes")
    evaluate.add_argument("--train-tokens", help="tokens it was trained on, such as 300b: its FLOPs go into the CSV")
    evaluate.add_argument("--out", type=Path, help="CSV to which the scores are added (`compare` reads it)")
    evaluate.set_defaults(run=run_evaluate)
    compare = commands.add_parser("compare", help="models beside one another, from the tables of `evaluate --out`")
    compare.add_argument("tables", nargs="+", type=Path, help="CSV files of `evaluate --out`")
    compare.add_argument("--out", type=Path, help="CSV: one row a model, columns metrics/<task> as records have")
    compare.set_defaults(run=run_compare)
    judge = commands.add_parser("judge", help="let a model behind an OpenAI-compatible endpoint grade answers")
    judge.add_argument("answers", nargs="+", help="one (single grades) or two (pairs): model folders or answers .jsonl")
    judge.add_argument("--endpoint", required=True, help="base URL, such as http://localhost:8000/v1")
    judge.add_argument("--model", required=True, help="the judge's name there")
    judge.add_argument("--out", type=Path, required=True, help="folder for answers, judgements (the cache) and summary")
    judge.add_argument("--questions", type=Path, help="questions .jsonl of your own (default: those of this package)")
    judge.add_argument("--key-env", default="OPENAI_API_KEY", help="variable that holds the key (default: %(default)s)")
    judge.add_argument("--price", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="a million")
    judge.add_argument("--max-tokens", type=int, default=512, help="of one judgement (default: %(default)s)")
    judge.add_argument("--device", default="auto", help="where model folders answer (default: %(default)s)")
    judge.add_argument("--yes", action="store_true", help="answer and ask the judge; without it only the cost is shown")
    judge.set_defaults(run=run_judge)


def run_evaluate(given: argparse.Namespace) -> int:
    """Prints a model's scores, and adds them to a table if asked."""
    from capacity_gap.evaluate.other_models import score_other

    return score_other(given)


def run_compare(given: argparse.Namespace) -> int:
    """Prints a table of comparison, and writes it if asked."""
    from capacity_gap.evaluate.compare import compare

    return compare(given.tables, given.out)


def run_judge(given: argparse.Namespace) -> int:
    """Shows what judging costs and, with --yes, does it."""
    from capacity_gap.judge.verdicts import run

    return run(given)


def run_frontier(given: argparse.Namespace) -> int:
    """Prints the points of the figure, cheapest first, and writes it if asked."""
    from capacity_gap import records
    from capacity_gap.cell.outdated import without_outdated
    from capacity_gap.report.frontier import better_up, frontier_points, plot_frontier
    from capacity_gap.report.plots import save_figure

    frame, stale = without_outdated(records.load(given.source), given.source) if given.source else (None, [])
    points, notes = frontier_points(frame, given.metric, given.compute)
    points = points.sort_values("flops")
    print(points.to_string(index=False, float_format="{:.4g}".format))
    for note in (*stale, *notes):
        print(f"note: {note}.")
    if given.out:
        up = better_up(frame, given.metric)
        drawn = plot_frontier(points, given.metric, given.compute, higher_is_better=up)
        files = save_figure(drawn, given.out)
        points.to_csv(given.out.with_suffix(".csv"), index=False)
        print("\nwritten: " + ", ".join(map(str, [*files, given.out.with_suffix(".csv")])))
    return 0


def run_plan(given: argparse.Namespace) -> int:
    """Composes the grid and says what it would take."""
    import runpy

    script = Path(__file__).resolve().parents[2] / "run.py"
    sys.argv = [str(script), "-m", *given.overrides, "plan=true"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run_status(given: argparse.Namespace) -> int:
    """Prints the state of one grid or of all in a store; 1 if a cell failed."""
    from rich.console import Console

    from capacity_gap.cell.outdated import outdated, said
    from capacity_gap.runner.progress import View, table
    from capacity_gap.settings.errors import choose
    from capacity_gap.store import contents

    store = contents.open_store(given.store)
    known = contents.sweeps(store)
    if given.sweep:
        choose("--sweep", given.sweep, known)
        known = {given.sweep: known[given.sweep]}
    failed = 0
    for name, cells in known.items():
        now = View(store, cells).snapshot()
        failed += now.counts["failed"]
        title = f"{name}: {now.share:.0%} of {len(cells)} cells"
        Console(highlight=False, soft_wrap=True).print(table(now, cells, title=title))
        if given.failed:
            for key, state in now.cells.items():
                if state == "failed":
                    print(_autopsy(store, key, cells[key]))
    if failed and given.failed:
        print(
            "\nWith other settings a rerun is another cell: `sweep=NAME` adds it to a sweep, and `python -m "
            f"capacity_gap store forget {store.root} --failed NAME` forgets those of the sweep that failed."
        )
    made = known[given.sweep] if given.sweep else contents.recorded(store)
    print("".join(f"{line}\n" for line in said(outdated(store, made))), end="")
    return 1 if failed else 0


def _autopsy(store, key: str, cell) -> str:  # type: ignore[no-untyped-def]
    """Why one cell failed, what its log ends with, and the command that runs just this cell."""
    from capacity_gap.runner import rerun
    from capacity_gap.settings.errors import Damaged
    from capacity_gap.store.contents import failure_file
    from capacity_gap.store.files import read_json
    from capacity_gap.store.logs import tail

    try:
        cause = read_json(failure_file(store, key), ["error"])["error"]
    except Damaged as error:
        cause = f"not known, {error.file.relative_to(store.root)} {error.why}"
    lines = [f"\nfailed: {cell['name']}", f"  cause: {cause}"]
    if found := tail(store, list(cell["stages"])):
        lines += [f"  log:   {found[0]}", *(f"    | {line}" for line in found[1])]
    return "\n".join([*lines, f"  rerun: {rerun.command(cell['overrides'], store.root)}"])


def run_fetch(given: argparse.Namespace) -> int:
    """Downloads checkpoints to the hub's cache."""
    from capacity_gap.models.ladders import family

    repositories = []
    for what in given.what:
        name, _, rung = what.partition(":")
        ladder = family(name) if rung else None
        if ladder and not ladder.published:
            raise ConfigError(f"{what}: teachers of {name} are trained on the spot, there is nothing to fetch.")
        repositories.append(ladder.published[ladder.rung(rung)] if ladder else what)
    from capacity_gap.models.loading import fetch  # torch, only now that the names are known to be good

    for repository in repositories:
        print(f"{repository}: {fetch(repository)}", flush=True)
    return 0


def run_export(given: argparse.Namespace) -> int:
    """Writes a cell's last model to a folder."""
    from capacity_gap.export.student import export
    from capacity_gap.store import contents

    out = export(contents.open_store(given.store), given.cell, given.out, shard=given.shard)
    print(f"{out}: " + ", ".join(sorted(p.name for p in out.iterdir())))
    return 0


def run_fit(given: argparse.Namespace) -> int:
    """Prints the summary of a fit, and writes its files if asked."""
    from capacity_gap import records
    from capacity_gap.cell.outdated import without_outdated
    from capacity_gap.evaluate.task_scores import as_loss
    from capacity_gap.fit.frame import BY, curves
    from capacity_gap.fit.law import law_from
    from capacity_gap.fit.optimum import locate

    frame = _of_sweep(given.source, given.sweep) if given.sweep else records.load(given.source)
    frame, stale = without_outdated(frame, given.source)
    by = [c for c in given.by.split(",") if c] if given.by is not None else BY
    frame, metric = as_loss(frame, given.metric)
    try:
        found, notes = curves(frame, metric=metric, axis=given.axis, by=by)
        located = locate(found, method=given.method)
    except ValueError as error:
        raise UserError("; ".join([str(error), *stale])) from error
    law = law_from(located, axis=given.axis, notes=[*stale, *notes])
    print(law.summary())
    surface = _surface(frame, given, metric) if given.surface else None
    if given.out:
        _write_fit(law, located, given.out, metric)
        if surface is not None:
            (given.out / "surface.json").write_text(surface.to_json() + "\n")
    return 0


def _surface(frame, given: argparse.Namespace, metric: str | None):  # type: ignore[no-untyped-def]
    """The additive surface of runs of one kind, printed; None, and why, where there are several kinds."""
    from capacity_gap.fit.fitting import fit_surface
    from capacity_gap.fit.runs import mixed

    if differ := mixed(frame):
        print(f"\nno surface: the runs differ in {differ}. Fit a table of one kind.")
        return None
    surface = fit_surface(frame, metric=metric, axis=given.axis)
    print("\n" + surface.summary())
    return surface


def _of_sweep(source: str, name: str):  # type: ignore[no-untyped-def]
    """The records of one sweep's cells."""
    from capacity_gap.records.load import sweep_frame
    from capacity_gap.store.contents import open_store

    return sweep_frame(open_store(source), name)


def _write_fit(law, located, out: Path, metric: str | None) -> None:  # type: ignore[no-untyped-def]
    import pandas as pd

    from capacity_gap.report.plots import plot_curves, plot_law, save_figure

    out.mkdir(parents=True, exist_ok=True)
    law.save(out / "law.json")
    pd.DataFrame([o.to_dict() for o in law.optima]).to_csv(out / "optima.csv", index=False)
    located.residuals().to_csv(out / "residuals.csv", index=False, float_format="%.6g")
    drawn = {"curves": plot_curves(located, metric=metric), "law": plot_law(law)}
    figures = [path for name, figure in drawn.items() for path in save_figure(figure, out / name)]
    tables = (out / "law.json", out / "optima.csv", out / "residuals.csv")
    print("\nwritten: " + ", ".join(str(p) for p in (*tables, *figures)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a user's error is one paragraph and exit status 2."""
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
