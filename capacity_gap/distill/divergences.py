"""Distances between two distributions over the vocabulary, each with its gradient: one function each, in one registry.

p is the teacher's distribution, q the student's. Every function takes both and a `skew`, and returns the value of each
token [n] and the gradient by the student's logits [n, V]: for a distance with derivative g_i by q_i that is
`q_i · (g_i − Σ_j q_j g_j)`. Shape suffixes: n tokens of one chunk, V vocabulary. Importing
this file imports no torch: names of losses are needed where nothing is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capacity_gap.settings.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[["Softmax", "Softmax", float], "tuple[Tensor, Tensor]"]

# `samples`: whether a sampled signal estimates it without bias. `skew`: the default of a loss that has one.
LOSSES: Registry[Divergence] = Registry("loss", setting="distill.loss", traits={"samples": False, "skew": None})


@dataclass(frozen=True)
class Softmax:
    """A distribution per token in the pieces that losses need: `log p = logits − log_norm`.

    Kept apart because a log-softmax of the whole vocabulary costs several times the exponential alone on a CPU.
    """

    logits: Tensor  # [n, V], less their maximum
    probs: Tensor  # [n, V]
    log_norm: Tensor  # [n, 1]

    @classmethod
    def of(cls, logits: Tensor) -> Softmax:
        """From logits [n, V], which it overwrites."""
        shifted = logits.sub_(logits.amax(-1, keepdim=True))
        exponentials = shifted.exp()
        norm = exponentials.sum(-1, keepdim=True)
        return cls(shifted, exponentials.div_(norm), norm.log())

    @classmethod
    def from_probs(cls, probs: Tensor) -> Softmax:
        """From probabilities [n, V]; those that are zero count as the smallest number."""
        return cls(probs.clamp_min(_tiny(probs)).log(), probs, probs.new_zeros(len(probs), 1))

    @property
    def log_probs(self) -> Tensor:
        """log p [n, V]."""
        return self.logits - self.log_norm

    def entropy(self) -> Tensor:
        """`−Σ p·log p` per token [n]."""
        return self.log_norm[:, 0] - (self.probs * self.logits).sum(-1)

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """`−log p[label]` per token [n]."""
        return self.log_norm[:, 0] - self.logits.gather(1, labels[:, None])[:, 0]


@LOSSES.register("forward_kl", samples=True)
def forward_kl(student: Softmax, teacher: Softmax, skew: float = 0.0) -> tuple[Tensor, Tensor]:
    """`KL(p ‖ q) = Σ p·(log p − log q)`; its gradient is `q − p`."""
    del skew
    import torch

    # Σ p = 1, so the log-normalisers leave the sum: no log-softmax of the vocabulary is formed.
    difference = torch.sub(teacher.logits, student.logits).mul_(teacher.probs)
    value = difference.sum(-1) - teacher.log_norm[:, 0] + student.log_norm[:, 0]
    return value, torch.sub(student.probs, teacher.probs, out=difference)


@LOSSES.register("soft_ce", samples=True)
def soft_cross_entropy(student: Softmax, teacher: Softmax, skew: float = 0.0) -> tuple[Tensor, Tensor]:
    """`−Σ p·log q = KL(p ‖ q) + H(p)`: the paper's; the same gradient as forward KL's."""
    value, gradient = forward_kl(student, teacher, skew)
    return value + teacher.entropy(), gradient


@LOSSES.register("reverse_kl")
def reverse_kl(student: Softmax, teacher: Softmax, skew: float = 0.0) -> tuple[Tensor, Tensor]:
    """`KL(q ‖ p) = Σ q·(log q − log p)` (MiniLLM, arXiv 2306.08543)."""
    del skew
    ratio = student.log_probs - teacher.log_probs
    return (student.probs * ratio).sum(-1), by_logits(student, ratio)


@LOSSES.register("js", skew=0.5)
def jensen_shannon(student: Softmax, teacher: Softmax, skew: float = 0.5) -> tuple[Tensor, Tensor]:
    """`β·KL(p ‖ m) + (1 − β)·KL(q ‖ m)`, m = β·p + (1 − β)·q, β = skew (GKD, arXiv 2306.13649, eq. 1)."""
    mixed = Softmax.from_probs(skew * teacher.probs + (1 - skew) * student.probs).log_probs
    ours = student.log_probs - mixed
    value = skew * (teacher.probs * (teacher.log_probs - mixed)).sum(-1) + (1 - skew) * (student.probs * ours).sum(-1)
    # Through m the slope is −(1 − β)·m/m, a constant, which `by_logits` cancels.
    return value, by_logits(student, (1 - skew) * ours)


@LOSSES.register("skewed_forward_kl", skew=0.1)
def skewed_forward_kl(student: Softmax, teacher: Softmax, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """`KL(p ‖ α·p + (1 − α)·q)`, α = skew (DistiLLM, arXiv 2402.03898, eq. 3)."""
    mixed = skew * teacher.probs + (1 - skew) * student.probs
    log_mixed = Softmax.from_probs(mixed).log_probs
    value = (teacher.probs * (teacher.log_probs - log_mixed)).sum(-1)
    # Where p and q both underflow this is 0/tiny, not 0/0.
    return value, by_logits(student, -(1 - skew) * teacher.probs / mixed.clamp_min(_tiny(mixed)))


@LOSSES.register("skewed_reverse_kl", skew=0.1)
def skewed_reverse_kl(student: Softmax, teacher: Softmax, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """`KL(q ‖ (1 − α)·p + α·q)`, α = skew (DistiLLM, arXiv 2402.03898, eq. 4)."""
    mixed = (1 - skew) * teacher.probs + skew * student.probs
    ratio = student.log_probs - Softmax.from_probs(mixed).log_probs
    slope = ratio - skew * student.probs / mixed.clamp_min(_tiny(mixed))
    return (student.probs * ratio).sum(-1), by_logits(student, slope)


@LOSSES.register("tvd")
def total_variation(student: Softmax, teacher: Softmax, skew: float = 0.0) -> tuple[Tensor, Tensor]:
    """`½ Σ |p − q|` (f-distill, arXiv 2307.15190, §3.1)."""
    del skew
    difference = student.probs - teacher.probs
    return difference.abs().sum(-1) / 2, by_logits(student, difference.sign() / 2)


def by_logits(student: Softmax, slope: Tensor) -> Tensor:
    """The gradient by logits, `q_i · (g_i − Σ_j q_j g_j)`, of a distance with derivative g by q [n, V]."""
    # A constant in g cancels (Σ q = 1), so callers leave out the 1 of d(q·log q)/dq = log q + 1.
    weighted = student.probs * slope
    return weighted - student.probs * weighted.sum(-1, keepdim=True)


def _tiny(values: Tensor) -> float:
    """The smallest positive number of the type."""
    import torch

    return torch.finfo(values.dtype).tiny


def by_autograd(value: Callable[[Tensor, Tensor, float], Tensor]) -> Divergence:
    """A loss from a function of two log-probabilities [n, V] alone: autograd finds its gradient, more slowly."""

    @functools.wraps(value)
    def divergence(student: Softmax, teacher: Softmax, skew: float = 0.0) -> tuple[Tensor, Tensor]:
        import torch

        with torch.enable_grad():
            logits = student.log_probs.detach().requires_grad_()
            found = value(logits.log_softmax(-1), teacher.log_probs, skew)
            (gradient,) = torch.autograd.grad(found.sum(), logits)
        return found.detach(), gradient

    return divergence
