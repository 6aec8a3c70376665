"""The objective of docs/method.md §4, `(1 − w)·CE + w·KD`, with gradients in closed form, a chunk of tokens at a time.

Shape suffixes: N tokens (batch and time flattened), n tokens of one chunk, V vocabulary, D student width, E teacher
width. All reductions are fp32 (or wider, if the inputs are).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capacity_gap.distill import fused
from capacity_gap.distill.divergences import (
    LOSSES,
    Softmax,
    forward_kl,
    soft_cross_entropy,
)
from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.distill.sparse import SparseTargets

if TYPE_CHECKING:
    from capacity_gap.distill.divergences import Divergence

IGNORE = -100
CHUNK_ELEMENTS = 2**17  # logits of one chunk (0.5 MB in fp32): they stay in a CPU's cache, measured fastest
CHUNK_LIMIT = 2**22  # and never more logits than this (16 MB): a CPU pays for larger blocks in page faults
DEVICE_ELEMENTS = 2**26  # on a GPU, where large products are faster (256 MB in fp32; not measured)
CHUNK_TOKENS = 128  # not fewer tokens than this below the limit, or the matrix products of a large vocabulary starve


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    signal: SparseTargets | None = None,
    loss: str = "forward_kl",
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    tau_squared: bool = True,
    skew: float | None = None,
    label_count: float | None = None,
    student_cap: float | None = None,
    teacher_cap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`L = (1 − w)·CE(z_S, y) + w·τ²·KD(softmax(z_T/τ), softmax(z_S/τ))`, the mean over the labels that count.

    KD is forward KL, or another distance of `divergences.LOSSES`.

    Args:
        student_hidden: last hidden states [B, T, D]; position t predicts `labels[:, t]` (already aligned).
        student_weight: output matrix [V, D], so that the logits are `z_S = hidden · weightᵀ`.
        labels: token ids [B, T]; −100 masks CE and KD alike.
        teacher_hidden: [B, T, E], with `teacher_weight` [V, E]; not needed if `kd_weight` is 0.
        teacher_weight: the teacher's output matrix. Published vocabularies are padded to different heights: KD then
            compares the rows that both have (the caller ensures that the rest is padding).
        signal: instead of both, cached targets of all tokens [B·T], made at the same temperature.
        loss: a name of `LOSSES`.
        kd_weight: w; 0 is direct training.
        temperature: τ, of both softmaxes in KD, never of CE.
        tau_squared: multiply KD by τ², which keeps its gradients' scale (Hinton et al. 2015).
        skew: β of `js`, α of the skewed KLs; by default 0.5 and 0.1.
        label_count: divides the sum; by default the labels that count here. Give the count over all ranks and
            accumulation steps when the batch is split.
        student_cap: c, where the student's logits are `c·tanh(z/c)` of these (Gemma 2); none by default.
        teacher_cap: the same of the teacher's.

    Returns:
        The loss (scalar, nats per token) and its parts, detached sums over the counted labels divided by the same
        count: `ce`, and with a teacher `kd` (the distance), `kl` (forward KL, whatever the distance) and
        `teacher_entropy`, all at τ; soft CE = kl + teacher_entropy.
    """
    entry = LOSSES.entry(loss)
    if signal is not None and SIGNALS.entry(signal.kind).traits["draws"] and not entry.traits["samples"]:
        raise ValueError(f"a sampled signal supports only {' and '.join(LOSSES.that(samples=True))}, not {loss}")
    keep = (labels != IGNORE).flatten()
    count = float(keep.sum()) if label_count is None else float(label_count)
    # Without a label that counts the loss is 0, not 0/0.
    scale = 0.0 if count == 0 else 1.0 / count
    teacher = _teacher(teacher_hidden, teacher_weight, signal, kd_weight, len(student_weight))
    student_hidden, student_weight = _autocast(student_hidden), _autocast(student_weight)
    skew = (entry.traits["skew"] or 0.0) if skew is None else skew
    tau_factor = temperature**2 if tau_squared else 1.0
    plain = student_cap is None and teacher_cap is None
    if plain and fused.serves(student_hidden, loss=loss, kd_weight=kd_weight, teacher=teacher, weight=student_weight):
        return fused.fused_loss(
            student_hidden.flatten(0, -2),
            student_weight,
            labels.flatten(),
            teacher,
            kd_weight=kd_weight,
            temperature=temperature,
            tau_factor=tau_factor,
            scale=scale,
        )
    terms = _Terms(entry.value, skew, kd_weight, temperature, tau_factor, scale, student_cap, teacher_cap)
    total, sums = _ChunkedLoss.apply(student_hidden.flatten(0, -2), student_weight, labels.flatten(), teacher, terms)
    names = ("ce", "kd", "kl", "teacher_entropy") if teacher else ("ce",)
    return total, {name: sums[i] * scale for i, name in enumerate(names)}


