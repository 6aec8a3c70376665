"""The questions that a judge grades answers to, and files of answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.judge import jsonl
from capacity_gap.settings.errors import UserError

QUESTIONS = Path(__file__).with_name("questions.jsonl")


@dataclass(frozen=True)
class Question:
    """One question of two or more turns, with a reference where there is a right answer."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: str | None = None


def read_questions(file: Path = QUESTIONS) -> list[Question]:
    """Questions from JSON lines: `id` (or MT-Bench's `question_id`), `category`, `turns`, and maybe `reference`.

    Raises:
        UserError: a field is missing or of another kind, an id comes twice, or there is no question.
    """
    found: dict[str, Question] = {}
    for place, row in jsonl.read_given(file, ("category", "turns")):
        name = _id(place, row, found)
        if not isinstance(row["category"], str):
            raise UserError(f"{place}: category should be a text, not {row['category']!r}.")
        found[name] = Question(name, row["category"], _texts(place, "turns", row["turns"]), _reference(place, row))
    if not found:
        raise UserError(f"{file} contains no question.")
    return list(found.values())


def read_answers(file: Path) -> dict[str, list[str]]:
    """Answers from JSON lines `{"id", "answers": [one a turn]}`, by question; `question_id` does for `id`."""
    found: dict[str, list[str]] = {}
    for place, row in jsonl.read_given(file, ("answers",)):
        found[_id(place, row, found)] = list(_texts(place, "answers", row["answers"]))
    return found


def _id(place: str, row: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    given = row.get("id", row.get("question_id"))
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise UserError(f"{place}: id (or question_id) should be a text or a whole number, not {given!r}.")
    if str(given) in before:
        raise UserError(f"{place}: another line has the id {given}. Use unique ids.")
    return str(given)


def _texts(place: str, name: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(t, str) for t in given):
        raise UserError(f"{place}: {name} should be a list of texts, one a turn, not {given!r}.")
    return tuple(given)


def _reference(place: str, row: Mapping[str, Any]) -> str | None:
    """A text, or as in MT-Bench a list of one a turn."""
    given = row.get("reference")
    return given if given is None or isinstance(given, str) else "\n".join(_texts(place, "reference", given))
