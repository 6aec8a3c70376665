"""Instructions whose answers can be checked, made from templates over a corpus: no judge is needed. Imports no torch.

A row is a conversation of one turn, with the name of its task and a wrong answer of the right kind:
`{"messages": [user, assistant], "task": …, "rejected": …}`.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_WORDS = re.compile(r"(?<![\w'-])[a-z]{2,7}(?: [a-z]{2,7}){2,}(?![\w'-])")
_HAN = re.compile(r"[\u4e00-\u9fff]{3,}")
LEAST, MOST = 2, 5  # words (or Han characters) of one item


@dataclass(frozen=True)
class Item:
    """A few neighbouring words of a text, or characters where words are not parted by spaces."""

    units: tuple[str, ...]
    joint: str

    @property
    def text(self) -> str:
        """As it was written."""
        return self.joint.join(self.units)

    @property
    def unit(self) -> str:
        """What one of its units is called."""
        return "word" if self.joint else "character"


@dataclass(frozen=True)
class Question:
    """An instruction, its answer, and an answer of the same kind that is wrong."""

    prompt: str
    answer: str
    wrong: str


def repeat(item: Item, draw: random.Random) -> Question:
    """The item again; wrong: two neighbours swapped."""
    units = list(item.units)
    i = draw.randrange(len(units) - 1)
    units[i], units[i + 1] = units[i + 1], units[i]
    return Question(f"Repeat: {item.text}", item.text, item.joint.join(units))


def first(item: Item, draw: random.Random) -> Question:
    """The first unit; wrong: another one."""
    return Question(f"First {item.unit} of: {item.text}", item.units[0], draw.choice(item.units[1:]))


def last(item: Item, draw: random.Random) -> Question:
    """The last unit; wrong: another one."""
    return Question(f"Last {item.unit} of: {item.text}", item.units[-1], draw.choice(item.units[:-1]))


def count(item: Item, draw: random.Random) -> Question:
    """How many units; wrong: one more or one less."""
    n = len(item.units)
    return Question(f"Count the {item.unit}s of: {item.text}", str(n), str(n + draw.choice((-1, 1))))


def script(item: Item, draw: random.Random) -> Question:
    """Which script it is written in."""
    names = ("Latin", "Han") if item.joint else ("Han", "Latin")
    return Question(f"Script of: {item.text}", *names)


def missing(item: Item, draw: random.Random) -> Question:
    """Which unit the second text lacks; wrong: another one."""
    i = draw.randrange(len(item.units))
    rest = item.units[:i] + item.units[i + 1 :]
    given = f"{item.text} / {item.joint.join(rest)}"
    return Question(f"Missing {item.unit}: {given}", item.units[i], draw.choice(rest))


TASKS: dict[str, Callable[[Item, random.Random], Question]] = {
    "repeat": repeat,
    "first": first,
    "last": last,
    "count": count,
    "script": script,
    "missing": missing,
}


def items(texts: Iterable[str], draw: random.Random) -> Iterator[Item]:
    """Every run of small words or Han characters, cut to a random length, its units all different."""
    for text in texts:
        for pattern, joint in ((_WORDS, " "), (_HAN, "")):
            for run in pattern.findall(text):
                units = run.split(" ") if joint else list(run)
                n = draw.randint(LEAST, MOST)
                at = draw.randrange(max(1, len(units) - n + 1))
                found = tuple(units[at : at + n])
                if len(set(found)) == len(found) >= LEAST:
                    yield Item(found, joint)


def instructions(texts: Iterable[str], number: int, seed: int, *, apart_from: Sequence[dict] = ()) -> list[dict]:
    """`number` instructions over the texts, tasks in turn, scripts evenly where there are two; no prompt twice.

    Fewer if the texts hold no more. None of them is a prompt of `apart_from`.
    """
    draw = random.Random(seed)
    by_joint: dict[str, list[Item]] = {" ": [], "": []}
    for item in items(texts, draw):
        by_joint[item.joint].append(item)
    sources = [found for found in by_joint.values() if found]
    for found in sources:
        draw.shuffle(found)
    seen = {row["messages"][0]["content"] for row in apart_from}
    rows: list[dict] = []
    names = list(TASKS)
    turn = 0
    while len(rows) < number and any(sources):
        found = sources[turn // len(names) % len(sources)]
        task = names[turn % len(names)]
        turn += 1
        if not found:
            continue
        question = TASKS[task](found.pop(), draw)
        if question.prompt not in seen:
            seen.add(question.prompt)
            rows.append(_row(question, task))
    return rows


def _row(question: Question, task: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": question.answer}]
    return {"messages": turns, "task": task, "rejected": question.wrong}