def _teacher(
    hidden: Tensor | None, weight: Tensor | None, signal: SparseTargets | None, kd_weight: float, rows: int
) -> Any:
    """The teacher: the signal, else hidden states [N, E] and the first `rows` of the output matrix; None at w = 0."""
    if kd_weight <= 0:
        return None
    if signal is not None:
        return signal
    if hidden is None or weight is None:
        raise ValueError(
            f"kd_weight={kd_weight} needs teacher_hidden and teacher_weight, or a signal; without a teacher set it to 0"
        )
    return _autocast(hidden.flatten(0, -2)), _autocast(weight[:rows])


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor in the type that autocast, where it is on, gives to matrix products: those below it does not see."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


@dataclass(frozen=True)
class _Terms:
    divergence: "Divergence"
    skew: float
    kd_weight: float
    temperature: float
    tau_factor: float
    scale: float
    student_cap: float | None
    teacher_cap: float | None


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over chunks; what is kept has the size of the hidden states and the matrix."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, teacher, terms):
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        # Gradients are formed here, while a chunk's logits exist: autograd would keep all logits [N, V] until backward.
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        # Summed over chunks in fp32: in bf16 the terms of late chunks would round away.
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(4, dtype=wide, device=hidden_ND.device)
        parts = chunks(len(labels_N), weight_VD.shape[0], labels_N.device)
        ours, theirs = (hidden_ND.new_empty(0) for _ in range(2))  # reused: fresh pages cost more than arithmetic
        for part in parts:
            logits = _logits(hidden_ND[part], weight_VD, wide, ours)
            slope = cap(logits, terms.student_cap)
            targets = _targets(teacher, part, wide, theirs, terms.teacher_cap)
            chunk_sums, grad_nV = _chunk(logits, targets, labels_N[part], terms)
            sums += chunk_sums
            if slope is not None:
                grad_nV.mul_(slope)
            if grad_hidden is not None:
                torch.mm(grad_nV.to(weight_VD.dtype), weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_nV.to(hidden_ND.dtype).T, hidden_ND[part])
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


def _add_product(total: Tensor, one: Tensor, two: Tensor) -> None:
    """total += one @ two, without a second matrix of that size where the types allow it."""
    if total.dtype == one.dtype:
        total.addmm_(one, two)
    else:
        total += (one @ two).to(total.dtype)


def token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, logit_cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Label cross-entropy and the predictions' own entropy of each token [N], in nats; no gradients."""
    losses, entropies = [], []
    for part in chunks(len(labels_N), weight_VD.shape[0], labels_N.device):
        logits = _logits(hidden_ND[part], weight_VD, torch.float32)
        cap(logits, logit_cap)
        predicted = Softmax.of(logits)
        losses.append(predicted.cross_entropy(labels_N[part]))
        entropies.append(predicted.entropy())
    return torch.cat(losses), torch.cat(entropies)


