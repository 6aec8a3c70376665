"""Liger's fused kernels (extra `[liger]`) for the objectives that they compute exactly: CE, alone or with forward KL.

They are Triton kernels, so this is for CUDA. The arithmetic of this file is tested with torch's own losses in the
kernels' place, and on a GPU with the kernels (`tests/test_cuda.py`).
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@functools.cache
def installed() -> bool:
    """Whether Liger is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def serves(hidden: Tensor, *, loss: str, kd_weight: float, teacher: Any, weight: Tensor) -> bool:
    """Whether Liger computes this very objective, here.

    Not: other distances; soft CE, whose value needs the teacher's entropy; cached signals; vocabularies of two sizes.
    """
    if hidden.device.type != "cuda" or not installed():
        return False
    if kd_weight == 0:
        return True
    return loss == "forward_kl" and isinstance(teacher, tuple) and len(teacher[1]) == len(weight)


def cross_entropy() -> Any:
    """`f(weight, hidden, labels)`: the sum over the labels that count."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)


def forward_kl(temperature: float) -> Any:
    """`f(hidden, weight, teacher_hidden, teacher_weight, labels)`: the mean over the labels that count."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0, ignore_index=IGNORE, temperature=temperature, accum_dtype=torch.float32)


def fused_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    *,
    kd_weight: float,
    temperature: float,
    tau_factor: float,
    scale: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`((1 − w)·Σ CE + w·τ²·Σ KL) · scale` and its parts; the teacher's entropy is not among them."""
    weight_VD = weight_VD.to(hidden_ND.dtype)
    # Liger forms gradients in its forward pass: at w = 1 those of CE would be multiplied by zero.
    with torch.set_grad_enabled(torch.is_grad_enabled() and kd_weight < 1):
        ce = cross_entropy()(weight_VD, hidden_ND, labels_N) * scale
    if teacher is None:
        return ce, {"ce": ce.detach()}
    count = (labels_N != IGNORE).sum()
    theirs = (teacher[0], teacher[1].to(teacher[0].dtype))
    # Liger's mean is over this micro-batch; the loss is divided by the labels of the whole step (`scale`).
    kl = forward_kl(temperature)(hidden_ND, weight_VD, *theirs, labels_N) * count * scale
    parts = {"ce": ce.detach(), "kd": kl.detach(), "kl": kl.detach()}
    return (1 - kd_weight) * ce + kd_weight * tau_factor * kl, parts
