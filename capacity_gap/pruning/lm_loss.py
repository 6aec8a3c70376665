"""The language-modelling loss that scores are gradients of."""

from typing import Any

from torch import Tensor

from capacity_gap.distill.losses import distill_loss
from capacity_gap.models.loading import hidden_states, output_weight


def lm_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of tokens [B, T + 1], each that is predicted from those before it; nats per token."""
    hidden = hidden_states(model, tokens[:, :-1])
    return distill_loss(hidden, output_weight(model), tokens[:, -hidden.shape[1] :], kd_weight=0.0)[0]
