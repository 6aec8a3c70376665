"""Reading the experts of a running mixture: what its routers say, and what goes into the maps of each expert."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from capacity_gap.models.axes import pattern_of
from capacity_gap.structure.architecture import Architecture, Dims

PRODUCTS: tuple[Callable, ...] = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


@contextlib.contextmanager
def router_mass(model: Any, table: Architecture, sizes: Dims) -> Iterator[Tensor]:
    """Adds up the weight that each router gives to each expert, over all tokens: [L, E] in fp32 on the CPU.

    An expert that a token does not go through gets nothing of it. A router returns logits, then the weights of the
    experts that were chosen and their numbers, [N, k] each. Of a dense model [L, 0].
    """
    mass = torch.zeros(sizes.layers, sizes.experts)

    def adds(layer: int) -> Callable:
        def hook(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            _, weights, chosen = (x.detach().cpu() for x in output)
            mass[layer].index_add_(0, chosen.flatten(), weights.flatten().float())

        return hook

    names = [table.router.removesuffix(".weight").replace("{i}", str(i)) for i in range(sizes.layers)]
    hooks = [model.get_submodule(n).register_forward_hook(adds(i)) for i, n in enumerate(names) if n]
    try:
        yield mass
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def expert_inputs(model: Any, table: Architecture, sizes: Dims) -> Iterator["ExpertInputs"]:
    """Notes what goes into the maps of each expert, run one after another meanwhile; of a dense model nothing."""
    seen = ExpertInputs(model, table, sizes)
    if not sizes.experts:
        yield seen
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        with seen:
            yield seen
    finally:
        model.set_experts_implementation(before)


class ExpertInputs(TorchFunctionMode):
    """Notes what is multiplied with each expert's part of a parameter, tokens flattened: [N_e, inputs].

    Experts are no modules: one parameter holds a map of all of them, and the model takes a part of it for each expert.
    """

    def __init__(self, model: Any, table: Architecture, sizes: Dims) -> None:
        super().__init__()
        self.model, self.table, self.sizes = model, table, sizes
        shaped = {n: p for n, p in model.named_parameters() if p.ndim > 2} if sizes.experts else {}
        routers = {n: p for n, p in model.named_parameters() if sizes.experts and self._is_router(n)}
        self.names = {id(p): n for n, p in (shaped | routers).items()}
        self.parts: dict[int, tuple[Tensor, str, int]] = {}
        self.seen: dict[tuple[str, int], list[Tensor]] = {}

    def _is_router(self, name: str) -> bool:
        return pattern_of(self.table, name)[0] == self.table.router

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.names:
            self.parts[id(found)] = (found, self.names[id(args[0])], int(args[1]))
        elif func in PRODUCTS:
            weight = args[1]
            if id(weight) in self.parts:
                _, name, expert = self.parts.pop(id(weight))
                self.seen.setdefault((name, expert), []).append(args[0].detach().float().flatten(0, -2))
            elif id(weight) in self.names:
                self.seen.setdefault((self.names[id(weight)], -1), []).append(args[0].detach().float().flatten(0, -2))
        return found

    def neurons(self) -> Iterator[tuple[int, Tensor]]:
        """The activations of each expert's neurons [N_e, F], with the row of the scores that they belong to."""
        maps = {n: i for i, n in enumerate(self.table.unit_maps("neurons", self.sizes.layers))}
        for (name, expert), found in self.seen.items():
            if name in maps:
                yield from ((expert * self.sizes.layers + maps[name], x) for x in found)

    def add_squares(self, squares: dict[str, Tensor]) -> None:
        """Adds the squares of all inputs to those of each parameter, shaped so that they multiply it; then forgets."""
        for (name, expert), found in self.seen.items():
            if name not in squares:
                squares[name] = self._no_squares(name)
            for x in found:
                mine = squares[name] if expert < 0 else squares[name][expert]
                mine += x.square().sum(0).view(mine.shape)
        self.clear()

    def _no_squares(self, name: str) -> Tensor:
        """Zeros, one along the dimension of a parameter's outputs."""
        parameter, axes = self.model.get_parameter(name), self.table.parameters[pattern_of(self.table, name)[0]]
        inputs = axes.index("neurons" if "neurons" in axes else "hidden")
        outputs = next(d for d in (len(axes) - 2, len(axes) - 1) if d != inputs)
        return torch.zeros([1 if d == outputs else n for d, n in enumerate(parameter.shape)], device=parameter.device)

    def clear(self) -> None:
        """Forgets what was seen."""
        self.seen.clear()
