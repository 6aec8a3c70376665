"""Fits a grid that is too expensive to a budget: its most informative part for the given hours. No torch."""

import sys
from collections.abc import Sequence

from capacity_gap.report.products import grid_commands
from capacity_gap.runner.adaptive import Cells, Rounds
from capacity_gap.runner.plan_lines import format_hours
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import counted

MOST_CELLS = 1000  # of a grid that a part is chosen from: the search takes the square of their number
SHOWN = 6  # commands


def proposed(rounds: Rounds, hours: float) -> str:
    """The best part of a grid that costs no more device-hours, as text: what it holds and the commands that run it."""
    # Here, since every grid imports this file, and pandas takes long.
    from capacity_gap.fit.next_cells import CORE, BudgetTooSmall

    try:
        rounds.check()
        part = rounds.within(hours)
    except BudgetTooSmall as error:
        needed = format_hours(error.needed * rounds.worker.devices / 3600)
        less = ", or estimate less: next.goal=target next.student=… next.data=…" if error.for_what == CORE else "."
        return f"{error.for_what.capitalize()} would cost {needed} device-hours in this grid. Raise the budget{less}"
    except ValueError as error:
        return f"No part of the grid was found for next.goal={rounds.config.next.goal}: {error}"
    students, teachers = (len({c.description[of] for c, _ in part.values()}) for of in ("student", "teacher"))
    said = (
        f"The best part that fits is {counted(len(part), 'cell')} ({counted(students, 'student')}, "
        f"{counted(teachers, 'teacher')}, {format_hours(rounds.hours(part))} device-hours):"
    )
    lines = commands(part, [overrides for _, overrides in rounds.cells.values()])
    more = [f"  … and {len(lines) - SHOWN} more commands"] if len(lines) > SHOWN else []
    choose = "Or add strategy=adaptive, which chooses cells from the results so far and stops at the budget."
    return "\n".join([said, *(f"  {line}" for line in lines[:SHOWN]), *more, choose])


def commands(part: Cells, all_overrides: Sequence[Sequence[str]]) -> list[str]:
    """The fewest `run.py -m` commands that run these cells of a grid and no others."""
    rows = [dict(_split(o) for o in overrides) for overrides in all_overrides]
    keys = [key for key in rows[0] if len({row.get(key) for row in rows}) > 1]
    same = [o for o in all_overrides[0] if _split(o)[0] not in keys]
    chosen = [dict(_split(o) for o in overrides) for _, overrides in part.values()]
    hydra = [word for word in sys.argv[1:] if word.startswith("hydra")]
    return grid_commands(same, keys, [tuple(row[key] for key in keys) for row in chosen], hydra)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value


def check_affordable(rounds: Rounds, hours: float | None, needed: float, said: str) -> None:
    """Raises where a grid needs more device-hours than there are, and lists what could be run instead.

    Raises:
        ConfigError: always where `needed` is more than `hours`. `said`: the basis of the estimate.
    """
    if hours is None or needed <= hours:
        return
    few = len(rounds.cells) <= MOST_CELLS
    instead = proposed(rounds, hours) if few else "Add strategy=adaptive, or run fewer cells."
    raise ConfigError(
        f"budget_hours={hours:g}, but this needs about {format_hours(needed)} device-hours ({said}). Nothing was "
        f"started. Raise budget_hours; plan=true lists the cost of each teacher and each curve. {instead}"
    )
