"""A teacher in a few values a token. Shape suffixes as in `losses.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's distribution in a few values a token, as a cached signal holds it, at one temperature.

    `topk`: `values` are the log-probabilities of the tokens `ids`; what is left is one bucket. `sampled`: `values` are
    the shares of tokens drawn from the teacher, an unbiased estimate of its distribution. `entropy` is the teacher's.
    """

    kind: str
    ids: Tensor  # [N, k]
    values: Tensor  # [N, k]
    entropy: Tensor  # [N]

    def part(self, tokens: slice) -> "SparseTargets":
        """The targets of some tokens."""
        return SparseTargets(self.kind, self.ids[tokens], self.values[tokens], self.entropy[tokens])

    def to(self, device: torch.device) -> "SparseTargets":
        """The same on another device."""
        return SparseTargets(self.kind, self.ids.to(device), self.values.to(device), self.entropy.to(device))
