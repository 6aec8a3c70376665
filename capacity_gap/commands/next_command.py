"""The command `next`: which cells to run next, why, and the command that runs them."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.cell.strategy_config import GOALS
from capacity_gap.commands.options import COLUMNS, WHERE, columns, where, whole
from capacity_gap.settings.errors import ConfigError, UserError

FAMILY = "the ladder of teachers, or models: FOLDER,ORG/NAME,... (default: that of the records, else pico)"
TABLES = (".csv", ".parquet", ".json")  # endings of a source that is no folder
NUMBER = re.compile(r"[-+0-9.e]+")
SCALE = re.compile(r"[0-9][A-Za-z0-9.]*")  # such as 80k: Hydra reads it as it stands

if TYPE_CHECKING:
    import pandas as pd

    from capacity_gap.fit import Candidate, Goal
    from capacity_gap.models.ladders import Family
    from capacity_gap.records.bills import Cost


def add(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    told = "Say which cells to run next: those that narrow an answer most per FLOP."
    parser = commands.add_parser("next", description=told)
    parser.add_argument("source", help="a store, or anything else that `fit` reads; a store may be empty")
    parser.add_argument("--goal", choices=GOALS, help="what is to be known (default: target, or law without --student)")
    parser.add_argument("--student", help="total parameters of a target or a break-even budget, such as 80k")
    parser.add_argument("--data", help="distillation tokens of a target, such as 1.2m, or 20x parameters")
    parser.add_argument("--small", help="of a break-even budget: the smaller teacher's parameters")
    parser.add_argument("--large", help="and the larger one's")
    parser.add_argument("--k", type=whole(), default=6, help="cells (default: %(default)s)")
    parser.add_argument("--pool", type=Path, metavar="FILE", help="a .csv of candidates, a row each")
    parser.add_argument("--students", help="of the pool, such as 40k,80k (default: those of the records)")
    parser.add_argument("--teachers", help="rungs of the pool (default: all of the family)")
    parser.add_argument("--budgets", help="tokens of the pool (default: those of the records)")
    parser.add_argument("--seeds", help="of the pool, such as 0,1,2 (default: those of the records and one more)")
    parser.add_argument("--family", help=FAMILY)
    parser.add_argument("--sweep", metavar="NAME", help="of a store: only the cells of this sweep")
    parser.add_argument("--columns", type=columns, default={}, metavar="OURS=THEIRS,...", help=COLUMNS)
    parser.add_argument("--where", type=where, action="append", default=[], metavar="COLUMN=VALUE,...", help=WHERE)
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.set_defaults(run=run_next)


def run_next(given: argparse.Namespace) -> int:
    """Prints the cells and the commands that run them."""
    from capacity_gap.fit import next_cells
    from capacity_gap.report.next_pool import check_inside, family_of
    from capacity_gap.report.rounds import answer_text, question_words, stopped_text

    frame = _records(given)
    ladder = family_of(frame, given.family)
    frame = frame[frame["family"] == ladder.name] if given.family and "family" in frame else frame
    goal = _goal(given, ladder)
    settings, missing = _settings(given, frame, ladder)
    try:
        pool = _pool(given, frame, ladder, goal)
    except ConfigError as error:
        if not _nothing_yet(given):
            raise
        raise ConfigError(f"{_from_nothing(given)}, and {error}") from error
    pool, settings, left_out = _possible(given, frame, pool, settings, missing, ladder, goal)
    check_inside(goal, frame, pool, key="--")
    cost = _cost(given, settings, ladder)
    try:
        found = next_cells(frame, pool, goal=goal, k=given.k, cost=cost)
    except ValueError as error:
        raise error if isinstance(error, UserError) else ConfigError(str(error)) from error
    lines, (far, beyond) = commands_for(found, settings), _beyond(goal, frame)
    what = question_words(goal)
    so_far, stopped = (None, None) if far else _answers(given, frame, goal, what)
    if given.json:
        rows = [{"cell": c.cell, "gain": c.gain, "cost_flops": c.cost, "reason": c.reason} for c in found]
        told = {
            "what": what,
            "answer": so_far,
            "stopped_answer": stopped,
            "cells": rows,
            "commands": lines,
            "missing": missing,
        }
        told |= {"assumed": assumed(found), "notes": [*beyond, *left_out]}
        print(json.dumps(told, indent=1, default=str))
        return 0
    if _nothing_yet(given):
        print(_from_nothing(given))
    print(f"the answer so far: {answer_text(so_far, what)}{stopped_text(stopped)}. {_standing(frame)}")
    print("\n".join([*beyond, *assumed(found), *_table(found, len(pool))]))
    print("\n" + "\n".join(lines))
    print("\n".join(filter(None, [missing, *left_out])), end="\n" if missing or left_out else "")
    return 0


def _answers(
    given: argparse.Namespace, frame: "pd.DataFrame", goal: "Goal", what: str
) -> tuple[list[float | None] | None, dict[str, Any] | None]:
    """The answer so far and, where rounds of a store once ended at a narrow interval, the one to report."""
    from capacity_gap.runner.noted_answers import both_answers
    from capacity_gap.store.contents import narrow_level, open_store

    if not _is_store(given) or "cell" not in frame:
        return both_answers(frame, goal, None)
    cells = set("record/" + frame["cell"].astype(str))
    return both_answers(frame, goal, narrow_level(open_store(given.source), what, among=cells))


def _is_store(given: argparse.Namespace) -> bool:
    """Whether the source is a store, and no table."""
    from capacity_gap.settings.places import user_path
    from capacity_gap.store.files import is_store

    return is_store(user_path(given.source))


def assumed(found: Sequence["Candidate"]) -> list[str]:
    """What gains rest on where the records have no fit yet."""
    from capacity_gap.fit.next_model import RATIO

    said = f"no fit yet: gains assume study one's variances and a best teacher of {RATIO:g} times the student"
    return [said] * (not all(c.fitted for c in found))


def _beyond(goal: "Goal", frame: "pd.DataFrame") -> tuple[bool, list[str]]:
    """Whether the budget or the student asked about is too far from those that were run to be answered, and what is
    said of it."""
    from capacity_gap.report.advice import between
    from capacity_gap.report.joint_advice import FAR
    from capacity_gap.report.next_pool import ALIKE
    from capacity_gap.settings.scales import short_scale

    asked = (
        ("data_tokens", goal.data_tokens, "tokens"),
        ("student_params", goal.student_params, "parameters of a student"),
    )
    farthest, said = 0.0, []
    for column, value, unit in asked:
        run = frame[column][frame[column] > 0] if column in frame else frame.iloc[:, 0][:0]
        if not value or run.empty:
            continue
        times = max(value / float(run.max()), float(run.min()) / value, 1.0)
        farthest = max(farthest, math.log(times))
        if times > ALIKE:
            what = "an answer would be a guess" if math.log(times) >= FAR else "the answer is extrapolated"
            apart = f"{short_scale(value)} {unit} lie {times:.3g} times beyond"
            said.append(f"{apart} the {between(run.min(), run.max())} that were run: {what}.")
    return farthest >= FAR, said


def _standing(frame: "pd.DataFrame") -> str:
    """What the model of all cells, which the answer is of, has established."""
    from capacity_gap.fit import fit_joint
    from capacity_gap.wording.fit_words import JOINTS

    try:
        return f"One model of all cells establishes {JOINTS[fit_joint(frame).status]}."
    except ValueError:
        return "There are too few cells for a fit of all of them."


def _records(given: argparse.Namespace) -> "pd.DataFrame":
    """The cells so far; an empty table for an empty store."""
    from capacity_gap import records
    from capacity_gap.cell.outdated import without_outdated
    from capacity_gap.records.columns import renamed, rows_where
    from capacity_gap.records.load import sweep_frame
    from capacity_gap.settings.places import user_path
    from capacity_gap.store.contents import open_store

    path = user_path(given.source)
    if not path.exists() and path.suffix in TABLES:
        raise UserError(f"{given.source} does not exist. Name a table, a store, or a new folder to start from nothing.")
    if _nothing_yet(given):
        return records.to_frame([])  # a store that nothing was run in yet
    frame = sweep_frame(open_store(given.source), given.sweep) if given.sweep else records.load(given.source)
    return rows_where(without_outdated(renamed(frame, given.columns), given.source)[0], dict(given.where))


def _from_nothing(given: argparse.Namespace) -> str:
    return f"{given.source} is empty or not there: this starts from nothing"


def _nothing_yet(given: argparse.Namespace) -> bool:
    """Whether the source is a folder that is empty or not there."""
    from capacity_gap.settings.places import user_path

    path, named = user_path(given.source), given.sweep or str(given.source).startswith("wandb:")
    return not named and not path.is_file() and not (path.is_dir() and any(path.iterdir()))


def _goal(given: argparse.Namespace, ladder: "Family") -> "Goal":
    """What was asked for.

    Raises:
        ConfigError: an option that the goal needs is missing, or one was given that it does not read.
    """
    from capacity_gap.fit import Goal
    from capacity_gap.settings.scales import parse_scale, parse_tokens

    kind = given.goal or ("target" if given.student or given.data else "law")
    needs = GOALS[kind]
    for name in ("student", "data", "small", "large"):
        if (getattr(given, name) is None) == (name in needs):
            takes = ", ".join(f"--{n}" for n in needs) or "none of --student, --data, --small, --large"
            what = "is missing" if name in needs else "is not read"
            raise ConfigError(f"--goal {kind}: --{name} {what}. It takes {takes}.")
    if kind == "law":
        return Goal()
    student = ladder.student_params(parse_scale(given.student, key="--student"))
    if kind == "target":
        return Goal("target", student, parse_tokens(given.data, params=student, key="--data"))
    small, large = (ladder.size(getattr(given, name), key=f"--{name}") for name in ("small", "large"))
    if not small < large:
        raise ConfigError(f"--small {given.small} is not below --large {given.large}. Exchange or change them.")
    return Goal("break_even", student, small=small, large=large)


def _pool(given: argparse.Namespace, frame: "pd.DataFrame", ladder: Any, goal: "Goal") -> "pd.DataFrame":
    """The candidates: a file's, or the products of what was given and what the records have."""
    from capacity_gap import records
    from capacity_gap.report.next_pool import make_pool
    from capacity_gap.settings.scales import parse_scale

    ranges = {name: getattr(given, name) for name in ("students", "teachers", "budgets", "seeds")}
    if given.pool:
        if any(ranges.values()):
            raise ConfigError("--pool names every candidate: leave out --students, --teachers, --budgets and --seeds.")
        pool = records.load(given.pool)
        needed = ("student", "teacher", "data_tokens")
        if lacking := [name for name in needed if name not in pool or pool[name].isna().any()]:
            raise ConfigError(
                f"--pool {given.pool} lacks {', '.join(lacking)} in some rows. Name students and teachers as run.py "
                "takes them, such as 80k and 270k, and give tokens: the printed commands are made from these."
            )
        return pool
    lists = {name: [v for v in text.split(",") if v] if text else [] for name, text in ranges.items()}
    if wrong := [seed for seed in lists["seeds"] if not (seed.isascii() and seed.isdigit())]:
        raise ConfigError(f"--seeds {wrong[0]} is no whole number. Write such as 0,1,2.")
    return make_pool(
        frame,
        ladder,
        students=lists["students"] or ([given.student] if given.student else []),
        teachers=lists["teachers"],
        budgets=[parse_scale(b, key="--budgets") for b in lists["budgets"]]
        or ([int(goal.data_tokens)] if goal.data_tokens else []),
        seeds=[int(s) for s in lists["seeds"]],
        given=frozenset(name for name in lists if lists[name]),
    )


