"""Which cells of a pool can run with a command's settings: a grid would skip the others, so none of them is chosen."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capacity_gap.commands.stage_costs import base_config, cell_settings
from capacity_gap.settings.errors import ConfigError, ImpossibleCell, UserError
from capacity_gap.settings.scales import counted

if TYPE_CHECKING:
    import pandas as pd

OWN_SHAPES = "prune.shape=per_teacher"


@dataclass(frozen=True, eq=False)
class Possible:
    """What is left of a pool, the settings under which it can run, and what is to be said of the rest."""

    pool: "pd.DataFrame"
    overrides: list[str]
    notes: list[str]


def possible(
    pool: "pd.DataFrame", overrides: Sequence[str], *, fresh: bool, asked: Collection[str], needed: Collection[str]
) -> Possible:
    """The cells of a pool that can run.

    Args:
        pool: candidates; those of a pool without names are all kept.
        overrides: the settings of the command.
        fresh: whether no cell was run, so that the students' shape is still open. Then each teacher gets a shape of its
            own if that keeps cells of a teacher that was `asked` for.
        asked: teachers that were named.
        needed: teachers without which the question has no answer.

    Raises:
        ConfigError: no cell is left, or none of a teacher that is needed.
    """
    if not {"student", "teacher"} <= set(pool.columns):
        return Possible(pool, [*overrides], [])
    causes = _causes(pool, overrides)
    lost = _lost(pool, causes)
    if fresh and lost & {*asked} and not any(o.startswith(("prune.shape=", "prune.fixed=")) for o in overrides):
        own = [*overrides, OWN_SHAPES]
        other = _causes(pool, own)
        if len(_lost(pool, other) & {*asked}) < len(lost & {*asked}):
            said = _first(causes, sorted(lost & {*asked})[0])
            added = [f"The command has {OWN_SHAPES}, since {said}."]
            return Possible(_kept(pool, other), own, added + _left_out(pool, other))
    gone = [name for name in needed if name in lost] or sorted(lost) * (len(_kept(pool, causes)) == 0)
    if gone:
        raise ConfigError(f"no cell of this pool under the teacher {gone[0]} can run: {_said(causes, gone[0])}")
    return Possible(_kept(pool, causes), [*overrides], _left_out(pool, causes))


Causes = dict[tuple[str, str], str]  # by student and teacher: why a grid skips their cells


def _causes(pool: "pd.DataFrame", overrides: Sequence[str]) -> Causes:
    from dataclasses import replace

    from capacity_gap.cell.pipeline import resolve

    base, causes = base_config(overrides), {}
    for row in pool.drop_duplicates(["student", "teacher"]).to_dict("records"):
        try:
            resolve(replace(base, **cell_settings({str(k): v for k, v in row.items()})))
        except ImpossibleCell as error:
            causes[str(row["student"]), str(row["teacher"])] = error.note
        except UserError:
            continue  # of the settings, not of this pair: the run says it
    return causes


def _pairs(pool: "pd.DataFrame") -> "list[tuple[str, str]]":
    return [*zip(pool["student"].astype(str), pool["teacher"].astype(str), strict=True)]


def _kept(pool: "pd.DataFrame", causes: Causes) -> "pd.DataFrame":
    return pool[[pair not in causes for pair in _pairs(pool)]].reset_index(drop=True) if causes else pool


def _lost(pool: "pd.DataFrame", causes: Causes) -> set[str]:
    """Teachers of which no cell can run."""
    pairs = _pairs(pool)
    return {teacher for _, teacher in pairs} - {pair[1] for pair in pairs if pair not in causes}


def _said(causes: Causes, teacher: str) -> str:
    return next(cause for (_, name), cause in causes.items() if name == teacher)


def _first(causes: Causes, teacher: str) -> str:
    return _said(causes, teacher).split(". ")[0].removesuffix(".")


def _left_out(pool: "pd.DataFrame", causes: Causes) -> list[str]:
    """A line for each cause: how many cells it takes out of the pool."""
    counts: dict[str, int] = {}
    for pair in _pairs(pool):
        if pair in causes:
            counts[causes[pair]] = counts.get(causes[pair], 0) + 1
    return [
        f"{counted(n, 'cell')} of the pool cannot run and {'are' if n > 1 else 'is'} left out: {cause}"
        for cause, n in counts.items()
    ]
