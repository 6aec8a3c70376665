"""Distillation losses: exact, chunked over tokens, never holding the whole logits."""

from capacity_gap.distill.losses import distill_loss

__all__ = ["distill_loss"]
