"""What cells cost in FLOPs, where what several of them need is paid for once."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

Row = Mapping[str, Any]
Shared = Mapping[Hashable, float]  # FLOPs of what other cells need too, by what it is
Cost = Callable[[Row], tuple[float, Shared]]  # FLOPs of a cell's own part, and what it shares
TOKENS_PER_PARAMETER = 20.0  # of a teacher's training, where a table does not say
SCORED = 4096.0  # tokens that a teacher is scored on before it is pruned: 8 sequences of 512


@dataclass(frozen=True)
class Arithmetic:
    """Costs by sizes: training 6·N·D, a teacher's forward 2·N·D (Kaplan et al. 2020, §2.1).

    `teacher_tokens`: what a teacher is trained on; None where it is there already; NaN: the column `teacher_tokens`, or
    20 a parameter. `cached`: whether a teacher's outputs at a budget are computed once, or by each cell.
    """

    teacher_tokens: float | None = math.nan
    cached: bool = True

    def __call__(self, cell: Row) -> tuple[float, Shared]:
        """FLOPs of a cell's own part, and of what it shares."""
        teacher, tokens = float(cell["teacher_params"]), _number(cell, "data_tokens", 0.0)
        key = (cell.get("teacher", teacher), cell.get("teacher_seed", 0))
        own, forward = 6.0 * float(cell["student_params"]) * tokens, 2.0 * teacher * tokens
        shared: dict[Hashable, float] = {("scores", *key): 6.0 * teacher * SCORED}
        if self.teacher_tokens is not None:
            given = self.teacher_tokens
            default = _number(cell, "teacher_tokens", TOKENS_PER_PARAMETER * teacher)
            shared["teacher", *key] = 6.0 * teacher * (default if math.isnan(given) else given)
        if self.cached:
            shared["signal", *key, tokens] = forward
        return (own if self.cached else own + forward), shared


def _number(cell: Row, name: str, default: float) -> float:
    """A value of a row, or what stands for a missing one."""
    value = cell.get(name)
    return default if value is None or not math.isfinite(float(value)) else float(value)


def _rows(cells: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in cells.to_dict("records")]


@dataclass(frozen=True, eq=False)
class Bills:
    """The costs of M cells, of which P parts are shared."""

    own: np.ndarray  # [M]
    parts: np.ndarray  # [P] FLOPs of each shared part
    needs: np.ndarray  # [M, most] index of the parts of a cell; P, which costs nothing, where it has fewer
    keys: tuple[Hashable, ...]

    @classmethod
    def of(cls, cells: pd.DataFrame, cost: Cost) -> "Bills":
        """By a cost function.

        Raises:
            ValueError: a cost is negative or no number, or a cell costs nothing.
        """
        told = [cost(cell) for cell in _rows(cells)]
        keys = tuple(dict.fromkeys(key for _, shared in told for key in shared))
        place = {key: i for i, key in enumerate(keys)}
        most = max((len(shared) for _, shared in told), default=0)
        parts, needs = np.zeros(len(keys) + 1), np.full((len(told), max(1, most)), len(keys))
        for i, (_, shared) in enumerate(told):
            for j, (key, flops) in enumerate(shared.items()):
                needs[i, j] = place[key]
                parts[place[key]] = flops
        own = np.array([own for own, _ in told], float)
        if not (np.isfinite(own) & (own > 0)).all() or not (np.isfinite(parts) & (parts >= 0)).all():
            raise ValueError(
                "cost must give FLOPs: above zero for each cell's own part, zero or more for what it shares."
            )
        return cls(own, parts, needs, keys)

    def paid(self, cells: pd.DataFrame, cost: Cost) -> np.ndarray:
        """Which parts [P + 1] the cells of a table have paid for."""
        there = {key for cell in _rows(cells) for key in cost(cell)[1]}
        return np.array([*(key in there for key in self.keys), True])

    def each(self, paid: np.ndarray) -> np.ndarray:
        """What each cell would cost by itself [..., M], given the parts that are `paid` [..., P + 1]."""
        return self.own + (self.parts * ~paid)[..., self.needs].sum(-1)

    def total(self, chosen: Sequence[int], paid: np.ndarray) -> float:
        """What cells cost together."""
        needed = np.unique(self.needs[list(chosen)])
        return float(self.own[list(chosen)].sum() + (self.parts * ~paid)[needed].sum())


def spent(cells: pd.DataFrame, cost: Cost) -> float:
    """FLOPs of a table of cells, what they share counted once."""
    bills = Bills.of(cells, cost)
    return bills.total(range(len(cells)), np.zeros(len(bills.parts), bool))
