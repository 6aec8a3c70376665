"""How much each unit of a teacher matters: one function a method, one registry.

A unit is one key-value head with all its query heads, one neuron of one layer, or one hidden dimension of the whole
model; larger is more important. Methods differ in what they look at; all give the same `Scores`. Shape suffixes: L
rows (one a layer; in an encoder–decoder one a place and layer, `models/axes.py`), K key-value heads, H query heads, F
neurons, D hidden size.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capacity_gap.models.architecture import Architecture, Dims
from capacity_gap.models.axes import architecture, dims
from capacity_gap.pruning.hooks import mask_gradients, norm_outputs, unit_inputs
from capacity_gap.pruning.lm_loss import lm_loss
from capacity_gap.pruning.units import UnitSums, named_weights, zeros
from capacity_gap.settings.errors import ConfigError, StageError

SCORES_FILE = "scores.safetensors"
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Scores:
    """Importance of every unit, fp32 on the CPU: `heads` [L, K], `neurons` [L, F], `hidden` [D].

    `queries` [L, H]: of each query head, where several share a key-value head. `layers` [L]: of whole layers, if asked.
    """

    heads: Tensor
    neurons: Tensor
    hidden: Tensor
    method: str
    queries: Tensor | None = None
    layers: Tensor | None = None

    def save(self, folder: Path) -> None:
        """Writes `scores.safetensors` to `folder`."""
        from safetensors.torch import save_file

        names = ("heads", "neurons", "hidden", "queries", "layers")
        tensors = {n: getattr(self, n).contiguous() for n in names if getattr(self, n) is not None}
        save_file(tensors, folder / SCORES_FILE, metadata={"method": self.method})

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Reads what `save` wrote."""
        from safetensors import safe_open

        with safe_open(folder / SCORES_FILE, framework="pt") as file:
            return cls(**{k: file.get_tensor(k) for k in file.keys()}, method=file.metadata()["method"])  # noqa: SIM118


