"""The cells that could be run next: students and budgets of records under every rung of a ladder. Imports no torch."""

from collections.abc import Sequence
from itertools import count, product
from typing import Any

import pandas as pd

from capacity_gap.fit.next_reasons import ALIKE
from capacity_gap.models.folders import named_family
from capacity_gap.models.ladders import FAMILIES, Family, family
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import format_scale, parse_scale, short_scale

USUAL = "pico"
MOST = 2000  # cells of a pool that a fit looks at by itself: the search takes the square of their number
EQUAL = 1.02  # a teacher that is larger by less is no teacher that is pruned


def family_of(frame: pd.DataFrame, named: str | None) -> Family:
    """The ladder that is named, or that of the records; of a table from elsewhere the teachers that it has.

    Raises:
        ConfigError: the records are of several families, or the name is not known.
    """
    held = sorted(frame["family"].dropna().astype(str).unique()) if "family" in frame else []
    if named:
        return named_family(named)
    if len(held) > 1:
        raise ConfigError(f"the records are of several families: {', '.join(held)}. Name one: --family {held[0]}.")
    if held and held[0] in FAMILIES:
        return family(held[0])
    return family(USUAL) if frame.empty else Family("", {}, 1)


def deciding(frame: pd.DataFrame, k: int = 4) -> list[str]:
    """The cells that would narrow the ratio of best teacher to student most per FLOP, in words; none where that cannot
    be said: of several families, or without students, teachers and budgets."""
    from capacity_gap.fit import next_cells

    try:
        pool = make_pool(
            frame, family_of(frame, None), students=[], teachers=[], budgets=[], seeds=[], given=frozenset()
        )
        found = next_cells(frame, pool, goal="law", k=k) if len(pool) <= MOST else []
    except ValueError:  # `ConfigError` is one
        return []
    return [_cell_words(c.cell) for c in found]


def _cell_words(cell: dict[str, Any]) -> str:
    seed = f", seed {cell['seed']}" if "seed" in cell else ""
    teacher, student = (cell.get(of) or short_scale(cell[f"{of}_params"]) for of in ("teacher", "student"))
    return f"{teacher} for {student} at {format_scale(int(cell['data_tokens']))} tokens{seed}"


def make_pool(
    frame: pd.DataFrame,
    ladder: Family,
    *,
    students: Sequence[str],
    teachers: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    given: frozenset[str],
) -> pd.DataFrame:
    """Every product of students, teachers, budgets and seeds whose teacher is larger than its student.

    Args:
        frame: records so far.
        ladder: of the teachers; one without rungs for those of the records alone.
        students: names, beside those of the records unless they were `given`.
        teachers: names of rungs; by default all of the ladder.
        budgets: tokens, beside those of the records unless they were `given`.
        seeds: by default those of the records and one more.
        given: which of these four are all that is to be tried.

    Returns:
        Columns student, student_params, teacher, teacher_params, data_tokens, seed, teacher_seed.

    Raises:
        ConfigError: there is no student, no teacher or no budget, or a name is not known.
    """
    by_student, by_teacher = (_sizes(frame, of) for of in ("student", "teacher"))
    named: dict[str, float] = {
        name: by_student.get(name) or ladder.student_params(parse_scale(name, key="--students")) for name in students
    }
    chosen = named if "students" in given else {**by_student, **named}
    rungs: dict[str, float] = {name: ladder.params[name] for name in map(ladder.rung, teachers)} if ladder.rungs else {}
    if teachers and not ladder.rungs:
        rungs = {name: by_teacher.get(name) or parse_scale(name, key="--teachers") for name in teachers}
    rungs = rungs or {**ladder.params} or by_teacher
    tokens = [*budgets] if "budgets" in given else sorted({*_values(frame, "data_tokens"), *budgets})
    for what, held, such in (("students", chosen, "40k,80k,110k"), ("budgets", tokens, "300k,1.2m")):
        if not held:
            family = "" if len(frame) else ", and --family where the ladder is not pico"
            raise ConfigError(f"the records name no {what}. Give some: --{what} {such}{family}.")
    pairs = _seeds(frame, seeds, trained=not ladder.published)
    rows = [
        (s, n, t, m, d, *pair)
        for (s, n), (t, m), d, pair in product(chosen.items(), rungs.items(), tokens, pairs)
        if m > EQUAL * n
    ]
    names = ["student", "student_params", "teacher", "teacher_params", "data_tokens", "seed", "teacher_seed"]
    if not rows:
        raise ConfigError(
            f"no teacher of {', '.join(rungs)} is larger than a student of {', '.join(chosen)}. Name larger ones with "
            "--teachers, or smaller students."
        )
    pool = pd.DataFrame(rows, columns=names)
    spent = _trained_on(frame, pool["teacher_params"])
    return pool if spent is None else pool.assign(teacher_tokens=spent)


