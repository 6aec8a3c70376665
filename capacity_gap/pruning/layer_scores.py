"""How much whole layers matter, where they are not simply removed from both ends: one function a method.

L is the number of layers; an encoder–decoder has the encoder's first, then the decoder's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from capacity_gap.models.axes import architecture, dims
from capacity_gap.pruning.hooks import layer_streams, layers_of
from capacity_gap.pruning.lm_loss import lm_loss


def block_influence(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """`1 − E[cos(x_in, x_out)]` of each layer, over all tokens (ShortGPT, arXiv 2403.03853, eq. 1). Returns [L]."""
    table, sizes = architecture(model.config), dims(model.config)
    total, count = torch.zeros(2, len(layers_of(model, table, sizes)))
    for tokens in batches:
        with layer_streams(model, table, sizes) as (before, after), torch.no_grad():
            lm_loss(model, tokens)
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            total[i] += (1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).sum().cpu()
            count[i] += x.shape[:-1].numel()
    return total / count


def loss_increase(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """How much the loss rises when a layer is left out, for each of them. Returns [L], nats per token."""
    table, sizes = architecture(model.config), dims(model.config)
    kept: Sequence[Tensor] = list(batches)
    layers = layers_of(model, table, sizes)
    whole = _mean_loss(model, kept)
    rises = []
    for layer in layers:
        hook = layer.register_forward_hook(_passes_through, with_kwargs=True)
        try:
            rises.append(_mean_loss(model, kept) - whole)
        finally:
            hook.remove()
    return torch.tensor(rises)


def _passes_through(_module: Any, inputs: tuple, named: dict, output: Any) -> Any:
    stream = inputs[0] if inputs else named["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


@torch.no_grad()
def _mean_loss(model: Any, batches: Sequence[Tensor]) -> float:
    return sum(float(lm_loss(model, tokens)) for tokens in batches) / len(batches)


LAYER_SCORES: dict[str, Callable[..., Tensor]] = {"block_influence": block_influence, "loss_increase": loss_increase}
