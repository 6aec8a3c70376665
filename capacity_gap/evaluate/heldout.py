"""Held-out loss: label cross-entropy in nats per token and bits per byte, with its standard error."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from capacity_gap.distill.losses import token_losses
from capacity_gap.models.loading import output_weight, predicted
from capacity_gap.models.placing import gathered_states
from capacity_gap.runtime.process import Runtime
from capacity_gap.structure.head import logit_cap


@dataclass(frozen=True)
class HeldOut:
    """Scores of one model on one text. The standard error is over sequences: tokens of one are not independent.

    `tokens` are those predicted: all of the text, or of a prefix language model the second half of each sequence.
    """

    loss: float  # nats per token
    stderr: float | None  # None: a single sequence has no standard error
    bits_per_byte: float | None  # None: the bytes of some token are not known
    entropy: float  # of the model's own predictions, nats per token
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@torch.no_grad()
def held_out(model: Any, sequences: Any, *, tokens: int, batch_size: int, runtime: Runtime) -> HeldOut:
    """Scores `model` on the first `tokens` tokens (whole sequences) of `sequences`, or on all if there are fewer."""
    labels = predicted(model, sequences.sequence_length)
    count = max(1, min(len(sequences), tokens // sequences.sequence_length))
    losses, entropies, n_bytes = [], [], 0.0
    for start in range(0, count, batch_size):
        batch = sequences.batch(np.arange(start, min(start + batch_size, count)))
        loss, entropy = _sequence_means(model, torch.from_numpy(batch).to(runtime.device))
        losses.append(loss)
        entropies.append(entropy)
        n_bytes += float(sequences.bytes_per_id[batch[:, -labels:]].sum())
        runtime.report(start + len(batch), count, "sequences")
    per_sequence = torch.cat(losses).double()
    seen = count * labels
    # Sequences are equally long, so the mean of their means is the mean over tokens.
    mean = float(per_sequence.mean())
    stderr = float(per_sequence.std() / math.sqrt(count)) if count > 1 else None
    bits = mean / math.log(2) * seen / n_bytes if n_bytes > 0 else None  # NaN is above nothing
    return HeldOut(mean, stderr, bits, float(torch.cat(entropies).double().mean()), seen)


def _sequence_means(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean label cross-entropy and mean predictive entropy of each sequence of a batch [B, T+1]."""
    hidden = gathered_states(model, tokens[:, :-1])
    labels = tokens[:, -hidden.shape[1] :]
    weight, most = output_weight(model).to(hidden.device), logit_cap(model.config)
    loss, entropy = token_losses(hidden.flatten(0, 1), weight, labels.flatten(), logit_cap=most)
    return loss.view(labels.shape).mean(1).cpu(), entropy.view(labels.shape).mean(1).cpu()