def check_inside(goal: Any, frame: pd.DataFrame, pool: pd.DataFrame, *, key: str) -> None:
    """Raises where a question lies outside what was run and what could be: nothing in the pool would answer it.

    Args:
        goal: `fit.Goal`.
        frame: the records so far.
        pool: the candidates.
        key: what the options of the question begin with, `--` or `next.`.

    Raises:
        ConfigError: what is asked for, and what is allowed.
    """
    asked = (
        ("student", goal.student_params, "student_params", "students", "parameters"),
        ("data", goal.data_tokens, "data_tokens", "budgets", "tokens"),
        ("small", goal.small, "teacher_params", "teachers", "parameters"),
        ("large", goal.large, "teacher_params", "teachers", "parameters"),
    )
    for name, value, column, what, unit in asked:
        sizes = pd.concat([pd.to_numeric(t[column], errors="coerce") for t in (frame, pool) if column in t] or [EMPTY])
        sizes = sizes[sizes > 0].dropna()
        if value is None or sizes.empty or sizes.min() / ALIKE <= value <= sizes.max() * ALIKE:
            continue
        more = f"; or give --{what} that include it" if key == "--" else f"; or a grid whose {what} include it"
        largest = pool["teacher_params"].max()
        if name == "student" and value * EQUAL >= largest:
            more = f". No teacher of the pool is larger than it: the largest has {short_scale(largest)} parameters"
        raise ConfigError(
            f"{key}{name}={short_scale(value)} lies outside the {what} of this pool and its records, so none of its "
            f"cells would tell. Allowed: {short_scale(sizes.min())} to {short_scale(sizes.max())} {unit}{more}."
        )


EMPTY = pd.Series(dtype=float)


def _trained_on(frame: pd.DataFrame, sizes: pd.Series) -> pd.Series | None:
    """Tokens that teachers of these sizes would be trained on, as those of the records were: one number for all, else
    in proportion to parameters; None where the records do not tell."""
    if "teacher_tokens" not in frame or frame.empty:
        return None
    told = frame[["teacher_tokens", "teacher_params"]].apply(pd.to_numeric, errors="coerce").dropna()
    if told.empty:
        return None
    alike = told["teacher_tokens"].max() < ALIKE * told["teacher_tokens"].min()
    each = (told["teacher_tokens"] / told["teacher_params"]).median()
    return pd.Series(told["teacher_tokens"].median(), sizes.index) if alike else each * sizes


def _sizes(frame: pd.DataFrame, of: str) -> dict[str, float]:
    """Parameters by name, smallest first; a table without names is called by its sizes."""
    if f"{of}_params" not in frame or frame.empty:
        return {}
    sizes = pd.to_numeric(frame[f"{of}_params"], errors="coerce")
    names = frame[of].astype(str) if of in frame else sizes.dropna().round().astype(int).map(format_scale)
    found = sizes.groupby(names).median().dropna().sort_values()
    return {str(name): float(size) for name, size in found.items()}


def _values(frame: pd.DataFrame, column: str) -> list[int]:
    if column not in frame:
        return []
    found = pd.to_numeric(frame[column], errors="coerce").dropna()
    return sorted({int(v) for v in found if v > 0})


def _seeds(frame: pd.DataFrame, given: Sequence[int], *, trained: bool) -> list[tuple[int, int]]:
    """Seeds with the teacher's: the same where the records have it so, or where there is nothing to go by."""
    first = _whole(frame, "seed")
    seeds = [*given] or _one_more(first)
    if not trained:
        return [(s, 0) for s in seeds]
    both = {"seed", "teacher_seed"} <= set(frame.columns) and len(frame)
    if not both or bool((frame["seed"].astype(str) == frame["teacher_seed"].astype(str)).all()):
        return [(s, s) for s in seeds]
    return [*product(seeds, _one_more(_whole(frame, "teacher_seed")))]


def _one_more(seeds: Sequence[int]) -> list[int]:
    """These, and the smallest that is not among them."""
    return [*seeds, next(n for n in count() if n not in seeds)]


def _whole(frame: pd.DataFrame, column: str) -> list[int]:
    """The whole numbers of a column of labels."""
    held = frame[column].dropna().tolist() if column in frame else []
    return sorted({int(float(v)) for v in held if str(v).removesuffix(".0").isdigit()})
