"""Registered losses are checked before use, because a wrong gradient shows in no column of a record."""

import sys
import traceback
from pathlib import Path

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
        with torch.no_grad():  # as in training, where gradients are not recorded
            fault = _fault(entry.value, entry.traits["skew"] or 0.0)
    except Exception as error:
        fault = _raised(error, entry.module)
    if fault:
        raise ConfigError(
            f"distill.loss={name} ({entry.module}) cannot be used: called on random distributions of n={TOKENS} tokens "
            f"and V={VOCABULARY} vocabulary entries, {fault}. Expected: f(student, teacher, skew) → value [n], one "
            "number per token, and gradient [n, V] by the student's logits. Correct the module and try again: "
            "docs/howto_extend.md has examples."
        )


def _raised(error: Exception, module: str) -> str:
    """What a loss raised, and in which line of the user's module."""
    file = getattr(sys.modules.get(module), "__file__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if file and f.filename == file]
    where = f" in line {lines[-1]} of {Path(file).name}" if file and lines else ""
    said = f"it raised {type(error).__name__}{where}: {error}".strip().rstrip(".:")
    if "does not require grad" in str(error):
        said += ". Its value does not depend on the student through operations of torch, so autograd finds no gradient"
    return said


def _fault(divergence: Divergence, skew: float) -> str | None:
    """What is wrong with a loss, in words, or None."""
    generator = torch.Generator().manual_seed(0)
    size = (TOKENS, VOCABULARY)
    z, t, direction = (torch.randn(*size, generator=generator, dtype=torch.float64) for _ in range(3))
    student, teacher = _softmax(z), _softmax(t)
    found = divergence(student, teacher, skew)
    if fault := _wrong_form(found, size):
        return fault
    value, gradient = found
    if _differ(student, _softmax(z)) or _differ(teacher, _softmax(t)):
        return "it modifies its arguments"
    if not (value.isfinite().all() and gradient.isfinite().all()):
        return "its value or its gradient is not finite"
    above, below = (divergence(_softmax(z + s * direction), _softmax(t), skew)[0] for s in (STEP, -STEP))
    if not torch.allclose((above - below) / (2 * STEP), (gradient * direction).sum(-1), atol=1e-5):
        return "its gradient is not the derivative of its value with respect to the student's logits"
    return None


def _wrong_form(found: object, size: tuple[int, int]) -> str | None:
    """What a loss returned, where that is no value [n] and gradient [n, V]."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        return f"it returned {_described(found)} instead of two tensors"
    for part, name, wanted in ((found[0], "value", size[:1]), (found[1], "gradient", size)):
        if not isinstance(part, Tensor):
            return f"its {name} is {_described(part)} instead of a tensor"
        if part.shape != wanted:
            expected = "[n], one number per token" if name == "value" else "[n, V]"
            return f"its {name} has shape {tuple(part.shape)} instead of {tuple(wanted)}: {expected}"
    return None


def _described(found: object) -> str:
    """A returned object in a few words."""
    if isinstance(found, Tensor):
        return f"one tensor of shape {tuple(found.shape)}"
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return "None" if found is None else f"a {type(found).__name__}"


def _softmax(logits: Tensor) -> Softmax:
    return Softmax.of(logits.clone())  # which overwrites what it is given


def _differ(one: Softmax, two: Softmax) -> bool:
    return any(not torch.equal(getattr(one, f), getattr(two, f)) for f in ("logits", "probs", "log_norm"))