BARE = "Add corpus=, sweep= and train.batch_size= to the command, so that all budgets take steps of one size."
NOT_NOTED = "How these records were run is not noted: add their other settings to the command."


UNNAMED = "The teachers are models of your own: name all of them with --family FOLDER,ORG/NAME,... for such a command."


def _possible(
    given: argparse.Namespace,
    frame: "pd.DataFrame",
    pool: "pd.DataFrame",
    settings: list[str],
    missing: str,
    ladder: "Family",
    goal: "Goal",
) -> "tuple[pd.DataFrame, list[str], list[str]]":
    """The cells that the command could run, its settings, and what is to be said of the others."""
    from capacity_gap.commands.possible_cells import possible
    from capacity_gap.report.next_pool import ALIKE

    if not ladder.rungs or missing == NOT_NOTED:
        return pool, settings, []  # the settings that decide it are not known
    ends = [size for size in (goal.small, goal.large) if size]
    sizes: dict = pool.groupby("teacher")["teacher_params"].median().to_dict() if "teacher" in pool else {}
    needed = [str(t) for t, n in sizes.items() if any(1 / ALIKE <= n / size <= ALIKE for size in ends)]
    asked = [str(t) for t in sizes] if ladder.checkpoints or given.teachers else needed
    found = possible(pool, settings, fresh=frame.empty, asked=asked, needed=needed)
    return found.pool, found.overrides, found.notes


