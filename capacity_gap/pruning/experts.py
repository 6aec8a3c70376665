"""Reading the experts of a running mixture: what its routers say, and what goes into the maps of each expert."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from capacity_gap.models.axes import pattern_of
from capacity_gap.settings.errors import ConfigError
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
            weights, chosen = (x.detach().cpu().flatten() for x in output[1:])
            mass[layer].index_add_(0, chosen, weights.float())

        return hook

    names = [table.router.removesuffix(".weight").replace("{i}", str(i)) for i in range(sizes.layers)]
    hooks = [model.get_submodule(n).register_forward_hook(adds(i)) for i, n in enumerate(names) if n]
    try:
        yield mass
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def expert_inputs(model: Any, table: Architecture, sizes: Dims, note: "Note") -> Iterator[None]:
    """Calls `note` with what goes into the maps of each expert, which run one after another; of a dense model never.

    Raises:
        ConfigError: the model lies on several ranks, where what runs are not its own parameters.
    """
    if not sizes.experts:
        yield
        return
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ConfigError(
            "the inputs of single experts cannot be read in a mixture sharded over ranks. Use "
            "prune.method=expressive, taylor or magnitude, or family.placement=one."
        )
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        with _ExpertInputs(model, table, note):
            yield
    finally:
        model.set_experts_implementation(before)


Note = Callable[[str, int, Tensor], None]  # a parameter, an expert (−1: a router), inputs [N_e, inputs] of its tokens


class _ExpertInputs(TorchFunctionMode):
    """Sees what is multiplied with each expert's part of a parameter.

    Experts are no modules: one parameter holds a map of all of them, and the model takes a part of it for each expert.
    """

    def __init__(self, model: Any, table: Architecture, note: Note) -> None:
        super().__init__()
        self.note = note
        self.names = {
            id(p): n for n, p in model.named_parameters() if p.ndim > 2 or pattern_of(table, n)[0] == table.router
        }
        self.parts: dict[int, tuple[Tensor, str, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.names:
            self.parts[id(found)] = (found, self.names[id(args[0])], int(args[1]))
        elif func in PRODUCTS:
            weight, name, expert = args[1], self.names.get(id(args[1]), ""), -1
            if id(weight) in self.parts:
                _, name, expert = self.parts.pop(id(weight))
            if name:
                self.note(name, expert, args[0].detach().float().flatten(0, -2))
        return found


class ExpertSums:
    """Adds up what is noted of inputs, for each expert of a parameter: Σ|x| or Σx² over tokens."""

    def __init__(self, model: Any, table: Architecture, sizes: Dims) -> None:
        self.model, self.table, self.sizes = model, table, sizes
        self.maps = {n: i for i, n in enumerate(table.unit_maps("neurons", sizes.layers))} if sizes.experts else {}
        self.neurons = torch.zeros(sizes.experts * sizes.layers, sizes.neurons)
        self.squares: dict[str, Tensor] = {}

    def add_neurons(self, name: str, expert: int, x: Tensor) -> None:
        """Adds |x| of an expert's neurons to their row of `neurons` [E·L, F]."""
        if name in self.maps:
            self.neurons[expert * self.sizes.layers + self.maps[name]] += x.abs().sum(0).cpu()

    def add_squares(self, name: str, expert: int, x: Tensor) -> None:
        """Adds x² to `squares` of the parameter, shaped so that it multiplies the parameter."""
        if name not in self.squares:
            self.squares[name] = self._zeros(name)
        mine = self.squares[name] if expert < 0 else self.squares[name][expert]
        mine += x.square().sum(0).view(mine.shape)

    def _zeros(self, name: str) -> Tensor:
        """Zeros, one along the dimension of a parameter's outputs."""
        parameter, axes = self.model.get_parameter(name), self.table.parameters[pattern_of(self.table, name)[0]]
        inputs = axes.index("neurons" if "neurons" in axes else "hidden")
        outputs = next(d for d in (len(axes) - 2, len(axes) - 1) if d != inputs)
        return torch.zeros([1 if d == outputs else n for d, n in enumerate(parameter.shape)], device=parameter.device)
