"""The optimiser and its learning rates (docs/method.md §4)."""

import math

import torch
from torch import nn

from capacity_gap.training.train_config import OptimConfig


def learning_rate(step: int, steps: int, optim: OptimConfig, peak: float) -> float:
    """The rate of step 0 … steps − 1: a linear warm-up, then the schedule.

    `cosine` and `wsd` (constant, then linear decay over the last `optim.decay` of the steps) end at
    `optim.final`·peak; `constant` stays.
    """
    warm = max(1, round(optim.warmup * steps))
    if step < warm:
        # step + 1: at a rate of zero the first step would train nothing.
        return peak * (step + 1) / warm
    if optim.schedule == "constant":
        return peak
    start = warm if optim.schedule == "cosine" else max(warm, round((1 - optim.decay) * steps))
    # steps − 1: the last step itself runs at the final rate.
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return peak * (optim.final + (1 - optim.final) * fall)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, none on norms and biases (docs/method.md §4)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    # Embeddings have two dimensions, so they decay: the released code exempts norms and biases only. Biases of experts
    # lie in one matrix.
    decays = {id(p): p.ndim >= 2 and not n.endswith("bias") for n, p in named}
    groups = [
        {"params": [p for p in parameters if decays[id(p)]], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if not decays[id(p)]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )
