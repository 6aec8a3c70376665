"""How logits come from the last hidden states: output matrix, bias, factor and cap."""

from typing import Any

from torch import Tensor


def from_hidden(config: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits as they are computed here: with bias, factor and cap."""
    logits = hidden @ weight.T * logit_factor(config)
    logits = logits if bias is None else logits + bias
    most = logit_cap(config)
    return logits if most is None else most * (logits / most).tanh()


def logit_cap(config: Any) -> float | None:
    """c, where a model's logits are `c·tanh(z/c)` of hidden states times output matrix (Gemma 2); None for others."""
    most = getattr(config, "final_logit_softcapping", None)
    return float(most) if most else None


def logit_factor(config: Any) -> float:
    """What a model multiplies its logits by: Cohere's `logit_scale`, Granite's `logits_scaling`; 1 for others."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)
