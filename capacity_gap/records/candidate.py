"""What a planner names: a run that is worth its cost."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A cell to be run.

    Attributes:
        cell: its row of the pool.
        gain: the share of the variance that the goal has now which this cell is expected to remove, given that those
            before it are run; gains add up. The first cell of a curve may have none by itself: it gives the level that
            the next ones are compared with.
        cost: FLOPs of the cell and of what it shares with others and nothing before it has paid for.
        reason: why it was chosen, in a sentence.
        fitted: whether gains rest on a fit of the cells so far; else on study one's variances and an assumed optimum.
    """

    cell: dict[str, Any]
    gain: float
    cost: float
    reason: str
    fitted: bool = True
