"""What a grid is run on, as far as it is known before anything starts: jobs at once, and the devices of each.

Which GPU a job of Slurm or Ray gets is not known where the grid is planned. A setting may name it; else one is assumed,
and the plan says so. Imports no torch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.models.accounting import PEAKS, device_bytes, known_device, peak_flops
from capacity_gap.runtime.process import gpu_name, gpus
from capacity_gap.runtime.ranks import Ranks
from capacity_gap.settings.errors import ConfigError, shown

ASSUMED_GPU = "A100"  # where GPUs are asked for and none is named


@dataclass(frozen=True)
class Machines:
    """What a launcher gives to a grid."""

    at_once: int = 1  # jobs
    gpus: float | None = None  # of one job, on all its nodes; None: the job runs here
    side_by_side: int = 1  # cells that share the devices of one job
    device_name: str | None = None  # as the launcher's setting names it

    @classmethod
    def of(cls, launcher: Mapping[str, Any]) -> "Machines":
        """The machines that the settings of a Hydra launcher give."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if "max_jobs" in launcher:  # slurm
            side, devices = launcher["cells_at_once"], launcher["gpus"] * launcher["nodes"]
            return cls(max(1, launcher["max_jobs"] * side), devices, max(1, side), launcher["device_name"])
        if "address" in launcher:  # ray
            share, elsewhere = launcher["gpus"], launcher["address"] or os.environ.get("RAY_ADDRESS")
            # How large another cluster is, only it can say.
            room = 1 if elsewhere else gpus() / share if share else cores / (launcher["cpus"] or 1)
            return cls(max(1, int(room)), share, 1, launcher["device_name"])
        jobs = launcher.get("n_jobs") or 1  # joblib, or one after another
        return cls(cores if jobs < 0 else jobs)

    def cards(self, worker: "Worker") -> int | None:
        """GPUs that all jobs together have: 0 where it is not known, None where each job has its own or needs none."""
        here = gpus() if worker.gpu and self.gpus is None else None
        return None if here is None or here >= self.at_once * worker.ranks else here


@dataclass(frozen=True)
class Worker:
    """The devices that compute one cell."""

    gpu: str | None  # its name; None: the CPU
    named: str  # how the name is known, in words
    ranks: int  # processes that train one model, each on a device
    share: float  # of its device that a process has
    precision: str
    assumed: bool = False  # whether the GPU is a guess

    @property
    def devices(self) -> float:
        """Devices that the cell holds while it is computed."""
        return self.ranks * self.share

    @property
    def peak(self) -> float:
        """FLOP/s that the maker of one device promises."""
        return peak_flops(self.gpu or ASSUMED_GPU, self.precision) or peak_flops(ASSUMED_GPU, self.precision) or 0.0

    @property
    def memory(self) -> float | None:
        """Bytes of one device that a process has; None for a CPU and for a device that is not in the table."""
        held = device_bytes(self.gpu) if self.gpu else None
        return held and held * self.share


def worker_of(config: RunConfig, machines: Machines) -> Worker:
    """What computes one cell under these settings.

    Raises:
        ConfigError: a setting names a device that is not in the table.
    """
    asked, precision = machines.gpus, config.train.precision or "fp32"
    if asked is None:  # more workers than devices of this machine share them
        share = min(1.0, (gpus() or machines.at_once) / machines.at_once)
    else:
        share = (min(1.0, asked) if asked > 0 else 1.0) / machines.side_by_side
    ranks = config.devices or (Ranks().size if asked is None else max(1, round(asked)))
    if not _on_gpu(config, machines):
        return Worker(None, "", ranks, 1.0, precision)
    for key, name in (("device_name", config.device_name), ("hydra.launcher.device_name", machines.device_name)):
        if name is not None:
            return Worker(_known(key, name), f"{key}={name}", ranks, share, precision)
    if asked is None and gpus() and (here := gpu_name()):
        said = "this machine's" if known_device(here) else f"this machine's, of unknown speed: taken as {ASSUMED_GPU}"
        return Worker(here, said, ranks, share, precision)
    return Worker(ASSUMED_GPU, "assumed; set device_name=h100 for another", ranks, share, precision, assumed=True)


def _on_gpu(config: RunConfig, machines: Machines) -> bool:
    device = config.train.device
    if config.device_name or machines.device_name or device.startswith("cuda"):
        return True
    if device != "auto":
        return False
    return gpus() > 0 if machines.gpus is None else machines.gpus > 0


def _known(key: str, name: str) -> str:
    if found := known_device(name):
        return name if device_bytes(name) != device_bytes(found) else found  # one that says its own memory keeps it
    raise ConfigError(
        f"{key}={shown(name)} is not a GPU of known speed. Known: {', '.join(PEAKS)}. For any other GPU set "
        "throughput=, the FLOP/s of one worker."
    )