def _cost(given: argparse.Namespace, settings: Sequence[str], ladder: "Family") -> "Cost":
    """FLOPs of the stages that a store lacks; of a table arithmetic by sizes. A published teacher is there already."""
    from capacity_gap.commands.stage_costs import StageCost
    from capacity_gap.records.bills import Arithmetic

    if _is_store(given):
        return StageCost.of(settings)
    return Arithmetic(teacher_tokens=None if ladder.published else math.nan)


def _settings(given: argparse.Namespace, frame: "pd.DataFrame", ladder: "Family") -> tuple[list[str], str]:
    """The overrides that all cells share, and what is to be said of those that are not known."""
    from capacity_gap.commands.stage_costs import shared_overrides
    from capacity_gap.runner.rerun import quoted
    from capacity_gap.settings.places import user_path

    named = _family_words(ladder)
    if _nothing_yet(given):
        return [*named, f"store={quoted(str(user_path(given.source)))}"], BARE if named else ""
    if not _is_store(given):
        return _settings_of_table(frame, named)

    overrides, known = shared_overrides(given.source, frame, named, replaces=bool(ladder.checkpoints))
    overrides = [*overrides, f"sweep={quoted(given.sweep)}"] if given.sweep else overrides
    unnamed = not ladder.name and not any("family" in o.partition("=")[0] for o in overrides)
    return overrides, UNNAMED if unnamed else "" if known else NOT_NOTED


