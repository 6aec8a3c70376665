"""Reading a running model at the places where masks act; flags and hooks are put back on leaving, also after errors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from capacity_gap.models.axes import Architecture, Dims
from capacity_gap.models.loading import lm_loss


def mask_gradients(model: Any, table: Architecture, sizes: Dims, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂mask of one batch, in fp32 on the CPU: query heads [L, H], neurons [L, F], hidden [D]."""
    layers = layers_of(model, table, sizes)
    out = [layer.get_submodule(table.masks.attention_out).weight for layer in layers]
    down = [layer.get_submodule(table.masks.mlp_out).weight for layer in layers]
    with _residual_stream(model, table, layers) as sites, torch.enable_grad():
        loss = lm_loss(model, tokens)
    grads = torch.autograd.grad(loss, [*out, *down, *sites])
    products = [(w.detach().float() * g.float()) for w, g in zip([*out, *down, *sites], grads, strict=True)]
    heads, neurons = products[: sizes.layers], products[sizes.layers : 2 * sizes.layers]
    by_head = torch.stack([_inputs(p, table, table.masks.attention_out, "heads") for p in heads])
    by_neuron = torch.stack([_inputs(p, table, table.masks.mlp_out, "neurons") for p in neurons])
    stream = torch.stack([p.flatten(0, -2).sum(0) for p in products[2 * sizes.layers :]]).sum(0)
    return by_head.view(sizes.layers, sizes.heads, -1).sum(-1).cpu(), by_neuron.cpu(), stream.cpu()


def _inputs(product: Tensor, table: Architecture, module: str, axis: str) -> Tensor:
    """Sums a linear map's W ⊙ ∂L/∂W over its outputs; GPT-2 stores its maps transposed."""
    axes = table.parameters[f"{table.masks.layer}.{module}.weight"]
    return product.sum(1 - axes.index(axis))


def layers_of(model: Any, table: Architecture, sizes: Dims) -> list[Any]:
    """The layers of a model, first to last."""
    return [model.get_submodule(table.masks.layer.replace("{i}", str(i))) for i in range(sizes.layers)]


@contextlib.contextmanager
def _residual_stream(model: Any, table: Architecture, layers: list[Any]) -> Iterator[list[Tensor]]:
    """Collects the tensors that the hidden mask acts on: embeddings, each sublayer's output, the stream after each sum.

    Every parameter takes part in the graph meanwhile.
    """
    sites: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        sites.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layers[0].register_forward_pre_hook(_keeps_input(sites), with_kwargs=True)]
    for layer in layers:
        hooks += [layer.get_submodule(m).register_forward_hook(keep) for m in (table.masks.attention, table.masks.mlp)]
        for reader in table.masks.stream:
            hook = _keeps_input(sites)
            hooks.append(layer.get_submodule(reader).register_forward_pre_hook(hook, with_kwargs=True))
        hooks.append(layer.register_forward_hook(keep))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        yield sites
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _keeps_input(kept: list[Tensor]) -> Any:
    def hook(_module: Any, inputs: tuple, named: dict) -> None:
        kept.append(inputs[0] if inputs else named["hidden_states"])

    return hook


@contextlib.contextmanager
def unit_inputs(model: Any, table: Architecture, sizes: Dims) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects per layer, tokens flattened, what the head and neuron masks act on: [N, H·head_dim] and [N, F]."""
    heads: list[Tensor] = []
    neurons: list[Tensor] = []

    def keeps(kept: list[Tensor]) -> Any:
        return lambda _module, inputs: kept.append(inputs[0].detach().float().flatten(0, -2))

    hooks = []
    for layer in layers_of(model, table, sizes):
        hooks.append(layer.get_submodule(table.masks.attention_out).register_forward_pre_hook(keeps(heads)))
        hooks.append(layer.get_submodule(table.masks.mlp_out).register_forward_pre_hook(keeps(neurons)))
    try:
        yield heads, neurons
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def norm_outputs(model: Any) -> Iterator[list[Tensor]]:
    """Collects what every norm of the residual stream gives, tokens flattened: [N, D] each."""
    found: list[Tensor] = []
    hidden = model.config.hidden_size

    def keep(_module: Any, _inputs: Any, output: Tensor) -> None:
        if output.shape[-1] == hidden:
            found.append(output.detach().float().flatten(0, -2))

    norms = [
        m
        for n, m in model.named_modules()
        if type(m).__name__.endswith("Norm") and not n.endswith(("q_norm", "k_norm"))
    ]
    hooks = [m.register_forward_hook(keep) for m in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def layer_streams(model: Any, table: Architecture, sizes: Dims) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects every layer's input and output, tokens flattened."""
    before: list[Tensor] = []
    after: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        after.append(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for layer in layers_of(model, table, sizes):
        hooks.append(layer.register_forward_pre_hook(_keeps_input(before), with_kwargs=True))
        hooks.append(layer.register_forward_hook(keep))
    try:
        yield before, after
    finally:
        for hook in hooks:
            hook.remove()
