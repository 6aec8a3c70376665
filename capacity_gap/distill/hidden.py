"""Likeness of hidden states: an optional third term of the objective. Shape suffixes: D student width, E teacher's."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capacity_gap.distill.losses import IGNORE

SEED = 0  # of the projection's first weights: one start for all


class HiddenMatch(nn.Module):
    """`Σ 1 − cos(P·h_S, h_T)` over the labels that count, h the last hidden states (DistilBERT, arXiv 1910.01108, §3).

    Equal widths are compared as they are. Where they differ, P [E, D] is a linear map with orthonormal columns or rows
    at first, which is trained with the student and left behind when it is saved.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.projection: nn.Linear | None = None
        if student != teacher:
            self.projection = nn.Linear(student, teacher, bias=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                nn.init.orthogonal_(self.projection.weight)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The sum over one micro-batch: states [B, T, D] and [B, T, E], labels [B, T]."""
        mapped = student if self.projection is None else self.projection(student)
        likeness = F.cosine_similarity(mapped.float(), teacher.float(), dim=-1)
        return ((1 - likeness) * (labels != IGNORE)).sum()
