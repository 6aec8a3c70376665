"""A grid's cells as products of values: what `run.py -m` takes, so that it makes these cells and no others."""

import itertools
import shlex
from collections.abc import Sequence

from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import RUN_WORDS
from capacity_gap.settings.scales import parse_scale

Cell = tuple[str, ...]  # a value for each key
Product = tuple[Cell, ...]  # the values of each key
TOO_LARGE = 1.1  # a rung's name is not its exact size; beyond this a student is larger than its teacher in any case


def products(keys: Sequence[str], cells: Sequence[Cell]) -> list[Product]:
    """Parts `cells` into products of values, as few as a greedy search finds.

    A grid skips students that are larger than their teachers, so a product may hold such cells besides.
    """
    values = [tuple(dict.fromkeys(column)) for column in zip(*cells, strict=True)]
    varied = [i for i, given in enumerate(values) if len(given) > 1]
    orders = [varied[i:] + varied[:i] for i in range(len(varied))] or [[]]
    wanted, skipped = set(cells), _too_large(keys, values, cells)
    found = []
    for allowed, order in itertools.product((wanted, wanted | skipped), orders):
        ordered = sorted(allowed, key=lambda c: [given.index(v) for given, v in zip(values, c, strict=True)])
        parts = [_holding(wanted, p) for p in _merged(ordered, order)]
        found.append([p for p in parts if p])
    return min(found, key=len)


def grid_commands(words: Sequence[str], keys: Sequence[str], cells: Sequence[Cell], tail: Sequence[str]) -> list[str]:
    """The fewest `run.py -m` commands that make these cells and no others: each `words`, the axes, `tail`.

    All of them are quoted here for the shell; the values of cells must be spelt for Hydra already (`rerun.quoted`).
    """
    return [
        shlex.join([*RUN_WORDS, "-m", *words, *(f"{k}={','.join(v)}" for k, v in zip(keys, part, strict=True)), *tail])
        for part in products(keys, cells)
    ]


def _holding(wanted: set[Cell], product: Product) -> Product:
    """A product without the values that no wanted cell in it has; empty if it holds none."""
    held = [cell for cell in itertools.product(*product) if cell in wanted]
    return tuple(tuple(dict.fromkeys(column)) for column in zip(*held, strict=True))


def _too_large(keys: Sequence[str], values: Sequence[Cell], cells: Sequence[Cell]) -> set[Cell]:
    """The cells beside the given ones whose student is larger than their teacher."""
    if not {"student", "teacher"} <= set(keys):
        return set()
    s, t = keys.index("student"), keys.index("teacher")
    pairs = [(i, j) for i, j in itertools.product(values[s], values[t]) if _larger(i, j)]
    return {tuple(i if k == s else j if k == t else v for k, v in enumerate(c)) for c in cells for i, j in pairs}


def _larger(student: str, teacher: str) -> bool:
    try:
        return parse_scale(student, key="student") > TOO_LARGE * parse_scale(teacher, key="teacher")
    except ConfigError:  # a folder, or a rung that is called otherwise
        return False


def _merged(cells: Sequence[Cell], order: Sequence[int]) -> list[Product]:
    """Joins products that differ in one key, key after key, until none can be joined."""
    found: list[Product] = [tuple((v,) for v in cell) for cell in cells]
    while True:
        before = len(found)
        for key in order:
            found = _joined(found, key)
        if len(found) == before:
            return found


def _joined(found: Sequence[Product], key: int) -> list[Product]:
    """Joins all products that are equal but for one key."""
    groups: dict[Product, dict[str, None]] = {}
    for product in found:
        rest = (*product[:key], (), *product[key + 1 :])
        groups.setdefault(rest, {}).update(dict.fromkeys(product[key]))
    return [(*rest[:key], tuple(joined), *rest[key + 1 :]) for rest, joined in groups.items()]
