"""The language-modelling loss that scores are gradients of, and its gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capacity_gap.distill.losses import distill_loss
from capacity_gap.models.loading import hidden_states, is_sharded, output_weight
from capacity_gap.structure.head import logit_cap


def lm_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of tokens [B, T + 1], each that is predicted from those before it; nats per token."""
    hidden = hidden_states(model, tokens[:, :-1])
    weight, labels = output_weight(model).to(hidden.device), tokens[:, -hidden.shape[1] :]
    return distill_loss(hidden, weight, labels, kd_weight=0.0, student_cap=logit_cap(model.config))[0]


def gradients_of(model: Any, loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """∂loss/∂t of weights and activations; of a sharded model's weights this rank's shares. The model stays as it was.

    A sharded model reduces gradients in `backward` alone, which leaves them in `.grad`.
    """
    if not is_sharded(model):
        return torch.autograd.grad(loss, tensors)
    for tensor in tensors:
        if not tensor.is_leaf:
            tensor.retain_grad()
    loss.backward()
    found = [tensor.grad for tensor in tensors]
    for tensor in (*model.parameters(), *tensors):
        tensor.grad = None
    return [grad for grad in found if grad is not None]
