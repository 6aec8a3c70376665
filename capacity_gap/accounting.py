"""Parameters, FLOPs and memory, each with its convention named. No torch: planning uses this file too.

Conventions (DESIGN): a multiply-add is 2 FLOPs. Let N be the non-embedding parameters plus the output matrix (which
multiplies every token, tied or not; attention's quadratic part is left out). Then a forward pass costs 2·N per token
and a training step 6·N per token (Kaplan et al. 2020, §2.1).
"""

from collections.abc import Mapping
from typing import Any

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


BYTES = {"fp32": 4, "bf16": 2}


def stored_bytes(shape: Mapping[str, Any], *, dtype: str = "fp32", quantization: str = "none") -> float:
    """Bytes of a model's weights, in memory or on disk."""
    return count_params(shape) * (1 if quantization == "8bit" else BYTES[dtype])


def peak_memory(shape: Mapping[str, Any], *, tokens: int, precision: str) -> float:
    """Bytes that training a model takes on one device, `tokens` at once.

    16 bytes a parameter (fp32 weight, gradient, two Adam moments); activations kept for the backward pass of one
    layer and token as in Korthikanti et al. 2022 (arXiv 2205.05198), eq. 2, without the attention matrix, which fused
    attention never stores: 34·hidden bytes in half precision (its 4·hidden MLP taken as the neurons that there are);
    the chunked loss holds a few rows of logits only and is left out. A token of an encoder–decoder is in the layers of
    one stack; its cross-attention is left out.
    """
    sizes = dims(shape)
    per_token = BYTES[precision] * sizes.layers * (11 * sizes.hidden + 1.5 * sizes.neurons)
    return 16.0 * count_params(shape) + per_token * tokens
