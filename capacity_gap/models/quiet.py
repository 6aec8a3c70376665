"""Models without what transformers does in training only, so that equal seeds give equal weights on every run."""

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from capacity_gap.models.defaults import acts_as_noise, is_rate


def quiet(model: nn.Module) -> Any:
    """Switches off dropout, layer drop, router jitter and frozen padding rows, in place; returns the model.

    Rates live in dropout modules, in attributes of other modules and in the config, which some code reads in its
    forward pass. `pad_token_id` itself stays: generation needs it.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.padding_idx = None
        _silence(module)
        if (config := getattr(module, "config", None)) is not None:
            _silence(config)
    return model


def _silence(holder: Any) -> None:
    """Sets every rate of noise among the attributes of a module or config to zero."""
    for name, value in list(vars(holder).items()):
        if acts_as_noise(name) and is_rate(value) and value:
            setattr(holder, name, 0.0)
