"""How important each unit, and each layer, of a teacher is: one function a method, in two registries.

L is the number of layers; an encoder–decoder has the encoder's first, then the decoder's. Importing this file imports
no torch: names of methods are needed where nothing is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from capacity_gap.models.axes import cuttable, dims
from capacity_gap.settings.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from capacity_gap.pruning.scores import OnBatch, Scores

# `seeded`: whether the cell's seed decides it. `embedding_gradients`: whether it reads the embedding's gradients.
# `spread`: whether it reads a model that lies on several devices or ranks (`models/placing.py`).
SCORES: Registry[Callable[..., Scores]] = Registry(
    "score", setting="prune.method", traits={"seeded": False, "embedding_gradients": False, "spread": False}
)
SYMMETRIC = "symmetric"  # layers go from both ends, by no score
# `passes`: forward passes over the batches; None: one for each layer.
LAYER_SCORES: Registry[Callable[..., Tensor]] = Registry(
    "score of layers", setting="prune.layers", traits={"passes": 1, "spread": False}, reserved=(SYMMETRIC,)
)


@SCORES.register("expressive", spread=True)
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
    from capacity_gap.pruning.experts import router_mass
    from capacity_gap.pruning.hooks import mask_gradients
    from capacity_gap.pruning.scores import counted, finished, opened
    from capacity_gap.pruning.units import zeros

    del seed
    sizes, table = opened(model)
    sums = zeros(table, sizes)
    with router_mass(model, table, sizes) as mass:
        for tokens in counted(batches, on_batch, "expressive"):
            queries, neurons, hidden = mask_gradients(model, table, sizes, tokens)
            # One mask scales all queries of a unit, so their derivatives add before the absolute value is taken.
            heads = queries.unflatten(1, (sizes.kv_heads, -1)).sum(-1)
            for total, batch in zip(sums, (heads, neurons, hidden, queries), strict=False):
                total += batch.abs()
    return finished(sums, sizes, "expressive", experts=mass)


@SCORES.register("random", seeded=True, spread=True)
def random_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """Uniform random scores, decided by `seed`: the baseline that every method must beat. Sees no data."""
    import torch

    from capacity_gap.pruning.scores import made, opened
    from capacity_gap.pruning.units import zeros

    del batches, on_batch
    sizes, table = opened(model)
    generator = torch.Generator().manual_seed(seed)
    return made([torch.rand(z.shape, generator=generator) for z in zeros(table, sizes)], sizes, "random")


@SCORES.register("magnitude", spread=True)
def magnitude_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """`I(u) = √(Σ_{w ∈ u} w²)`, the L2 norm of all weights of a unit. Sees no data."""
    from capacity_gap.pruning.scores import finished, opened
    from capacity_gap.pruning.units import UnitSums, named_weights

    del batches, on_batch, seed
    sizes, table = opened(model)
    sums = UnitSums(table, sizes)
    for name, weight in named_weights(model):
        sums.add(name, weight.detach().float().square())
    return finished([s.sqrt() for s in sums.totals], sizes, "magnitude")


@SCORES.register("taylor", embedding_gradients=True, spread=True)
def taylor_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """`I(u) = Σ_batches Σ_{w ∈ u} |w · ∂L/∂w|`: first-order, the absolute value of each weight by itself
    (Molchanov et al. 2019, arXiv 1906.10771, eq. 8, as LLM-Pruner takes it).
    """
    from capacity_gap.pruning.experts import router_mass
    from capacity_gap.pruning.scores import counted, finished, gradients, opened
    from capacity_gap.pruning.units import UnitSums

    del seed
    sizes, table = opened(model)
    sums = UnitSums(table, sizes)
    with router_mass(model, table, sizes) as mass:
        for tokens in counted(batches, on_batch, "taylor"):
            for name, weight, grad in gradients(model, tokens):
                sums.add(name, (weight.float() * grad.float()).abs())
    return finished(sums.totals, sizes, "taylor", experts=mass)


@SCORES.register("movement", embedding_gradients=True)
def movement_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None, rate: float = 1e-4
) -> Scores:
    """`I(u) = −Σ_t Σ_{w ∈ u} w_t · ∂L_t/∂w`: weights that fine-tuning moves away from zero stay
    (Sanh et al. 2020, arXiv 2005.07683, eq. 4). One AdamW update of a copy of the model per batch, at `rate`.
    """
    import torch

    from capacity_gap.pruning.experts import router_mass
    from capacity_gap.pruning.scores import counted, finished, gradients, opened
    from capacity_gap.pruning.units import UnitSums, named_weights

    del seed
    sizes, table = opened(model)
    sums = UnitSums(table, sizes)
    moved = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for _, p in named_weights(moved)], lr=rate, weight_decay=0.0)
    parameters = dict(named_weights(moved))
    with router_mass(moved, table, sizes) as mass:
        for tokens in counted(batches, on_batch, "movement"):
            for name, weight, grad in gradients(moved, tokens):
                # w_t and ∂L_t/∂w are both from before this batch's update, as in eq. 4.
                sums.add(name, -weight.float() * grad.float())
                parameters[name].grad = grad
            optimizer.step()
            optimizer.zero_grad()
    return finished(sums.totals, sizes, "movement", experts=mass)


@SCORES.register("activation", spread=True)
def activation_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """Minitron's (Muralidharan et al. 2024, arXiv 2407.14679, §2.2), means over tokens: of a head the L2 norm of its
    output, of a neuron the absolute value of its activation, of a hidden dimension that of every norm's output.
    """
    import torch

    from capacity_gap.pruning.experts import ExpertSums, expert_inputs, router_mass
    from capacity_gap.pruning.hooks import norm_outputs, unit_inputs
    from capacity_gap.pruning.lm_loss import lm_loss
    from capacity_gap.pruning.scores import counted, finished, opened
    from capacity_gap.pruning.units import zeros

    del seed
    sizes, table = opened(model)
    sums = zeros(table, sizes)
    of_experts = ExpertSums(model, table, sizes)
    reading = expert_inputs(model, table, sizes, of_experts.add_neurons)
    seen = 0
    with router_mass(model, table, sizes) as mass, reading:
        for tokens in counted(batches, on_batch, "activation"):
            with norm_outputs(model) as norms, unit_inputs(model, table, sizes) as (heads, neurons), torch.no_grad():
                lm_loss(model, tokens)
            for row, x in heads.items():
                queries = x.unflatten(-1, (sizes.heads, -1)).norm(dim=-1).mean(0).cpu()
                sums[3][row] += queries
                sums[0][row] += queries.view(sizes.kv_heads, -1).sum(-1)
            for row, x in neurons.items():
                sums[1][row] += x.abs().mean(0).cpu()
            seen += tokens.numel()
            sums[2].add_(sum(x.abs().mean(0).cpu() for x in norms))
    if sizes.experts:  # an expert that a token does not go through is not active in it
        sums[1] = of_experts.neurons / seen
    return finished(sums, sizes, "activation", experts=mass)


@SCORES.register("wanda", spread=True)
def wanda_scores(
    model: Any, batches: Iterable[Tensor], *, seed: int = 0, on_batch: OnBatch = lambda done: None
) -> Scores:
    """`I(u) = Σ_{ij ∈ u} |W_ij| · ‖x_j‖₂`: Wanda's weights times the norm of their inputs (Sun et al. 2024,
    arXiv 2306.11695, eq. 1), summed over the weights of a unit.
    """
    import torch
    from torch import nn

    from capacity_gap.pruning.experts import ExpertSums, expert_inputs, router_mass
    from capacity_gap.pruning.lm_loss import lm_loss
    from capacity_gap.pruning.scores import adds_squares, counted, finished, is_linear, opened
    from capacity_gap.pruning.units import UnitSums
    from capacity_gap.store.checkpoint import whole

    del seed
    sizes, table = opened(model)
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and m is not model.get_output_embeddings()}
    squares: dict[str, Tensor] = {}
    hooks = [m.register_forward_pre_hook(adds_squares(squares, n)) for n, m in linears.items()]
    of_experts = ExpertSums(model, table, sizes)
    reading = expert_inputs(model, table, sizes, of_experts.add_squares)
    try:
        with router_mass(model, table, sizes) as mass, reading:
            for tokens in counted(batches, on_batch, "wanda"):
                with torch.no_grad():
                    lm_loss(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    sums = UnitSums(table, sizes)
    for name, squared in of_experts.squares.items():
        sums.add(name, model.get_parameter(name).detach().float().abs() * squared.sqrt())
    for name, module in linears.items():
        if f"{name}.weight" in of_experts.squares:
            continue
        norms = squares[name].sqrt()
        inputs = norms if isinstance(module, nn.Linear) else norms[:, None]  # GPT-2's Conv1D has its inputs first
        sums.add(f"{name}.weight", whole(module.weight.detach()).float().abs() * inputs)
    return finished(sums.totals, sizes, "wanda", experts=mass)


@LAYER_SCORES.register("block_influence", passes=1, spread=True)
def block_influence(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """`1 − E[cos(x_in, x_out)]` of each layer, over all tokens (ShortGPT, arXiv 2403.03853, eq. 1). Returns [L]."""
    import torch
    from torch.nn import functional as F

    from capacity_gap.pruning.hooks import layer_streams, layers_of
    from capacity_gap.pruning.lm_loss import lm_loss

    table, sizes = cuttable(model.config), dims(model.config)
    total, count = torch.zeros(2, len(layers_of(model, table, sizes)))
    for tokens in batches:
        with layer_streams(model, table, sizes) as (before, after), torch.no_grad():
            lm_loss(model, tokens)
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            total[i] += (1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).sum().cpu()
            count[i] += x.shape[:-1].numel()
    return total / count


@LAYER_SCORES.register("loss_increase", passes=None, spread=True)
def loss_increase(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """How much the loss rises when a layer is left out, for each of them. Returns [L], nats per token."""
    import torch

    from capacity_gap.pruning.hooks import layers_of

    table, sizes = cuttable(model.config), dims(model.config)
    kept: Sequence[Tensor] = batches if isinstance(batches, list) else list(batches)
    layers = layers_of(model, table, sizes)
    whole = _mean_loss(model, kept)
    rises = []
    for layer in layers:
        # The layer runs and its output is replaced: no architecture has to be rebuilt without it.
        hook = layer.register_forward_hook(_passes_through, with_kwargs=True)
        try:
            rises.append(_mean_loss(model, kept) - whole)
        finally:
            hook.remove()
    return torch.tensor(rises)


def _passes_through(_module: Any, inputs: tuple, named: dict, output: Any) -> Any:
    stream = inputs[0] if inputs else named["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def _mean_loss(model: Any, batches: Sequence[Tensor]) -> float:
    import torch

    from capacity_gap.pruning.lm_loss import lm_loss

    with torch.no_grad():
        return sum(float(lm_loss(model, tokens)) for tokens in batches) / len(batches)
