"""Registered losses are checked before use, because a wrong gradient shows in no column of a record."""

import torch
from torch import Tensor

from capacity_gap.distill.divergences import LOSSES, Divergence, Softmax
from capacity_gap.settings.errors import ConfigError

TOKENS, VOCABULARY, STEP = 3, 7, 1e-6


def check_divergence(name: str) -> None:
    """Checks a registered loss on random distributions in double precision, by central differences.

    Raises:
        ConfigError: its value is not one number a token, its gradient not that of its value by the student's logits,
            it modifies its arguments, or it fails.
    """
    entry = LOSSES.entry(name)
    try:
        fault = _fault(entry.value, entry.traits["skew"] or 0.0)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ConfigError(
            f"distill.loss={name} ({entry.module}): {fault}. A loss is f(student, teacher, skew) → value [n], gradient "
            "[n, V] by the student's logits: docs/architecture.md."
        )


def _fault(divergence: Divergence, skew: float) -> str | None:
    """What is wrong with a loss, in words, or None."""
    generator = torch.Generator().manual_seed(0)
    size = (TOKENS, VOCABULARY)
    z, t, direction = (torch.randn(*size, generator=generator, dtype=torch.float64) for _ in range(3))
    student, teacher = _softmax(z), _softmax(t)
    value, gradient = divergence(student, teacher, skew)
    if value.shape != (TOKENS,):
        return f"its value has shape {tuple(value.shape)} instead of [n], one number per token"
    if gradient.shape != size:
        return f"its gradient has shape {tuple(gradient.shape)} instead of [n, V]"
    if _differ(student, _softmax(z)) or _differ(teacher, _softmax(t)):
        return "it modifies its arguments"
    above, below = (divergence(_softmax(z + s * direction), _softmax(t), skew)[0] for s in (STEP, -STEP))
    if not torch.allclose((above - below) / (2 * STEP), (gradient * direction).sum(-1), atol=1e-5):
        return "its gradient is not the derivative of its value with respect to the student's logits"
    return None


def _softmax(logits: Tensor) -> Softmax:
    return Softmax.of(logits.clone())  # which overwrites what it is given


def _differ(one: Softmax, two: Softmax) -> bool:
    return any(not torch.equal(getattr(one, f), getattr(two, f)) for f in ("logits", "probs", "log_norm"))
