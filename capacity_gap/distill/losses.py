"""The objective of METHOD §4, `(1 − w)·CE + w·KD`, with gradients in closed form, a chunk of tokens at a time.

Shape suffixes: N tokens (batch and time flattened), n tokens of one chunk, V vocabulary, D student width, E teacher
width. All reductions are fp32 (or wider, if the inputs are).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 2**17  # logits of one chunk (0.5 MB in fp32): they stay in cache, measured fastest
CHUNK_TOKENS = 64  # but never fewer tokens than this, or the matrix products of a large vocabulary starve


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    loss: str = "forward_kl",
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    tau_squared: bool = True,
    label_count: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`L = (1 − w)·CE(z_S, y) + w·τ²·KL(softmax(z_T/τ) ‖ softmax(z_S/τ))`, the mean over the labels that count.

    Args:
        student_hidden: last hidden states [B, T, D]; position t predicts `labels[:, t]` (already aligned).
        student_weight: output matrix [V, D], so that the logits are `z_S = hidden · weightᵀ`.
        labels: token ids [B, T]; −100 masks CE and KD alike.
        teacher_hidden: [B, T, E], with `teacher_weight` [V, E]; not needed if `kd_weight` is 0.
        teacher_weight: the teacher's output matrix.
        loss: a name of `LOSSES`.
        kd_weight: w; 0 is direct training.
        temperature: τ, of both softmaxes in KD, never of CE.
        tau_squared: multiply KD by τ², which keeps its gradients' scale (Hinton et al. 2015).
        label_count: divides the sum; by default the labels that count here. Give the count over all ranks and
            accumulation steps when the batch is split.

    Returns:
        The loss (scalar, nats per token) and its parts, detached sums over the counted labels divided by the same
        count: `ce`, and with a teacher `kl` (at τ) and `teacher_entropy` (at τ); soft CE = kl + teacher_entropy.
    """
    if kd_weight > 0 and (teacher_hidden is None or teacher_weight is None):
        raise ValueError(f"kd_weight={kd_weight} needs teacher_hidden and teacher_weight; without a teacher give 0")
    keep = (labels != IGNORE).flatten()
    count = float(keep.sum()) if label_count is None else float(label_count)
    scale = 0.0 if count == 0 else 1.0 / count
    teacher = None
    if kd_weight > 0 and teacher_hidden is not None and teacher_weight is not None:
        teacher = (teacher_hidden.flatten(0, -2), teacher_weight)
    terms = _Terms(LOSSES[loss], kd_weight, temperature, temperature**2 if tau_squared else 1.0, scale)
    total, sums = _ChunkedLoss.apply(student_hidden.flatten(0, -2), student_weight, labels.flatten(), teacher, terms)
    names = ("ce", "kl", "teacher_entropy") if teacher else ("ce",)
    return total, {name: sums[i] * scale for i, name in enumerate(names)}


@dataclass(frozen=True)
class Softmax:
    """A distribution per token in the pieces that losses need: `log p = logits − log_norm`.

    Kept apart because a log-softmax of the whole vocabulary costs several times the exponential alone on a CPU.
    """

    logits: Tensor  # [n, V], less their maximum
    probs: Tensor  # [n, V]
    log_norm: Tensor  # [n, 1]

    @classmethod
    def of(cls, logits: Tensor) -> "Softmax":
        """From logits [n, V]."""
        shifted = logits - logits.amax(-1, keepdim=True)
        exponentials = shifted.exp()
        norm = exponentials.sum(-1, keepdim=True)
        return cls(shifted, exponentials.div_(norm), norm.log())

    def entropy(self) -> Tensor:
        """`−Σ p·log p` per token [n]."""
        return self.log_norm[:, 0] - (self.probs * self.logits).sum(-1)

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """`−log p[label]` per token [n]."""
        return self.log_norm[:, 0] - self.logits.gather(1, labels[:, None])[:, 0]


