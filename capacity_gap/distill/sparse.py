"""A teacher in a few values a token, and the losses of a student against them. Shape suffixes as in `losses.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from capacity_gap.distill.divergences import Divergence, Softmax, forward_kl, soft_cross_entropy


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


def against_topk(
    student: Softmax, targets: SparseTargets, divergence: Divergence, skew: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, forward KL and gradient over k + 1 outcomes: the k tokens, and all others as one."""
    tiny = torch.finfo(student.probs.dtype).tiny
    top_q, top_p = student.probs.gather(1, targets.ids), targets.values.to(student.probs.dtype).exp()
    rest_q, rest_p = ((1 - x.sum(-1, keepdim=True)).clamp_min(tiny) for x in (top_q, top_p))
    q, p = (Softmax.from_probs(torch.cat(x, -1)) for x in ((top_q, rest_q), (top_p, rest_p)))
    value, by_bucket = divergence(q, p, skew)
    # A token of the rest moves the rest's share in proportion to its own part of it.
    gradient = student.probs * (by_bucket[:, -1:] / rest_q)
    gradient.scatter_(1, targets.ids, by_bucket[:, :-1])
    return value, forward_kl(q, p)[0], gradient


def against_samples(
    student: Softmax, targets: SparseTargets, divergence: Divergence, skew: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`−Σ w·log q`, w the drawn shares: soft cross-entropy without bias (arXiv 2503.16870); its gradient is q − w."""
    del skew
    weights = targets.values.to(student.probs.dtype)
    soft_ce = -(weights * (student.logits.gather(1, targets.ids) - student.log_norm)).sum(-1)
    kl = soft_ce - targets.entropy.to(soft_ce.dtype)
    gradient = student.probs.clone().scatter_add_(1, targets.ids, -weights)
    return (soft_ce if divergence is soft_cross_entropy else kl), kl, gradient


AGAINST = {"topk": against_topk, "sampled": against_samples}
