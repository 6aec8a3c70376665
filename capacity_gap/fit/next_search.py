"""Which cells narrow a goal most per FLOP: bundles of cells, of which the best is taken, and again.

One cell alone may carry no information: a new curve has its own level, and a new teacher is worth its cost only with
several cells that it makes possible. So a bundle is grown from the best cell of each curve and each teacher, by always
adding the cell that maximises its gain per cost; of all bundles and their beginnings the best is taken.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from capacity_gap.fit.next_model import Belief
from capacity_gap.records.bills import Bills

LONGEST = 6  # cells of a bundle
LEAST_STUDENTS, LEAST_TEACHERS = 3, 4  # that a law takes
CLOSE = 1e-12


@dataclass(eq=False)
class Search:
    """The posterior of the cells and the goal, given those chosen so far; it changes as cells are added.

    The covariances are those of `Belief`. `gains` are shares of the goal's first variance, each given those before it.
    """

    covariance: np.ndarray  # [M, M]
    goal: np.ndarray  # [M] over the contrast's first standard deviation: squares are shares
    error: float
    bills: Bills
    paid: np.ndarray  # [P + 1]
    left: np.ndarray  # [M] which cells may still be chosen
    kinds: tuple[np.ndarray, ...]  # [M] codes: bundles are grown from the best cell of each, such as each curve

    def __post_init__(self) -> None:
        self.chosen: list[int] = []
        self.gains: list[float] = []
        self.costs: list[float] = []

    @classmethod
    def of(cls, belief: Belief, bills: Bills, paid: np.ndarray) -> "Search":
        """Before any is chosen."""
        left = np.ones(len(bills.own), bool)
        goal = belief.goal / math.sqrt(belief.variance)
        kinds = (belief.cells.curve[belief.known :], belief.cells.groups["teacher"][belief.known :])
        return cls(belief.covariance.copy(), goal, belief.error, bills, paid.copy(), left, kinds)

    def gain(self, cells: Sequence[int]) -> float:
        """The share of the goal's first variance that cells would remove together."""
        index = list(cells)
        inside = self.covariance[np.ix_(index, index)] + self.error * np.eye(len(index))
        lower = np.linalg.solve(inside, self.goal[index])
        return float(self.goal[index] @ lower)

    def add(self, i: int) -> None:
        """Chooses a cell: its variance and cost are taken off."""
        column = self.covariance[:, i] / math.sqrt(self.error + self.covariance[i, i])
        goal = self.goal[i] / math.sqrt(self.error + self.covariance[i, i])
        self.gains.append(float(goal**2))
        self.costs.append(float(self.bills.each(self.paid)[i]))
        self.covariance -= np.outer(column, column)
        self.goal -= column * goal
        self.paid[self.bills.needs[i]] = True
        self.left[i] = False
        self.chosen.append(i)

    def bundle(self, budget: float = math.inf, longest: int = LONGEST) -> list[int]:
        """The bundle with the most gain per cost that fits in a budget; empty if none does."""
        seeds = self._seeds(budget)
        if not len(seeds):
            return []
        grown = _Bundles(self, seeds)
        best, rate = [], -math.inf
        for size in range(min(longest, int(self.left.sum()))):
            grown.grow(budget)
            rates = np.where(grown.spent <= budget, grown.gained / grown.spent, -math.inf)
            s = int(np.argmax(rates))
            if rates[s] > rate * (1 + CLOSE):
                best, rate = [int(i) for i in grown.members[s, : size + 1]], float(rates[s])
        return best

    def _seeds(self, budget: float) -> np.ndarray:
        """From which cells bundles are grown: of each curve and each teacher the one with most gain per cost."""
        cost = self.bills.each(self.paid)
        left = np.flatnonzero(self.left & (cost <= budget))
        gain = self.goal**2 / (self.error + np.diag(self.covariance))
        rate = ((gain + CLOSE) / cost)[left]  # of cells without a gain the cheapest
        order = left[np.argsort(-rate, kind="stable")]
        return np.unique(np.concatenate([order[np.unique(codes[order], return_index=True)[1]] for codes in self.kinds]))


