"""hydra/launcher=slurm: one wave of a grid as an array of Slurm jobs, through submitit. Imports no torch."""

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

log = logging.getLogger(__name__)
ANSWER_S = 60.0  # for squeue and scancel, which wait long for a controller that is away
UNKNOWN = "Invalid job id"  # what they say of a job that ended long ago
GONE_S = 10.0  # a job that squeue has not named for so long is over, whatever became of it


@dataclass
class SlurmConf:
    """What the site needs (partition, account, setup …), and how cells are laid onto jobs."""

    _target_: str = "hydra_plugins.capacity_gap_launchers.slurm_launcher.SlurmLauncher"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_min: int = 240
    nodes: int = 1  # of one cell; several need gpus
    gpus: int = 0  # of one cell on each node
    device_name: str | None = None  # the GPU that plans count with, such as h100; null: A100
    cpus: int | None = None  # of one cell on each node; null: train.threads for each of its GPUs, or once
    mem_gb: float | None = None  # of one job on each node
    cells_per_job: int = 1  # small cells in one job, one after another
    cells_at_once: int = 1  # … and so many of them side by side, on the same devices
    max_jobs: int = 64  # jobs of this grid that run at once
    setup: list[str] = field(default_factory=list)  # shell lines before the work: modules, environments
    container: str | None = None  # an image, through `srun --container-image` (pyxis)
    srun_args: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch
    max_requeues: int = 20  # after a time-out or a preemption: cells go on from their checkpoints
    signal_delay_s: int = 90  # before a time-out: room for a checkpoint
    poll_s: float = 2.0
    detach: bool = False  # run the grid itself as a small job, so that no login shell must stay open
    detach_partition: str | None = None  # null: partition
    detach_time_min: int = 2880


ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmConf, provider="capacity_gap")


class Pack:
    """What one Slurm job runs: some jobs of a hand-out. Requeued, it goes on with those that have no outcome."""

    def __init__(
        self, folder: str, count: int, mine: Sequence[int], at_once: int, launcher: Sequence[str], patience: float
    ) -> None:
        self.folder, self.count, self.mine, self.at_once, self.launcher = folder, count, mine, at_once, launcher
        self.patience = patience  # seconds that children have for their checkpoints

    def __call__(self) -> None:
        """Runs what has no outcome yet; on every node of the job."""
        import submitit

        from capacity_gap.runner.worker import Jobs, run_children

        here = submitit.JobEnvironment()
        launcher = [part.replace("{head}", here.hostnames[0]) for part in self.launcher]
        jobs = Jobs(Path(self.folder), self.count)
        run_children(jobs, self.mine, at_once=self.at_once, launcher=launcher, notes=here.global_rank == 0)

    def checkpoint(self) -> Any:
        """Called by submitit shortly before a time-out: children write checkpoints and end, the job is requeued."""
        import psutil
        import submitit

        children = psutil.Process().children(recursive=True)
        for child in children:
            # torchrun, if asked itself, would kill after half a minute ranks that are writing: it ends when they do.
            with contextlib.suppress(psutil.Error):  # gone in the meantime
                if "torch.distributed.run" not in child.cmdline():
                    child.send_signal(signal.SIGTERM)
        psutil.wait_procs(children, timeout=self.patience)
        return submitit.helpers.DelayedSubmission(self)


