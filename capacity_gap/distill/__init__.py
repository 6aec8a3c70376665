"""Distillation losses: exact, chunked over tokens, never holding the whole logits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capacity_gap.distill.losses import distill_loss

__all__ = ["distill_loss"]


def __getattr__(name: str) -> Any:
    """`distill_loss`, which loads torch; the settings of distillation do not."""
    if name == "distill_loss":
        from capacity_gap.distill.losses import distill_loss

        return distill_loss
    raise AttributeError(name)
