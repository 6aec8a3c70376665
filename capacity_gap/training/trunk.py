"""One run for several token budgets: a trunk at a constant rate, and for each budget a branch whose rate decays.

The trunk sees the text in nested order. Where a budget's last tokens begin (a share `decay` of them), a branch leaves
it: weights and optimiser go on with a rate that falls to its end, as in a run of `wsd` of that budget alone (Hu et al.
2024, arXiv 2404.06395, §4; Hägele et al. 2024, arXiv 2405.18392). Budgets that are doublings of one another share a
trunk: each is cut in halves down to `LEAST_STEPS`, and at every half a branch may leave. Imports no torch.
"""

from dataclasses import dataclass

import numpy as np

LEAST_STEPS = 100  # of the smallest budget of a trunk: its warm-up is that of all


@dataclass(frozen=True)
class Branch:
    """The rates of one part of a trunk, or of a branch, in steps counted from the trunk's first.

    Attributes:
        warm: steps in which the rate rises.
        leave: the step from which it falls; None on the trunk.
    """

    warm: int
    leave: int | None = None

    def rate(self, step: int, steps: int, *, peak: float, final: float) -> float:
        """Of step 0 … steps − 1: it rises, stays, and on a branch falls in a line to `final`·peak in the last one."""
        if step < self.warm:
            return peak * (step + 1) / self.warm
        if self.leave is None or step < self.leave:
            return peak
        progress = (step - self.leave + 1) / max(1, steps - self.leave)
        return peak * (final + (1 - final) * (1 - progress))


def halves(tokens: int, length: int, batch: int) -> list[int]:
    """The budgets (tokens) whose branches leave the trunk of this one, smallest first; the last is itself.

    Args:
        tokens: the budget.
        length: of a sequence.
        batch: sequences of a step.
    """
    found = [tokens]
    while found[0] // 2 // length >= LEAST_STEPS * batch:
        found.insert(0, found[0] // 2)
    return found


def leaves(tokens: int, length: int, batch: int, decay: float) -> int:
    """The step at which the branch of a budget leaves the trunk."""
    sequences = tokens // length
    return (sequences - round(decay * sequences)) // batch


def warm_steps(budgets: list[int], length: int, batch: int, warmup: float) -> int:
    """Steps in which the rate rises: a share of the smallest budget's, and so the same for all."""
    return max(1, round(warmup * (budgets[0] // length) / batch))


def nested_order(sequences: np.ndarray, edges: list[int], seed: int) -> np.ndarray:
    """Sequences shuffled within each increment between two budgets, so that a smaller budget's order begins a larger's.

    Args:
        sequences: the budget's, in the order of the seed-independent permutation.
        edges: how many sequences each budget of the trunk holds, smallest first; the last is all.
        seed: decides the shuffles.
    """
    parts, before = [], 0
    for edge in edges:
        # PCG64 by name: numpy does not promise that `default_rng` will stay it.
        generator = np.random.Generator(np.random.PCG64([seed, edge]))
        parts.append(generator.permutation(sequences[before:edge]))
        before = edge
    return np.concatenate(parts)
