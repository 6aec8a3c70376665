"""How a student gets teacher outputs: from an online teacher, or from cached logits, a few values per token.

A cached kind defines what is kept per token, and the loss of a student against it. Shape suffixes: n tokens of one
chunk, k values of a token, V vocabulary. Importing this file imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capacity_gap.distill.divergences import Softmax, forward_kl, soft_cross_entropy
from capacity_gap.settings.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from capacity_gap.distill.divergences import Divergence
    from capacity_gap.distill.sparse import SparseTargets

# `draws`: values count draws, which serve only losses that samples estimate without bias. `value_bytes`: of one.
SIGNALS: Registry = Registry("signal", setting="distill.signal", traits={"draws": False, "value_bytes": 2})


@SIGNALS.register("online")
class Online:
    """The teacher runs beside the student; nothing is cached."""


@SIGNALS.register("topk")
class TopK:
    """The likeliest tokens and their log-probabilities; what they leave of one is one bucket."""

    @staticmethod
    def targets(softmax: Softmax, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The `size` likeliest tokens and their log-probabilities; the tail is what they leave of one."""
        del generator
        found = softmax.logits.topk(size, dim=-1)
        return found.indices, (found.values - softmax.log_norm).half()

    @staticmethod
    def against(
        student: Softmax, targets: SparseTargets, divergence: Divergence, skew: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value, forward KL and gradient over k + 1 outcomes: the k tokens, and all others as one."""
        import torch

        tiny = torch.finfo(student.probs.dtype).tiny
        top_q, top_p = student.probs.gather(1, targets.ids), targets.values.to(student.probs.dtype).exp()
        rest_q, rest_p = ((1 - x.sum(-1, keepdim=True)).clamp_min(tiny) for x in (top_q, top_p))
        q, p = (Softmax.from_probs(torch.cat(x, -1)) for x in ((top_q, rest_q), (top_p, rest_p)))
        value, by_bucket = divergence(q, p, skew)
        # A token of the rest moves the rest's share in proportion to its own part of it.
        gradient = student.probs * (by_bucket[:, -1:] / rest_q)
        gradient.scatter_(1, targets.ids, by_bucket[:, :-1])
        return value, forward_kl(q, p, 0.0)[0], gradient


@SIGNALS.register("sampled", draws=True, value_bytes=1)
class Sampled:
    """Tokens drawn from the teacher: an unbiased estimate of its distribution (arXiv 2503.16870)."""

    @staticmethod
    def targets(softmax: Softmax, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`size` draws with replacement from the teacher, as distinct tokens and how often each was drawn (uint8).

        counts / size is an unbiased estimate of the distribution (arXiv 2503.16870, the teacher as its own proposal).
        """
        import torch

        drawn = torch.multinomial(softmax.probs, size, replacement=True, generator=generator).sort(dim=-1).values
        new = torch.ones_like(drawn, dtype=torch.bool)
        new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        slot = new.cumsum(-1) - 1
        counts = torch.zeros_like(drawn).scatter_add_(1, slot, torch.ones_like(drawn))
        ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)
        return ids, counts.to(torch.uint8)

    @staticmethod
    def against(
        student: Softmax, targets: SparseTargets, divergence: Divergence, skew: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`−Σ w·log q`, w the drawn shares: unbiased soft cross-entropy (arXiv 2503.16870); its gradient is q − w."""
        del skew
        if divergence not in (forward_kl, soft_cross_entropy):
            raise ValueError("samples estimate forward KL and soft cross-entropy only")
        weights = targets.values.to(student.probs.dtype)
        soft_ce = -(weights * (student.logits.gather(1, targets.ids) - student.log_norm)).sum(-1)
        kl = soft_ce - targets.entropy.to(soft_ce.dtype)
        gradient = student.probs.clone().scatter_add_(1, targets.ids, -weights)
        return (soft_ce if divergence is soft_cross_entropy else kl), kl, gradient
