"""hydra/launcher=ray: one wave of a grid as tasks of a Ray cluster, running or local. Imports no torch."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from capacity_gap.runner.stopping import Noted

LOOPBACK = "127.0.0.1"
NICENESS = "RAY_worker_niceness"  # Ray reads it as it is written here
POLL_S = 0.5  # how often a grid that waits looks whether it was asked to end


@dataclass
class RayConf:
    """Which cluster, and what one cell takes of it."""

    _target_: str = "hydra_plugins.capacity_gap_launchers.ray_launcher.RayLauncher"
    address: str | None = None  # of a running cluster, or `auto`; null: RAY_ADDRESS, else one on this machine
    gpus: float = 0.0  # of one cell, at most one; 0.25 puts four on one device
    cpus: float | None = None  # null: train.threads
    device_name: str | None = None  # the GPU that plans count with, such as h100


ConfigStore.instance().store(group="hydra/launcher", name="ray", node=RayConf, provider="capacity_gap")


class RayLauncher(Launcher):
    """Each job in a worker process of its own: one that dies costs no other."""

    def __init__(self, **settings: Any) -> None:
        self.settings = RayConf(**settings)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Hydra's."""
        self.config, self.loader = config, hydra_context.config_loader

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Runs one wave; returns an outcome a job."""
        from capacity_gap.cell.config import from_hydra
        from capacity_gap.runner.stopping import noting_signals
        from capacity_gap.runner.worker import Jobs, handed_out, run_task
        from capacity_gap.settings.errors import ConfigError
        from capacity_gap.settings.extension import environment
        from capacity_gap.store.stage import Store

        if self.settings.gpus > 1:
            raise ConfigError(
                f"hydra.launcher.gpus={self.settings.gpus:g}, but under Ray a cell is one process on one device. Set "
                "at most 1, or use hydra/launcher=slurm for cells on several devices."
            )
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "hydra/launcher=ray needs ray, which is not installed. Run: pip install 'capacity_gap[ray]'."
            ) from error
        configs = [from_hydra(self.loader.load_sweep_config(self.config, list(o))) for o in job_overrides]
        jobs = Jobs.hand_out(Store(configs[0].store_path), [handed_out(c) for c in configs])
        if not ray.is_initialized():
            _start(ray, self.settings.address)
        with noting_signals() as check:
            # A worker serves one task: models, threads and signal handlers of one cell never meet those of another.
            task = ray.remote(max_calls=1, max_retries=0)(run_task)
            cpus = self.settings.cpus or configs[0].train.threads
            asked: dict[str, Any] = {"num_cpus": cpus, "num_gpus": self.settings.gpus}
            running = {task.options(**asked).remote(handed_out(c), environment()): n for n, c in enumerate(configs)}
            try:
                _note_outcomes(ray, running, jobs, check)
            except BaseException:
                _end(ray, list(running), check)
                raise
        return jobs.returns()


def _start(ray: Any, address: str | None) -> None:
    """Joins or starts the cluster. Ray ends the process at SIGTERM with a handler of its own, which is taken back."""
    from capacity_gap.runner.stopping import noting_signals
    from capacity_gap.runtime.process import Interrupted

    with noting_signals() as check:
        try:
            # A cluster of one machine listens there alone; one that was named has its own address.
            here = None if address or os.environ.get("RAY_ADDRESS") else LOOPBACK
            # Ray starts its workers with a niceness of 15: beside any other work a grid would hardly get on.
            os.environ.setdefault(NICENESS, "0")
            ray.init(address=address, log_to_driver=False, include_dashboard=False, _node_ip_address=here)
        except SystemExit as error:
            raise Interrupted(signal.SIGTERM) from error
        check()


def _note_outcomes(ray: Any, running: dict[Any, int], jobs: Any, check: Callable[[], None]) -> None:
    """Records the outcome of each task as it ends."""
    while running:
        ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_S)
        check()
        for task in ready:
            n = running.pop(task)
            try:
                jobs.note(n, *ray.get(task))
            except ray.exceptions.RayError as error:
                jobs.note(n, "died", f"its process died ({type(error).__name__})")


def _end(ray: Any, tasks: Sequence[Any], noted: "Noted") -> None:
    """Interrupts every task, which then leaves a checkpoint, and waits for them as long as any grid does.

    A second signal does not wait. Messages of Ray are ignored meanwhile: the grid's exit status is that of the signal.
    """
    from capacity_gap.runner.stopping import GRACE_S

    end = time.monotonic() + GRACE_S
    for task in tasks:
        with contextlib.suppress(Exception):
            ray.cancel(task)
    with contextlib.suppress(Exception):
        left = list(tasks)
        while left and time.monotonic() < end and not noted.again:
            _, left = ray.wait(left, num_returns=len(left), timeout=POLL_S)
    with contextlib.suppress(Exception):
        ray.shutdown()  # of a cluster on this machine, which would take half a minute to end by itself