def _family_words(ladder: "Family") -> list[str]:
    """The overrides that name a ladder."""
    from capacity_gap.models.ladders import FOLDERS
    from capacity_gap.runner.rerun import quoted

    if ladder.checkpoints:
        return [f"family={FOLDERS}", f"family.folders=[{','.join(map(quoted, ladder.published.values()))}]"]
    return [f"family={ladder.name}"] * (ladder.name not in ("pico", ""))


def _settings_of_table(frame: "pd.DataFrame", named: list[str]) -> tuple[list[str], str]:
    """What the columns of a table say of its settings, and what they do not."""
    from capacity_gap.cell.table_settings import table_settings
    from capacity_gap.runner.rerun import quoted

    if frame.empty:
        return named, BARE if named else ""
    told = table_settings(frame)
    pairs = (override.partition("=") for override in told.overrides)
    overrides = [*named, *(f"{key}={value if NUMBER.fullmatch(value) else quoted(value)}" for key, _, value in pairs)]
    if not told.known:
        return overrides, NOT_NOTED
    lacks = f"The table does not tell {', '.join(told.untold)}: add that to the command." if told.untold else ""
    return overrides, lacks


def _table(found: Sequence["Candidate"], tried: int) -> list[str]:
    """The cells as text."""
    lines = [f"the next {len(found)} of {tried} cells, by the share of the answer's variance they remove per FLOP:"]
    lines += ["   gain   FLOPs  why"]
    for c in found:
        lines.append(f"  {c.gain:5.1%} {c.cost:7.1e}  {c.reason}")
    total, spent = sum(c.gain for c in found), sum(c.cost for c in found)
    lines.append(f"  {total:5.1%} {spent:7.1e}  together")
    return lines


def commands_for(found: Sequence["Candidate"], settings: Sequence[str]) -> list[str]:
    """The fewest `run.py -m` commands that make these cells and no others."""
    from capacity_gap.report.products import grid_commands
    from capacity_gap.runner.rerun import quoted
    from capacity_gap.settings.scales import format_scale, short_scale

    names = ("student", "teacher", "data", "seed", "teacher_seed")
    rows = []
    for c in found:
        row = {name: str(c.cell[name]) for name in names if name in c.cell}
        row |= {of: short_scale(c.cell[f"{of}_params"]) for of in ("student", "teacher") if of not in c.cell}
        rows.append(row | {"data": format_scale(int(c.cell["data_tokens"]))} if "data_tokens" in c.cell else row)
    paired = all("seed" in row and row["seed"] == row.get("teacher_seed") for row in rows)
    keys = [name for name in names if name in rows[0] and not (paired and name == "teacher_seed")]
    tail = ["teacher_seed=${seed}"] if paired else []
    words = [s for s in settings if not s.startswith("store=")]
    stores = [s for s in settings if s.startswith("store=")]
    # A name comes from a table, so it is spelt for Hydra: `a,b` would be two values, `${x}` a look-up.
    spelt = [tuple(v if SCALE.fullmatch(v) else quoted(v) for v in (row[key] for key in keys)) for row in rows]
    return grid_commands(words, keys, spelt, [*tail, *stores])