def forward_kl(student: Softmax, teacher: Softmax) -> tuple[Tensor, Tensor]:
    """`KL(p ‖ q) = Σ p·(log p − log q)` per token [n], and its gradient by q's logits, `q − p` [n, V]."""
    difference = torch.sub(teacher.logits, student.logits).mul_(teacher.probs)
    value = difference.sum(-1) - teacher.log_norm[:, 0] + student.log_norm[:, 0]
    return value, torch.sub(student.probs, teacher.probs, out=difference)


Divergence = Callable[[Softmax, Softmax], tuple[Tensor, Tensor]]
LOSSES: dict[str, Divergence] = {"forward_kl": forward_kl}


@dataclass(frozen=True)
class _Terms:
    divergence: Divergence
    kd_weight: float
    temperature: float
    tau_factor: float
    scale: float


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over chunks; what is kept has the size of the hidden states and the matrix."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, teacher, terms):
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(3, dtype=wide, device=hidden_ND.device)
        for part in _chunks(len(labels_N), weight_VD.shape[0]):
            logits = _logits(hidden_ND[part], weight_VD, wide)
            targets = _logits(teacher[0][part], teacher[1], wide) if teacher else None
            chunk_sums, grad_nV = _chunk(logits, targets, labels_N[part], terms)
            sums += chunk_sums
            if grad_hidden is not None:
                torch.mm(grad_nV.to(weight_VD.dtype), weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += (grad_nV.to(hidden_ND.dtype).T @ hidden_ND[part]).to(wide)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        ctx.mark_non_differentiable(sums)
        kd = terms.kd_weight * terms.tau_factor
        return ((1 - terms.kd_weight) * sums[0] + kd * sums[1]) * terms.scale, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _grad_sums):
        hidden, weight = ctx.saved_tensors
        return (
            None if hidden is None else hidden * grad_total.to(hidden.dtype),
            None if weight is None else weight * grad_total.to(weight.dtype),
            None,
            None,
            None,
        )


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Label cross-entropy and the predictions' own entropy of each token [N], in nats; no gradients."""
    losses, entropies = [], []
    for part in _chunks(len(labels_N), weight_VD.shape[0]):
        predicted = Softmax.of(_logits(hidden_ND[part], weight_VD, torch.float32))
        losses.append(predicted.cross_entropy(labels_N[part]))
        entropies.append(predicted.entropy())
    return torch.cat(losses), torch.cat(entropies)


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    step = max(CHUNK_TOKENS, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _logits(hidden: Tensor, weight: Tensor, wide: torch.dtype) -> Tensor:
    return (hidden @ weight.to(hidden.dtype).T).to(wide)


def _chunk(logits_nV: Tensor, targets_nV: Tensor | None, labels_n: Tensor, terms: _Terms) -> tuple[Tensor, Tensor]:
    """Sums of CE, KL and teacher entropy over one chunk, and the gradient of the loss by its logits [n, V]."""
    keep = (labels_n != IGNORE).to(logits_nV.dtype)
    labels = labels_n.clamp_min(0)
    student = Softmax.of(logits_nV)
    ce = (student.cross_entropy(labels) * keep).sum()
    kl = entropy = torch.zeros_like(ce)
    kd_grad = None
    if targets_nV is not None:
        tau = terms.temperature
        teacher = Softmax.of(targets_nV if tau == 1 else targets_nV / tau)
        value, kd_grad = terms.divergence(student if tau == 1 else Softmax.of(logits_nV / tau), teacher)
        kl, entropy = (value * keep).sum(), (teacher.entropy() * keep).sum()
    grad = student.probs
    grad.scatter_add_(1, labels[:, None], torch.full_like(labels, -1, dtype=grad.dtype)[:, None])
    if kd_grad is not None:
        grad.mul_(1 - terms.kd_weight)
        grad.add_(kd_grad, alpha=terms.kd_weight * terms.tau_factor / terms.temperature)
    return torch.stack((ce, kl, entropy)), grad.mul_((keep * terms.scale)[:, None])