class _Bundles:
    """Bundles grown from each of S cells side by side, by the columns of Cholesky's factor of each."""

    def __init__(self, search: Search, seeds: np.ndarray) -> None:
        S, M = len(seeds), len(search.left)
        self.search, self.seeds = search, seeds
        self.members = np.zeros((S, 0), int)
        self.columns = np.zeros((S, 0, M))
        self.diagonal = np.tile(np.diag(search.covariance), (S, 1))
        self.goal = np.tile(search.goal, (S, 1))
        self.paid = np.tile(search.paid, (S, 1))
        self.gained, self.spent = np.zeros(S), np.zeros(S)
        self.open = np.tile(search.left, (S, 1))

    def grow(self, budget: float) -> None:
        """Adds to each the cell that makes its gain per cost largest; at first its seed."""
        search, each = self.search, np.arange(len(self.seeds))
        noisy = search.error + self.diagonal
        drop = self.goal**2 / noisy
        cost = search.bills.each(self.paid)
        spent = self.spent[:, None] + cost
        rate = np.where(self.open & (spent <= budget), (self.gained[:, None] + drop) / spent, -math.inf)
        new = self.seeds if not self.members.shape[1] else rate.argmax(1)
        scale = np.sqrt(noisy[each, new])
        column = search.covariance[new] - np.einsum("st,stm->sm", self.columns[each, :, new], self.columns)
        column /= scale[:, None]
        self.gained = self.gained + drop[each, new]
        self.spent = np.where(self.open[each, new], spent[each, new], math.inf)
        self.goal -= column * (self.goal[each, new] / scale)[:, None]
        self.diagonal -= column**2
        self.columns = np.concatenate([self.columns, column[:, None]], 1)
        self.members = np.column_stack([self.members, new])
        self.open[each, new] = False
        np.put_along_axis(self.paid, search.bills.needs[new], True, 1)


@dataclass(frozen=True)
class Pairs:
    """Which students and teachers there are, as codes: those of the pool's cells [M], and the pairs that were run."""

    students: np.ndarray
    teachers: np.ndarray
    rest: np.ndarray  # all else, budget and seeds: a core has one of each
    run: frozenset[tuple[int, int]]

    def enough(self) -> bool:
        """Whether the cells that were run hold a full grid of what a law takes."""
        by_student: dict[int, set[int]] = {}
        for student, teacher in self.run:
            by_student.setdefault(student, set()).add(teacher)
        several = itertools.combinations(by_student.values(), LEAST_STUDENTS)
        return any(len(set.intersection(*some)) >= LEAST_TEACHERS for some in several)


def core(search: Search, pairs: Pairs, budget: float = math.inf) -> list[int]:
    """What is still lacking of three students by four teachers: of all such grids the one with most gain per cost.

    Returns:
        Cells of the pool; empty where no such grid fits in the budget (FLOPs), or none is to be had.
    """
    best: list[int] = []
    rate = -math.inf
    for code in np.unique(pairs.rest)[:MOST_TRIED]:
        mine = np.flatnonzero(pairs.rest == code)
        there = {(int(pairs.students[i]), int(pairs.teachers[i])): int(i) for i in mine}
        there |= dict.fromkeys(pairs.run, -1)
        for block in _blocks(there):
            cost = search.bills.total(block, search.paid)
            if cost <= budget and (found := search.gain(block) / cost) > rate:
                best, rate = block, found
    return best


MOST_TRIED = 12  # budgets and seeds, and few students and teachers: all grids of more would take minutes
MOST_STUDENTS, MOST_TEACHERS = 5, 8


def _blocks(there: dict[tuple[int, int], int]) -> Iterator[list[int]]:
    """The cells to be run of every full grid of the least students and teachers."""
    students, teachers = (sorted({pair[k] for pair in there}) for k in (0, 1))
    for some in itertools.combinations(_spread(students, MOST_STUDENTS), LEAST_STUDENTS):
        shared = [t for t in teachers if all((s, t) in there for s in some)]
        for few in itertools.combinations(_spread(shared, MOST_TEACHERS), LEAST_TEACHERS):
            cells = [there[pair] for pair in itertools.product(some, few)]
            if wanted := [i for i in cells if i >= 0]:
                yield wanted


def _spread(given: Sequence[int], most: int) -> Sequence[int]:
    """At most so many, over the whole range."""
    places = np.unique(np.linspace(0, len(given) - 1, min(most, len(given))).round().astype(int))
    return [given[i] for i in places]
