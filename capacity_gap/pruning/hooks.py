"""Reading a running model at the places where masks act; flags and hooks are put back on leaving, also after errors."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from capacity_gap.models.axes import pattern_of
from capacity_gap.pruning.lm_loss import gradients_of, lm_loss
from capacity_gap.store.checkpoint import whole
from capacity_gap.structure.architecture import Architecture, Dims, Stack


def mask_gradients(model: Any, table: Architecture, sizes: Dims, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂mask of one batch, in fp32 on the CPU: query heads [R, H], neurons [R, F] (a row a place), hidden [D]."""
    names = {axis: table.unit_maps(axis, sizes.layers) for axis in ("heads", "neurons")}
    maps = [model.get_parameter(name) for name in (*names["heads"], *names["neurons"])]
    with _residual_stream(model, table, sizes) as sites, torch.enable_grad():
        loss = lm_loss(model, tokens)
    grads = gradients_of(model, loss, [*maps, *sites])
    products = [(w.detach().float() * g.float()) for w, g in zip([*maps, *sites], grads, strict=True)]
    found = []
    for of in names.values():
        mine, products = products[: len(of)], products[len(of) :]
        rows = torch.stack([_inputs(p, table, n) for p, n in zip(mine, of, strict=True)])
        found.append(rows.transpose(0, 1).flatten(0, 1) if rows.ndim > 2 else rows)  # expert after expert
    stream = torch.stack([p.flatten(0, -2).sum(0).cpu() for p in products]).sum(0)
    return found[0].unflatten(1, (sizes.heads, -1)).sum(-1), found[1], stream


def _inputs(product: Tensor, table: Architecture, name: str) -> Tensor:
    """Sums a linear map's W ⊙ ∂L/∂W over its outputs, on the CPU; GPT-2 stores its maps transposed."""
    axes = table.parameters[pattern_of(table, name)[0]]
    return whole(product.sum(axes.index("hidden"))).cpu()


def layers_of(model: Any, table: Architecture, sizes: Dims) -> list[Any]:
    """The layers of a model, first to last; of an encoder–decoder those of the encoder first."""
    return [layer for stack in table.stacks for layer in _stack(model, stack, sizes)]


def _stack(model: Any, stack: Stack, sizes: Dims) -> list[Any]:
    return [model.get_submodule(stack.layer.replace("{i}", str(i))) for i in range(sizes.layers)]


@contextlib.contextmanager
def _residual_stream(model: Any, table: Architecture, sizes: Dims) -> Iterator[list[Tensor]]:
    """Collects the tensors that the hidden mask acts on: embeddings, each sublayer's output, the stream after each sum.

    Every parameter takes part in the graph meanwhile.
    """
    sites: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        sites.append(output[0] if isinstance(output, tuple) else output)

    readers, givers = [], []
    for stack in table.stacks:
        layers = _stack(model, stack, sizes)
        readers.append(layers[0])
        for layer in layers:
            givers += [layer.get_submodule(sublayer.module) for sublayer in (*stack.attentions, stack.mlp)]
            readers += [layer.get_submodule(reader) for reader in stack.stream]
            givers.append(layer)
    hooks = [module.register_forward_pre_hook(_keeps_input(sites), with_kwargs=True) for module in readers]
    hooks += [module.register_forward_hook(keep) for module in givers]
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
def unit_inputs(model: Any, table: Architecture, sizes: Dims) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Collects by row, tokens flattened, what the head and neuron masks act on: [N, H·head_dim] and [N, F]."""
    found: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}

    def keeps(kept: dict[int, Tensor], row: int) -> Any:
        return lambda _module, inputs: kept.update({row: inputs[0].detach().float().flatten(0, -2)})

    hooks = []
    for axis, kept in zip(("heads", "neurons"), found, strict=True):
        for row, name in enumerate(table.unit_maps(axis, sizes.layers)):
            if not (axis == "neurons" and sizes.experts):  # those of experts: `experts.expert_inputs`
                module = model.get_submodule(name.removesuffix(".weight"))
                hooks.append(module.register_forward_pre_hook(keeps(kept, row)))
    try:
        yield found
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

    # Norms of queries and keys act within a head; where head_dim = hidden, width does not tell them apart.
    norms = [
        m
        for n, m in model.named_modules()
        if type(m).__name__.endswith("Norm") and not re.search(r"(q|k|query|key)_(layer)?norm$", n)
    ]
    hooks = [m.register_forward_hook(keep) for m in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def layer_streams(model: Any, table: Architecture, sizes: Dims) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collects every layer's input and output, in the order of `layers_of`."""
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