def chunks(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    """How tokens are cut so that the logits of one part stay in the cache."""
    step = max(CHUNK_TOKENS, (CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS) // vocabulary)
    if device.type == "cpu":
        step = max(1, min(step, CHUNK_LIMIT // vocabulary))
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _logits(hidden: Tensor, weight: Tensor, wide: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Logits [n, V]; in the memory of `out`, which grows to what they take, where that has their type."""
    weight = weight.to(hidden.dtype)
    if out is None or hidden.dtype != wide or out.dtype != wide:
        return (hidden @ weight.T).to(wide)
    needed = len(hidden) * len(weight)
    if out.numel() < needed:
        out.resize_(needed)
    return torch.mm(hidden, weight.T, out=out[:needed].view(len(hidden), len(weight)))


def cap(logits: Tensor, most: float | None) -> Tensor | None:
    """Makes of logits z, in place, `c·tanh(z/c)`; returns the slope `1 − tanh²(z/c)`, nothing where there is no cap."""
    if most is None:
        return None
    slope = 1 - logits.div_(most).tanh_().square()
    logits.mul_(most)
    return slope


def _targets(
    teacher: Any, part: slice, wide: torch.dtype, out: Tensor, most: float | None
) -> Tensor | SparseTargets | None:
    """The teacher's targets for one chunk: logits [n, V], or a few values a token."""
    if teacher is None or isinstance(teacher, SparseTargets):
        return teacher and teacher.part(part)
    logits = _logits(teacher[0][part], teacher[1], wide, out)
    cap(logits, most)
    return logits


def _chunk(
    logits_nV: Tensor, targets: Tensor | SparseTargets | None, labels_n: Tensor, terms: _Terms
) -> tuple[Tensor, Tensor]:
    """Sums of CE, KD, KL and teacher entropy over one chunk, and the gradient of the loss by its logits [n, V]."""
    keep = (labels_n != IGNORE).to(logits_nV.dtype)
    # −100 is no index: such rows read token 0, and `keep` takes them out.
    labels = labels_n.clamp_min(0)
    student = Softmax.of(logits_nV)
    ce = (student.cross_entropy(labels) * keep).sum()
    kd = kl = entropy = torch.zeros_like(ce)
    kd_grad = None
    if targets is not None:
        tau = terms.temperature
        width = logits_nV.shape[1] if isinstance(targets, SparseTargets) else targets.shape[1]
        whole = tau == 1 and width == logits_nV.shape[1]
        # `Softmax.of` has left the logits shifted by their maximum, which no softmax depends on.
        soft = student if whole else Softmax.of(logits_nV[:, :width] / tau)
        values, kl_values, entropies, kd_grad = _distance(soft, targets, terms)
        kd, kl, entropy = ((x * keep).sum() for x in (values, kl_values, entropies))
    # ∂CE/∂z = q − onehot(y), written over q, which the distance above was the last to read.
    grad = student.probs
    grad.scatter_add_(1, labels[:, None], torch.full_like(labels, -1, dtype=grad.dtype)[:, None])
    if kd_grad is not None:
        grad.mul_(1 - terms.kd_weight)
        # `kd_grad` is by z/τ, so the chain rule divides by τ; with τ² the factor is w·τ.
        grad[:, : kd_grad.shape[1]].add_(kd_grad, alpha=terms.kd_weight * terms.tau_factor / terms.temperature)
    return torch.stack((ce, kd, kl, entropy)), grad.mul_((keep * terms.scale)[:, None])


def _distance(
    student: Softmax, targets: Tensor | SparseTargets, terms: _Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KD, KL and teacher entropy of each token [n], and KD's gradient by the student's logits over τ [n, V]."""
    if isinstance(targets, SparseTargets):
        value, kl, gradient = SIGNALS[targets.kind].against(student, targets, terms.divergence, terms.skew)
        return value, kl, targets.entropy.to(value.dtype), gradient
    teacher = Softmax.of(targets if terms.temperature == 1 else targets / terms.temperature)
    value, gradient = terms.divergence(student, teacher, terms.skew)
    entropy = teacher.entropy()
    if terms.divergence is forward_kl:
        return value, value, entropy, gradient
    kl = value - entropy if terms.divergence is soft_cross_entropy else forward_kl(student, teacher, 0.0)[0]
    return value, kl, entropy, gradient
