"""How much each unit of a teacher matters: one function a method, one registry.

A unit is one key-value head with all its query heads, one neuron of one layer, or one hidden dimension of the whole
model. Shape suffixes: L layers, K key-value heads, F neurons, D hidden size.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capacity_gap.distill.losses import distill_loss
from capacity_gap.errors import StageError
from capacity_gap.models.axes import Dims, Masks, dims, masks
from capacity_gap.models.loading import hidden_states, output_weight

SCORES_FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """Importance of every unit, larger is more: `heads` [L, K], `neurons` [L, F], `hidden` [D], fp32 on the CPU."""

    heads: Tensor
    neurons: Tensor
    hidden: Tensor
    method: str

    def save(self, folder: Path) -> None:
        """Writes `scores.safetensors` to `folder`."""
        from safetensors.torch import save_file

        tensors = {"heads": self.heads, "neurons": self.neurons, "hidden": self.hidden}
        save_file(tensors, folder / SCORES_FILE, metadata={"method": self.method})

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Reads what `save` wrote."""
        from safetensors import safe_open

        with safe_open(folder / SCORES_FILE, framework="pt") as file:
            heads, neurons, hidden = (file.get_tensor(k) for k in ("heads", "neurons", "hidden"))
            return cls(heads, neurons, hidden, file.metadata()["method"])


def expressive_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: Callable[[int], None] = lambda done: None
) -> Scores:
    """The paper's expressive scores: `I(m) = (1/B) Σ_batches |∂L_batch/∂m|` for a mask m of ones (METHOD §2).

    L is the language-model cross-entropy. For a mask on the input of a linear map W the derivative is the sum of
    W ⊙ ∂L/∂W over the entries of the unit; for the one hidden mask it is Σ x ⊙ ∂L/∂x over every site of the residual
    stream. The absolute value is taken per batch, after the batch's sum; scores are then L2-normalised per layer, the
    hidden ones over the whole model.

    Args:
        model: a causal language model of an architecture with an axis table; it is left as it was.
        batches: token ids [B, T]; the score depends on B.
        seed: unused, since nothing here is random; every method has this signature.
        on_batch: called with the number of batches done.
    """
    del seed
    sizes, table = dims(model.config), masks(model.config)
    sums = _zeros(sizes)
    done = 0
    for tokens in batches:
        for total, batch in zip(sums, _mask_gradients(model, table, sizes, tokens), strict=True):
            total += batch.abs()
        done += 1
        on_batch(done)
    if done == 0:
        raise ValueError("expressive_scores needs at least one batch of tokens")
    heads, neurons, hidden = (total / done for total in sums)
    return _checked(_unit(heads), _unit(neurons), _unit(hidden), "expressive")


def random_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: Callable[[int], None] = lambda done: None
) -> Scores:
    """Uniform random scores, decided by `seed`: the baseline that every method must beat. Sees no data."""
    del batches, on_batch
    generator = torch.Generator().manual_seed(seed)
    heads, neurons, hidden = (torch.rand(zeros.shape, generator=generator) for zeros in _zeros(dims(model.config)))
    return _checked(heads, neurons, hidden, "random")


SCORES: dict[str, Callable[..., Scores]] = {"expressive": expressive_scores, "random": random_scores}


def _zeros(sizes: Dims) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((sizes.layers, sizes.kv_heads), (sizes.layers, sizes.neurons), (sizes.hidden,))
    heads, neurons, hidden = (torch.zeros(shape) for shape in shapes)
    return heads, neurons, hidden


def _unit(scores: Tensor) -> Tensor:
    """L2-normalised along the last dimension; an all-zero layer stays zero."""
    return scores / scores.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _checked(heads: Tensor, neurons: Tensor, hidden: Tensor, method: str) -> Scores:
    if not all(t.isfinite().all() for t in (heads, neurons, hidden)):
        raise StageError(
            f"the {method} scores are not finite: the teacher's weights or activations hold NaN or infinity. "
            "Check the teacher's checkpoint and its held-out loss."
        )
    return Scores(heads, neurons, hidden, method)


def _mask_gradients(model: Any, table: Masks, sizes: Dims, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂mask of one batch, in fp32 on the CPU: heads [L, K], neurons [L, F], hidden [D]."""
    layers = [model.get_submodule(table.layer.format(i=i)) for i in range(sizes.layers)]
    out = [layer.get_submodule(table.attention_out).weight for layer in layers]
    down = [layer.get_submodule(table.mlp_out).weight for layer in layers]
    with _residual_stream(model, table, layers) as sites, torch.enable_grad():
        hidden = hidden_states(model, tokens[:, :-1])
        loss, _ = distill_loss(hidden, output_weight(model), tokens[:, 1:], kd_weight=0.0)
    grads = torch.autograd.grad(loss, [*out, *down, *sites])
    weights = [(w.detach().float() * g.float()).sum(0) for w, g in zip(out + down, grads, strict=False)]
    heads = torch.stack(weights[: sizes.layers]).view(sizes.layers, sizes.kv_heads, -1).sum(-1)
    stream = [(x.detach().float() * g.float()).sum((0, 1)) for x, g in zip(sites, grads[len(weights) :], strict=True)]
    return heads.cpu(), torch.stack(weights[sizes.layers :]).cpu(), torch.stack(stream).sum(0).cpu()


@contextlib.contextmanager
def _residual_stream(model: Any, table: Masks, layers: list[Any]) -> Iterator[list[Tensor]]:
    """Collects the tensors that the hidden mask acts on: embeddings, each sublayer's output, the stream after each sum.

    Every parameter takes part in the graph meanwhile; flags and hooks are put back on leaving, also after an error.
    """
    sites: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        sites.append(output[0] if isinstance(output, tuple) else output)

    def keep_input(_module: Any, inputs: tuple) -> None:
        sites.append(inputs[0])

    hooks = [model.get_submodule(table.embedding).register_forward_hook(keep)]
    for layer in layers:
        hooks.append(layer.get_submodule(table.attention).register_forward_hook(keep))
        hooks.append(layer.get_submodule(table.mid_stream).register_forward_pre_hook(keep_input))
        hooks.append(layer.get_submodule(table.mlp).register_forward_hook(keep))
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
