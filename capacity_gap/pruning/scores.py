"""The importance of every unit of a teacher, and what the methods of `methods.py` share.

A unit is one key-value head with all its query heads, one neuron of one layer, one hidden dimension of the whole model,
or one expert of one layer; larger is more important. Methods differ in what they look at; all give the same `Scores`.
Shape suffixes: L rows (one a layer; in an encoder–decoder one a place and layer, in a mixture one an expert and layer
for its neurons, `models/axes.py`), K key-value heads, H query heads, F neurons, D hidden size, E experts of a layer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capacity_gap.models.axes import check_head, cuttable, dims
from capacity_gap.pruning.lm_loss import gradients_of, lm_loss
from capacity_gap.pruning.units import named_weights
from capacity_gap.settings.errors import ConfigError, StageError
from capacity_gap.structure.architecture import Architecture, Dims

SCORES_FILE = "scores.safetensors"
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Scores:
    """Importance of every unit, fp32 on the CPU: `heads` [L, K], `neurons` [L, F], `hidden` [D].

    `queries` [L, H]: of each query head, where several share a key-value head. `layers` [L]: of whole layers, if asked.
    `experts` [L, E]: of whole experts, in a mixture.
    """

    heads: Tensor
    neurons: Tensor
    hidden: Tensor
    method: str
    queries: Tensor | None = None
    layers: Tensor | None = None
    experts: Tensor | None = None

    def save(self, folder: Path) -> None:
        """Writes `scores.safetensors` to `folder`."""
        from safetensors.torch import save_file

        names = ("heads", "neurons", "hidden", "queries", "layers", "experts")
        tensors = {n: getattr(self, n).contiguous() for n in names if getattr(self, n) is not None}
        save_file(tensors, folder / SCORES_FILE, metadata={"method": self.method})

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Reads what `save` wrote."""
        from safetensors import safe_open

        with safe_open(folder / SCORES_FILE, framework="pt") as file:
            return cls(**{k: file.get_tensor(k) for k in file.keys()}, method=file.metadata()["method"])  # noqa: SIM118


def adds_squares(squares: dict[str, Tensor], name: str) -> Callable:
    """A hook that adds the squares of a module's inputs to `squares[name]`."""

    def hook(_module: Any, inputs: tuple) -> None:
        x = inputs[0].detach().float().flatten(0, -2).square().sum(0)
        squares[name] = squares[name] + x if name in squares else x

    return hook


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map; GPT-2's are called Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def opened(model: Any) -> tuple[Dims, Architecture]:
    """The sizes and the table of a model that can be scored; a quantised one cannot."""
    broken = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if broken or getattr(model, "is_quantized", False):
        raise ConfigError(
            "a quantised teacher cannot be scored or pruned: its weights have no gradients and cannot be sliced. Use "
            "family.quantization=none (8-bit teachers can still teach: prune.init=random)."
        )
    check_head(model.config)
    return dims(model.config), cuttable(model.config)


def counted(batches: Iterable[Tensor], on_batch: OnBatch, method: str) -> Iterable[Tensor]:
    """The batches, each counted when it is done; none raises."""
    done = 0
    for done, tokens in enumerate(batches, 1):
        yield tokens
        on_batch(done)
    if done == 0:
        raise ValueError(f"{method}_scores needs at least one batch of tokens")


def gradients(model: Any, tokens: Tensor) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, weight and ∂L/∂w of every weight; flags are put back."""
    weights = list(named_weights(model))
    flags = [(p, p.requires_grad) for _, p in weights]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            grads = gradients_of(model, lm_loss(model, tokens), [p for _, p in weights])
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return ((name, weight.detach(), grad) for (name, weight), grad in zip(weights, grads, strict=True))


def _unit(scores: Tensor) -> Tensor:
    """L2-normalised along the last dimension; an all-zero layer stays zero."""
    return scores / scores.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def finished(sums: list[Tensor], sizes: Dims, method: str, *, experts: Tensor | None = None) -> Scores:
    """Normalised scores, of experts those that are given, if any; what is not finite raises."""
    sums = sums if experts is None else [*sums[:4], experts]
    if not all(t.isfinite().all() for t in sums):
        raise StageError(
            f"the {method} scores are not finite: the teacher's weights or activations hold NaN or infinity. "
            "Check the teacher's checkpoint and its held-out loss."
        )
    of_layers = [_unit_of_layers(t, sizes) if i == NEURONS else _unit(t) for i, t in enumerate(sums)]
    return made(of_layers, sizes, method)


NEURONS = 1  # their place among the sums


def _unit_of_layers(neurons: Tensor, sizes: Dims) -> Tensor:
    """Normalised per layer; the neurons of all experts of a layer together, so that their use tells among them."""
    if not sizes.experts:
        return _unit(neurons)
    by_layer = neurons.view(sizes.experts, sizes.layers, -1).transpose(0, 1).flatten(1)
    return _unit(by_layer).view(sizes.layers, sizes.experts, -1).transpose(0, 1).reshape(neurons.shape)


def made(found: list[Tensor], sizes: Dims, method: str) -> Scores:
    """Scores of heads, neurons, hidden, query heads, experts; without the last two where a model has none."""
    heads, neurons, hidden, queries, experts = found
    of_queries, of_experts = queries if sizes.group > 1 else None, experts if sizes.experts else None
    return Scores(heads, neurons, hidden, method, of_queries, experts=of_experts)
