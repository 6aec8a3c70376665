"""How fast a training run goes and what memory it takes: logged and recorded, never part of a result."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from capacity_gap.models.accounting import flops_per_token, peak_flops
from capacity_gap.runtime.process import Runtime, device_name


@dataclass
class Pace:
    """How fast a run goes; what is measured on the way does not count."""

    flops_per_token: float
    peak: float | None  # FLOP/s of all devices
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, student: Any, teacher: Any, *, peak: float | None, runtime: Runtime, precision: str) -> "Pace":
        """The clock of one run, started. `teacher`: one that runs beside; `peak` FLOP/s of one device, by its name if
        not given."""
        one = peak or peak_flops(device_name(runtime.device), precision)
        beside = None if teacher is None else teacher.config
        return cls(flops_per_token(student.config, beside), one and one * runtime.ranks.size)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(1e-9, time.monotonic() - self.began)

    @property
    def now(self) -> dict[str, float]:
        """Tokens per second, and MFU where the peak is known."""
        rate = self.tokens / self.seconds
        mfu = {"mfu": self.flops_per_token * rate / self.peak} if self.peak else {}
        return {"tokens_per_s": rate, **mfu}

    def apart(self, work: Callable[..., float], *given: Any) -> float:
        """Does something while the clock stands."""
        before = time.monotonic()
        found = work(*given)
        self.began += time.monotonic() - before
        return found


def forget_peak(device: str) -> None:
    """Counts a CUDA device's peak from here on: a process trains many models. A process's own peak only grows."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """Most memory held: on CUDA by torch's allocator since `forget_peak`, else by this process in all its life."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
