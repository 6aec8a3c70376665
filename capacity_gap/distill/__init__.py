"""Distillation losses: exact, chunked over tokens, never holding the whole logits. Settings need no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capacity_gap.distill.losses import distill_loss

__all__ = ["distill_loss"]


def __getattr__(name: str) -> Any:
    if name == "distill_loss":
        from capacity_gap.distill.losses import distill_loss

        return distill_loss
    raise AttributeError(name)
