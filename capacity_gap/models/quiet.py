"""Models as they are run here: without what transformers does in training only, and with kernels that take their sizes.

Noise in training would give other weights on every run of equal seeds.
"""

from typing import Any, cast

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from capacity_gap.models.defaults import acts_as_noise, is_rate


def quiet(model: nn.Module) -> Any:
    """Switches off dropout, layer drop, router jitter and frozen padding rows, in place; returns the model.

    Rates live in dropout modules, in attributes of other modules and in the config, which some code reads in its
    forward pass. `pad_token_id` itself stays: generation needs it. Routers that draw experts at random in training
    take the best ones then, as they do in evaluation.
    """
    for module in model.modules():
        if type(module).__name__ in DRAWING and _as_in_evaluation not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_as_in_evaluation)
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.padding_idx = None
        _silence(module)
        if (config := getattr(module, "config", None)) is not None:
            _silence(config)
    return model


WIDTH = 16  # bytes that rows must be multiples of, in the fused kernels for experts


def runnable(model: nn.Module) -> Any:
    """Lets a mixture whose sizes the fused kernels for experts do not take run its experts one after another."""
    experts = [p for p in model.parameters() if p.ndim == 3]
    if experts and any(n * p.element_size() % WIDTH for p in experts for n in p.shape[1:]):
        cast(Any, model).set_experts_implementation("eager")
    return model


DRAWING = ("PhimoeTopKRouter",)


def _as_in_evaluation(module: nn.Module, _inputs: Any) -> None:
    module.training = False


def _silence(holder: Any) -> None:
    """Sets every rate of noise among the attributes of a module or config to zero."""
    kind = getattr(holder, "model_type", "phimoe" if type(holder).__name__ in DRAWING else "")
    for name, value in list(vars(holder).items()):
        if acts_as_noise(name, kind) and is_rate(value) and value:
            setattr(holder, name, 0.0)