class Detached:
    """The grid itself as a job: started again after a time-out, it goes on with what is not recorded."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command

    def __call__(self) -> None:
        """Runs the command of the grid."""
        # Inside a job sbatch would take the job's own limits as defaults for those that it submits.
        kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "SBATCH_"))}
        subprocess.run(self.command, check=False, env=kept)

    def checkpoint(self) -> Any:
        """Called by submitit shortly before a time-out."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class SlurmLauncher(Launcher):
    """Submits, then watches the outcomes and `squeue`: success is judged by the store, not by Slurm."""

    def __init__(self, **settings: Any) -> None:
        self.settings = SlurmConf(**settings)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Hydra's."""
        self.config, self.loader = config, hydra_context.config_loader

    @property
    def detach(self) -> bool:
        """Whether the grid itself is to be a job."""
        return self.settings.detach

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Runs one wave; returns an outcome a job."""
        from capacity_gap.cell.config import from_hydra
        from capacity_gap.runner.stopping import holding_signals
        from capacity_gap.runner.worker import Jobs, handed_out
        from capacity_gap.store.stage import Store

        self._check()
        configs = [from_hydra(self.loader.load_sweep_config(self.config, list(o))) for o in job_overrides]
        jobs = Jobs.hand_out(Store(configs[0].store_path), [handed_out(c) for c in configs])
        packs = self._packs(jobs.count)
        threads = self.settings.cpus or configs[0].train.threads * max(1, self.settings.gpus)
        with holding_signals() as check:  # else one that comes while sbatch runs leaves an array that nobody knows
            submitted = self._submit(jobs, packs, threads)
        try:
            check()
            self._watch(jobs, packs, submitted)
        except BaseException:
            _cancel(submitted)
            raise
        return jobs.returns()

    def _check(self) -> None:
        from capacity_gap.settings.errors import ConfigError

        s = self.settings
        if s.nodes > 1 and not s.gpus:
            raise ConfigError(
                f"hydra.launcher.nodes={s.nodes} with hydra.launcher.gpus=0: several nodes per cell need GPUs to "
                "share its training. Set hydra.launcher.gpus=N, or nodes=1."
            )
        _need_slurm()

    def _packs(self, count: int) -> list[list[int]]:
        """Jobs come longest first: dealt in turn, packs take about equally long."""
        number = -(-count // self.settings.cells_per_job)
        return [list(range(p, count, number)) for p in range(number)]

    def _submit(self, jobs: Any, packs: list[list[int]], threads: int) -> list[str]:
        s = self.settings
        executor = self._executor(jobs.folder / "slurm")
        executor.update_parameters(
            **self._site(partition=s.partition, time=s.time_min),
            nodes=s.nodes,
            ntasks_per_node=1,
            cpus_per_task=threads * s.cells_at_once,
            array_parallelism=s.max_jobs,
            **({"gpus_per_node": s.gpus} if s.gpus else {}),
            **({"mem": f"{round(s.mem_gb * 1024)}M"} if s.mem_gb else {}),
        )
        patience = 2 / 3 * s.signal_delay_s  # the rest is for the requeue, without which the job would be lost
        with executor.batch():
            made = [
                executor.submit(Pack(str(jobs.folder), jobs.count, mine, s.cells_at_once, self._torchrun, patience))
                for mine in packs
            ]
        return [job.job_id for job in made]

    @property
    def _torchrun(self) -> list[str]:
        """What goes before a worker that uses several devices or nodes."""
        s = self.settings
        if s.gpus * s.nodes <= 1:
            return []
        deaf = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]  # Slurm's warning would end torchrun; ranks catch it
        if s.nodes == 1:
            return [*deaf, sys.executable, "-m", "capacity_gap.runtime.one_machine", str(s.gpus)]
        return [
            *deaf,
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={s.nodes}",
            f"--nproc-per-node={s.gpus}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint={head}:29400",
        ]

    def _executor(self, folder: Path) -> Any:
        import submitit

        return submitit.SlurmExecutor(folder, max_num_timeout=self.settings.max_requeues, python=sys.executable)

    def _site(self, *, partition: str | None, time: int) -> dict[str, Any]:
        """The parameters that every job of this site has."""
        s = self.settings
        named = {"partition": partition, "account": s.account, "qos": s.qos, "constraint": s.constraint}
        srun = [*([f"--container-image={s.container}"] if s.container else []), *s.srun_args]
        return {
            "job_name": "capacity_gap",
            "time": time,
            "signal_delay_s": s.signal_delay_s,
            "setup": list(s.setup),
            "srun_args": srun,
            "additional_parameters": dict(s.sbatch),
            **{k: v for k, v in named.items() if v},
        }

    def _watch(self, jobs: Any, packs: list[list[int]], submitted: list[str]) -> None:
        """Returns when every job has an outcome or is known to Slurm no more.

        Slurm may be without accounting, and its controller may be restarted in between: an array task counts as over
        only when squeue, answering, has not named it for a while.
        """
        missed: dict[str, float] = {}
        while True:
            waiting = [n for n, mine in enumerate(packs) if jobs.open(mine)]
            if not waiting:
                return
            known = _squeue(submitted)
            now = time.monotonic()
            if known is not None:
                for n in waiting:
                    missed.setdefault(submitted[n], now)
                    if submitted[n] in known:
                        del missed[submitted[n]]
                if all(now - missed.get(submitted[n], now) > GONE_S for n in waiting):
                    return
            time.sleep(self.settings.poll_s)

    def submit_grid(self, command: Sequence[str], store: Path) -> None:
        """Submits the whole command of the grid as a small CPU job, and prints how to follow it."""
        self._check()
        s = self.settings
        folder = store / "jobs" / f"detached-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        executor = self._executor(folder)
        executor.update_parameters(
            **self._site(partition=s.detach_partition or s.partition, time=s.detach_time_min),
            cpus_per_task=1,
            mem="4G",
        )
        job = executor.submit(Detached([*command, "hydra.launcher.detach=false"]))
        print(
            f"detached: Slurm job {job.job_id} runs the grid; its log is {job.paths.stdout}\n"
            f"follow it with `python -m capacity_gap status {store}`"
        )


def _arrays(ids: Sequence[str]) -> list[str]:
    """The arrays that tasks are of: one id for thousands of tasks."""
    return sorted({i.split("_")[0] for i in ids})


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess | None:
    """Runs a command of Slurm's; None if it does not answer in time."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ANSWER_S, start_new_session=True
        )
    except (subprocess.TimeoutExpired, OSError):
        return None


def _cancel(ids: Sequence[str]) -> None:
    """Cancels what was submitted. Slurm sends SIGTERM first, so checkpoints are written."""
    from capacity_gap.runner.stopping import holding_signals

    command = ["scancel", *_arrays(ids)]
    with holding_signals():
        done = _ask(command)
    if done is None or (done.returncode and UNKNOWN not in done.stderr):
        why = f" ({done.stderr.strip()})" if done else f" within {ANSWER_S:.0f} s"
        print(f"Slurm did not cancel the jobs{why}. They may still run. Run: {shlex.join(command)}", file=sys.stderr)


def _squeue(ids: Sequence[str]) -> set[str] | None:
    """Which array tasks Slurm still knows as pending or running; None if it does not answer."""
    done = _ask(["squeue", "-h", "-r", "-o", "%i|%A|%T", "-j", ",".join(_arrays(ids))])
    if done is None or done.returncode:
        # A job that ended long ago is an answer too.
        return set() if done and UNKNOWN in done.stderr else None
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
    rows = (line.split("|") for line in done.stdout.split())
    return {row[0] for row in rows if row[2] not in over}


def _need_slurm() -> None:
    from capacity_gap.settings.errors import ConfigError

    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "hydra/launcher=slurm needs submitit, which is not installed. Run: pip install 'capacity_gap[slurm]'."
        ) from error
    if not shutil.which("sbatch"):
        raise ConfigError(
            "hydra/launcher=slurm, but there is no sbatch on this machine. Start the grid on a submit node, or use "
            "hydra/launcher=joblib to run it here."
        )
