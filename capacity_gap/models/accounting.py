"""Parameters, FLOPs and memory, each with its convention named. No torch: planning uses this file too.

Conventions: a multiply-add is 2 FLOPs. Let N be the non-embedding parameters plus the output matrix (which
multiplies every token, tied or not; attention's quadratic part is left out). Then a forward pass costs 2·N per token
and a training step 6·N per token (Kaplan et al. 2020, §2.1).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.models.axes import architecture, count, count_params, dims


def non_embedding(shape: Mapping[str, Any]) -> int:
    """Parameters without the embeddings (the input's, an untied output's, learned positions)."""
    return count_params(shape, non_embedding=True)


def multiplied(shape: Mapping[str, Any]) -> float:
    """N of the conventions: the parameters that multiply each token.

    Of an encoder–decoder half of them: the encoder reads one half of a sequence, the decoder the other. Of a mixture
    those of the experts that a token goes through, and of all routers.
    """
    sizes, table = dims(shape), architecture(shape)
    idle = 0
    if sizes.experts:
        idle = count(table, sizes) - count(table, replace(sizes, experts=sizes.active))
        idle -= sizes.layers * sizes.hidden * (sizes.experts - sizes.active)
    return (non_embedding(shape) - idle + sizes.vocab * sizes.hidden) / len(table.stacks)


def train_flops(shape: Mapping[str, Any], tokens: int) -> float:
    """6·N·D."""
    return 6.0 * multiplied(shape) * tokens


def forward_flops(shape: Mapping[str, Any], tokens: int) -> float:
    """2·N·D: a teacher's share of distillation, or an evaluation."""
    return 2.0 * multiplied(shape) * tokens


def flops_per_token(student: Any, teacher: Any = None) -> float:
    """Of training: 6·N, and 2·N_T for a teacher that runs beside. What is computed twice to save memory counts once."""
    return train_flops(student.to_dict(), 1) + (0.0 if teacher is None else forward_flops(teacher.to_dict(), 1))


# Peak FLOP/s of one device by a part of its name, dense: with bf16 inputs, and with fp32 (no TF32). The data sheets'.
PEAKS = {
    "B200": (2.25e15, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


# Bytes of one device's memory by the same parts; a name that says its own ("A100-SXM4-40GB") is believed.
DEVICE_BYTES = {
    "B200": 180e9,
    "H200": 141e9,
    "H100 PCIe": 80e9,
    "H100": 80e9,
    "A100": 80e9,
    "L40S": 48e9,
    "L4": 24e9,
    "A10": 24e9,
    "RTX 4090": 24e9,
    "RTX 3090": 24e9,
}


def known_device(name: str) -> str | None:
    """The entry of `PEAKS` that a device's name means, in whatever case; None for all others (every CPU)."""
    words = f" {re.sub('[-_]', ' ', name)} ".lower()
    return next((known for known in PEAKS if f" {known.lower()} " in words), None)


def peak_flops(device: str, precision: str) -> float | None:
    """What the maker promises of a device of this name; None where it is not in the table (every CPU)."""
    known = known_device(device)
    return PEAKS[known][precision != "bf16"] if known else None


def device_bytes(device: str) -> float | None:
    """The memory of a device of this name; None where it is not known."""
    if said := re.search(r"(\d+) ?GB", device, re.IGNORECASE):
        return 1e9 * int(said[1])
    known = known_device(device)
    return DEVICE_BYTES[known] if known else None


BYTES = {"fp32": 4, "bf16": 2}


def stored_bytes(shape: Mapping[str, Any], *, dtype: str = "fp32", quantization: str = "none") -> float:
    """Bytes of a model's weights, in memory or on disk."""
    return count_params(shape) * (1 if quantization == "8bit" else BYTES[dtype])


def signal_bytes_per_token(kind: str, size: int, vocabulary: int) -> float:
    """Bytes of a cached signal: for each value an id (2 bytes up to 65,536 tokens) and a half-precision
    log-probability or a one-byte count; four for the teacher's entropy."""
    return size * ((2 if vocabulary <= 2**16 else 4) + SIGNALS.entry(kind).traits["value_bytes"]) + 4.0


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds while a model is at work, by what they are for."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    teacher: float = 0.0  # one that runs beside

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


def activation_bytes(shape: Mapping[str, Any], *, tokens: int, precision: str, checkpointing: bool = False) -> float:
    """Bytes kept for the backward pass of `tokens` tokens at once.

    Of one layer and token as in Korthikanti et al. 2022 (arXiv 2205.05198), eq. 2, without the attention matrix, which
    fused attention never stores: 34·hidden bytes in half precision (its 4·hidden MLP taken as the neurons that there
    are); the chunked loss holds a few rows of logits only and is left out. With `checkpointing`, each layer's input and
    the activations of one layer at a time. A token of an encoder–decoder is in the layers of one stack; its
    cross-attention is left out. A token of a mixture has the neurons of the experts that it goes through.
    """
    sizes = dims(shape)
    per_layer = 11 * sizes.hidden + 1.5 * sizes.neurons
    if sizes.experts:  # each expert's copy of its tokens, its output, gates and inputs and their product
        per_layer = 11 * sizes.hidden + sizes.active * (2 * sizes.hidden + 4 * sizes.neurons)
    values = sizes.layers * sizes.hidden + per_layer if checkpointing else sizes.layers * per_layer
    return BYTES[precision] * values * tokens


def training_memory(
    shape: Mapping[str, Any], *, tokens: int, precision: str, shards: int = 1, checkpointing: bool = False
) -> Memory:
    """What training a model takes of one device, `tokens` at once.

    16 bytes a parameter: fp32 weight, gradient and two Adam moments; with `shards` devices each holds its part of them.
    """
    each = 4.0 * count_params(shape) / shards
    kept = activation_bytes(shape, tokens=tokens, precision=precision, checkpointing=checkpointing)
    return Memory(each, each, 2 * each, kept)