def expressive_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """The paper's expressive scores: `I(m) = (1/B) Σ_batches |∂L_batch/∂m|` for a mask m of ones (docs/method.md §2).

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
    sizes, table = _open(model)
    sums = zeros(table, sizes)
    for tokens in _counted(batches, on_batch, "expressive"):
        queries, neurons, hidden = mask_gradients(model, table, sizes, tokens)
        heads = queries.unflatten(1, (sizes.kv_heads, -1)).sum(-1)
        for total, batch in zip(sums, (heads, neurons, hidden, queries), strict=True):
            total += batch.abs()
    return _finished(sums, sizes, "expressive")


def random_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """Uniform random scores, decided by `seed`: the baseline that every method must beat. Sees no data."""
    del batches, on_batch
    sizes, table = _open(model)
    generator = torch.Generator().manual_seed(seed)
    heads, neurons, hidden, queries = (torch.rand(z.shape, generator=generator) for z in zeros(table, sizes))
    return Scores(heads, neurons, hidden, "random", queries if sizes.group > 1 else None)


def magnitude_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """`I(u) = √(Σ_{w ∈ u} w²)`, the L2 norm of all weights of a unit. Sees no data."""
    del batches, on_batch, seed
    sizes, table = _open(model)
    sums = UnitSums(table, sizes)
    for name, weight in named_weights(model):
        sums.add(name, weight.detach().float().square())
    return _finished([s.sqrt() for s in sums.totals], sizes, "magnitude")


def taylor_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """`I(u) = Σ_batches Σ_{w ∈ u} |w · ∂L/∂w|`: first-order, the absolute value of each weight by itself
    (Molchanov et al. 2019, arXiv 1906.10771, eq. 8, as LLM-Pruner takes it).
    """
    del seed
    sizes, table = _open(model)
    sums = UnitSums(table, sizes)
    for tokens in _counted(batches, on_batch, "taylor"):
        for name, weight, grad in _gradients(model, tokens):
            sums.add(name, (weight.float() * grad.float()).abs())
    return _finished(sums.totals, sizes, "taylor")


def movement_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None, rate: float = 1e-4
) -> Scores:
    """`I(u) = −Σ_t Σ_{w ∈ u} w_t · ∂L_t/∂w`: weights that fine-tuning moves away from zero stay
    (Sanh et al. 2020, arXiv 2005.07683, eq. 4). One AdamW update of a copy of the model per batch, at `rate`.
    """
    del seed
    sizes, table = _open(model)
    sums = UnitSums(table, sizes)
    moved = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for _, p in named_weights(moved)], lr=rate, weight_decay=0.0)
    for tokens in _counted(batches, on_batch, "movement"):
        parameters = dict(named_weights(moved))
        for name, weight, grad in _gradients(moved, tokens):
            sums.add(name, -weight.float() * grad.float())
            parameters[name].grad = grad
        optimizer.step()
        optimizer.zero_grad()
    return _finished(sums.totals, sizes, "movement")


def activation_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """Minitron's (Muralidharan et al. 2024, arXiv 2407.14679, §2.2), means over tokens: of a head the L2 norm of its
    output, of a neuron the absolute value of its activation, of a hidden dimension that of every norm's output.
    """
    del seed
    sizes, table = _open(model)
    sums = zeros(table, sizes)
    for tokens in _counted(batches, on_batch, "activation"):
        with norm_outputs(model) as norms, unit_inputs(model, table, sizes) as (heads, neurons), torch.no_grad():
            lm_loss(model, tokens)
        for row, x in heads.items():
            queries = x.unflatten(-1, (sizes.heads, -1)).norm(dim=-1).mean(0).cpu()
            sums[3][row] += queries
            sums[0][row] += queries.view(sizes.kv_heads, -1).sum(-1)
        for row, x in neurons.items():
            sums[1][row] += x.abs().mean(0).cpu()
        sums[2].add_(sum(x.abs().mean(0).cpu() for x in norms))
    return _finished(sums, sizes, "activation")


def wanda_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """`I(u) = Σ_{ij ∈ u} |W_ij| · ‖x_j‖₂`: Wanda's weights times the norm of their inputs (Sun et al. 2024,
    arXiv 2306.11695, eq. 1), summed over the weights of a unit.
    """
    del seed
    sizes, table = _open(model)
    linears = {n: m for n, m in model.named_modules() if _is_linear(m) and m is not model.get_output_embeddings()}
    squares: dict[str, Tensor] = {}
    hooks = [m.register_forward_pre_hook(_adds_squares(squares, n)) for n, m in linears.items()]
    try:
        for tokens in _counted(batches, on_batch, "wanda"):
            with torch.no_grad():
                lm_loss(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    sums = UnitSums(table, sizes)
    for name, module in linears.items():
        norms = squares[name].sqrt()
        inputs = norms if isinstance(module, nn.Linear) else norms[:, None]  # GPT-2's Conv1D has its inputs first
        sums.add(f"{name}.weight", module.weight.detach().float().abs() * inputs)
    return _finished(sums.totals, sizes, "wanda")


SCORES: dict[str, Callable[..., Scores]] = {
    "expressive": expressive_scores,
    "random": random_scores,
    "magnitude": magnitude_scores,
    "movement": movement_scores,
    "taylor": taylor_scores,
    "activation": activation_scores,
    "wanda": wanda_scores,
}


def _adds_squares(squares: dict[str, Tensor], name: str) -> Callable:
    def hook(_module: Any, inputs: tuple) -> None:
        x = inputs[0].detach().float().flatten(0, -2).square().sum(0)
        squares[name] = squares[name] + x if name in squares else x

    return hook


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _open(model: Any) -> tuple[Dims, Architecture]:
    """The sizes and the table of a model that can be scored; a quantised one cannot."""
    broken = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if broken or getattr(model, "is_quantized", False):
        raise ConfigError(
            "a quantised teacher cannot be scored or pruned: its weights have no gradients and no rows to select. Use "
            "family.quantization=none (8-bit teachers can still teach: prune.init=random)."
        )
    return dims(model.config), architecture(model.config)


def _counted(batches: Iterable[Tensor], on_batch: OnBatch, method: str) -> Iterable[Tensor]:
    done = 0
    for done, tokens in enumerate(batches, 1):
        yield tokens
        on_batch(done)
    if done == 0:
        raise ValueError(f"{method}_scores needs at least one batch of tokens")


def _gradients(model: Any, tokens: Tensor) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, weight and ∂L/∂w of every weight; flags are put back."""
    weights = list(named_weights(model))
    flags = [(p, p.requires_grad) for _, p in weights]
    for parameter, _ in flags:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            grads = torch.autograd.grad(lm_loss(model, tokens), [p for _, p in weights])
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return ((name, weight.detach(), grad) for (name, weight), grad in zip(weights, grads, strict=True))


def _unit(scores: Tensor) -> Tensor:
    """L2-normalised along the last dimension; an all-zero layer stays zero."""
    return scores / scores.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _finished(sums: list[Tensor], sizes: Dims, method: str) -> Scores:
    """Normalised scores; what is not finite raises."""
    if not all(t.isfinite().all() for t in sums):
        raise StageError(
            f"the {method} scores are not finite: the teacher's weights or activations hold NaN or infinity. "
            "Check the teacher's checkpoint and its held-out loss."
        )
    heads, neurons, hidden, queries = map(_unit, sums)
    return Scores(heads, neurons, hidden, method, queries if sizes.group > 1 else None)
