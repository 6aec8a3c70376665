"""Parameters, FLOPs and memory, each with its convention named. No torch: planning uses this file too.

Conventions: a multiply-add is 2 FLOPs. Let N be the non-embedding parameters plus the output matrix (which
multiplies every token, tied or not; attention's quadratic part is left out). Then a forward pass costs 2·N per token
and a training step 6·N per token (Kaplan et al. 2020, §2.1).
"""

from collections.abc import Mapping
from typing import Any

from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.models.axes import architecture, count_params, dims


def non_embedding(shape: Mapping[str, Any]) -> int:
    """Parameters without the embeddings (the input's, an untied output's, learned positions)."""
    return count_params(shape, non_embedding=True)


def multiplied(shape: Mapping[str, Any]) -> float:
    """N of the conventions: the parameters that multiply each token.

    Of an encoder–decoder half of them: the encoder reads one half of a sequence, the decoder the other.
    """
    sizes = dims(shape)
    return (non_embedding(shape) + sizes.vocab * sizes.hidden) / len(architecture(shape).stacks)


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


def peak_flops(device: str, precision: str) -> float | None:
    """What the maker promises of a device of this name; None where it is not in the table (every CPU)."""
    words = device.replace("-", " ")
    found = [peaks for name, peaks in PEAKS.items() if f" {name} " in f" {words} "]
    return found[0][precision != "bf16"] if found else None


BYTES = {"fp32": 4, "bf16": 2}


def stored_bytes(shape: Mapping[str, Any], *, dtype: str = "fp32", quantization: str = "none") -> float:
    """Bytes of a model's weights, in memory or on disk."""
    return count_params(shape) * (1 if quantization == "8bit" else BYTES[dtype])


def signal_bytes_per_token(kind: str, size: int, vocabulary: int) -> float:
    """Bytes of a cached signal: for each value an id (2 bytes up to 65,536 tokens) and a half-precision
    log-probability or a one-byte count; four for the teacher's entropy."""
    return size * ((2 if vocabulary <= 2**16 else 4) + SIGNALS.entry(kind).traits["value_bytes"]) + 4.0


def peak_memory(
    shape: Mapping[str, Any], *, tokens: int, precision: str, shards: int = 1, checkpointing: bool = False
) -> float:
    """Bytes that training a model takes on one device, `tokens` at once.

    16 bytes a parameter (fp32 weight, gradient, two Adam moments); activations kept for the backward pass of one
    layer and token as in Korthikanti et al. 2022 (arXiv 2205.05198), eq. 2, without the attention matrix, which fused
    attention never stores: 34·hidden bytes in half precision (its 4·hidden MLP taken as the neurons that there are);
    the chunked loss holds a few rows of logits only and is left out. With `shards` devices each holds its part of what
    belongs to the parameters; with `checkpointing`, each layer's input and the activations of one layer at a time. A
    token of an encoder–decoder is in the layers of one stack; its cross-attention is left out.
    """
    sizes = dims(shape)
    per_layer = 11 * sizes.hidden + 1.5 * sizes.neurons
    values = sizes.layers * sizes.hidden + per_layer if checkpointing else sizes.layers * per_layer
    return 16.0 * count_params(shape) / shards + BYTES[precision] * values * tokens
