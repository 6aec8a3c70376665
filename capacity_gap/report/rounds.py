"""The rounds of an adaptive grid in words: the answer before each, what was run and why."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from capacity_gap.settings.scales import counted, short_scale
from capacity_gap.wording.intervals import ends, span

if TYPE_CHECKING:
    from capacity_gap.fit import Goal

Answer = Sequence[float | None]  # value, lower end, upper end; None where there is no end, or no value


def question_words(goal: "Goal") -> str:
    """What is to be known, named by its sizes to three digits at most, however they were written."""
    student, data, small, large = (
        short_scale(size or 0) for size in (goal.student_params, goal.data_tokens, goal.small, goal.large)
    )
    return {
        "law": "best teacher over student",
        "target": f"best teacher of {student} at {data} tokens",
        "break_even": f"tokens from which {large} beats {small} for {student}",
    }[goal.kind]


def answer_text(found: Answer | None, what: str) -> str:
    """The answer so far, named."""
    return f"{what}: {bounds_text(found, level='95 %: ')}"


def bounds_text(found: Answer | None, *, level: str = "") -> str:
    """A value with its interval, and by what factor that is wide; `level`: what is said before the interval."""
    if found is None or not _known(found[0]):
        return "not known yet"
    value, low, high = found
    low, high = ends((low, high))
    ratio = f", a factor of {high / low:.3g}" if low and high else ""
    return f"{_short(value)} ({level}{span((low, high), _short)}{ratio})"


def round_line(note: Mapping[str, Any]) -> str:
    """One round: cells, device-hours as planned, and the answer before it."""
    cells = len(note["cells"])
    many = "cell" if cells == 1 else "cells"
    said = answer_text(note.get("answer"), note.get("what", "answer"))
    return f"round {note['round']}: {cells} {many}, {note.get('device_hours', 0.0):.2g} device-hours; before it, {said}"


def end_line(note: Mapping[str, Any]) -> str:
    """Why a grid in rounds ended, and the answer then."""
    many = counted(note.get("own_rounds", note["rounds"]), "round")
    said = answer_text(note.get("answer"), note.get("what", "answer"))
    return f"ended after {many}: {note['ended']}; {said}{stopped_text(note.get('stopped_answer'))}"


def stopped_text(found: Mapping[str, Any] | None) -> str:
    """The interval to report after rounds that ended because one was narrow; empty where they ended otherwise."""
    if not found or not found["answer"]:
        return ""
    low, high = ends(found["answer"][1:])
    level = f"{100 * found['level']:g} %"
    why = "Rounds ended at a narrow 95 % interval, which is narrow partly by chance"
    if low and high:
        return f". Report {span((low, high), _short)} ({level}). {why}"
    part = f"only {span((low, high), _short)} ({level})" if low or high else f"no interval: the {level} one has no end"
    more = f"; until= below {found['factor']:.3g} goes on with this grid" if found.get("factor") else ""
    return f". Report {part}. {why}. So nothing is decided: add seeds, or teachers of other sizes{more}"


def stop_words(name: str, stopped: Mapping[str, str], states: Mapping[str, str]) -> list[str]:
    """Why the cells of a sweep that wait were left, each reason once.

    Args:
        name: of the sweep.
        stopped: cells that a process left, with why.
        states: the state of each cell.
    """
    reasons = Counter(why for key, why in stopped.items() if states.get(key) == "waiting")
    return [
        f"{name} was stopped: {why}; {counted(count, 'cell')} left; the same command goes on with them"
        for why, count in reasons.items()
    ]


def reasons(note: Mapping[str, Any]) -> list[str]:
    """Why its cells were chosen, each reason once."""
    return list(dict.fromkeys(cell.get("reason", "") for cell in note["cells"].values()))


def by_what(notes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rounds of each question that a grid was run for, by its name."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for note in notes:
        found.setdefault(note.get("what", "answer"), []).append(note)
    return list(found.items())


def rounds_table(notes: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], list[str]]]:
    """For the report, a round each: its number, cells, device-hours and the answer before it; and its reasons."""
    return [
        (
            [
                str(note["round"]),
                str(len(note["cells"])),
                f"{note.get('device_hours', 0.0):.2g}",
                bounds_text(note.get("answer")),
            ],
            reasons(note),
        )
        for note in notes
    ]


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float | None) -> str:
    assert value is not None
    return short_scale(value) if value >= 1000 else f"{value:.3g}"
