"""How a stage runs on this machine: device, threads, progress, interruption. Nothing in this file changes a result."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capacity_gap.runtime.ranks import Ranks
from capacity_gap.settings.checks import need
from capacity_gap.settings.errors import ConfigError, Lost
from capacity_gap.settings.places import IN_CHECKOUT, ROOT

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPING = (*ENDING, signal.SIGUSR2)
MIND_S = 0.5  # how often a worker looks whether its grid is still there
ECHO_S = 10.0  # one request to stop reaches a rank several times: from Slurm, from submitit, from torchrun
STEPS = "steps"  # the unit of stages that leave checkpoints of their own
PARENT = "CAPACITY_GAP_PARENT"  # process id of the grid that started this worker
STOP_FILE = "CAPACITY_GAP_STOP"  # a file that a grid makes when it was asked to end (`stopping.py`)
TRAINERS = ("accelerate", "liger_kernel", "trl", "peft")
VERSIONED = ("capacity_gap", "torch", "transformers", "tokenizers", "numpy", *TRAINERS)


class Interrupted(BaseException):
    """The process was asked to end (by a signal, or Slurm's early warning): a checkpoint is written, then it goes."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_status(self) -> int:
        """What shells expect of a process that a signal ended; Slurm's warning counts as SIGTERM."""
        return 128 + (self.number if self.number in ENDING else signal.SIGTERM)


class Stop:
    """Whether the process was asked to end.

    No `threading.Event`: setting one takes a lock, and a signal that comes while the handler of another one holds it
    would wait for it for ever.
    """

    number = 0  # of the signal

    def set(self, number: int = signal.SIGTERM) -> None:
        """Asks."""
        self.number = number

    def is_set(self) -> bool:
        """Whether there was a request."""
        return self.number > 0


@dataclass
class Progress:
    """A small file with the progress of a running stage, read by `status` and the live table."""

    stage: str
    path: Path
    cost: float
    started: float = field(default_factory=time.monotonic)
    written: float = 0.0

    def update(self, done: float, total: float, unit: str = "tokens", **extra: Any) -> None:
        """Writes `done` of `total` at most once a second."""
        now = time.monotonic()
        if now - self.written < 1.0 and done < total:
            return
        self.written = now
        state = {"stage": self.stage, "cost": self.cost, "done": done, "total": total, "unit": unit}
        state |= {"elapsed_s": round(now - self.started, 1), **extra}
        beside = self.path.with_name(f".{self.path.name}.tmp")
        with contextlib.suppress(OSError):  # progress is a courtesy: it must never stop the work
            beside.write_text(json.dumps(state))
            os.replace(beside, self.path)


@dataclass
class Runtime:
    """Where and how stages run: never part of an identity, always recorded."""

    device: str = "cpu"
    threads: int = 1
    checkpoint_minutes: float = 1.0
    waits: bool = True  # for a stage that another process is at; else `Busy` is raised
    on_log: Callable[[dict], None] = lambda point: None
    sharding: str = "none"
    placement: str = "one"  # of teachers: one, devices, ranks
    together: bool = False  # whether all ranks are at the running stage
    ranks: Ranks = field(default_factory=Ranks)
    stop: Stop = field(default_factory=Stop)
    progress: Progress | None = None
    is_lost: Callable[[], bool] = lambda: False  # whether another process took over the running stage

    @contextlib.contextmanager
    def following(self, stage: str, path: Path, cost: float, is_lost: Callable[[], bool]) -> Iterator[None]:
        """Sets the process up for one stage and points `report` at its progress file."""
        import torch

        torch.set_num_threads(self.threads)
        self.progress, self.is_lost = Progress(stage, path, cost), is_lost
        try:
            yield
        finally:
            self.progress, self.is_lost = None, lambda: False

    @contextlib.contextmanager
    def working(self, *, collective: bool) -> Iterator[None]:
        """Notes whether all ranks work on the stage that runs meanwhile: then they also stop together."""
        self.together = collective and self.ranks.size > 1
        try:
            yield
        finally:
            self.together = False

    @property
    def shards_teachers(self) -> bool:
        """Whether each rank holds its share of the teacher in the running stage."""
        return self.placement == "ranks" and self.together

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Turns the first SIGTERM, SIGINT, SIGHUP or USR2 (Slurm's warning) into a checkpoint; a second one kills.

        Several ranks are stopped by programs, not by people: there a second one within `ECHO_S` is the first again.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers; whoever owns it decides
            return

        asked: dict[int, float] = {}

        def stop(number: int, _frame: Any) -> None:
            now = time.monotonic()
            if number not in asked:
                self.stop.set(number)
                asked[number] = now
                if self.ranks.size == 1:
                    signal.signal(number, before[signal.Signals(number)])
            elif now - asked[number] > ECHO_S:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)

        before = {number: signal.signal(number, stop) for number in STOPPING if not ignores(number)}
        ended = threading.Event()
        if os.environ.get(PARENT) == str(os.getppid()):
            self._mind_grid(os.getppid())
            threading.Thread(target=self._mind_grid_until, args=(os.getppid(), ended), daemon=True).start()
        try:
            yield
        except Interrupted as error:
            raise Interrupted(self.stop.number or error.number) from error
        finally:
            ended.set()
            for number, handler in before.items():
                signal.signal(number, pass_over if in_pool() else handler)

    def _mind_grid_until(self, parent: int, ended: threading.Event) -> None:
        while not self.stop.is_set() and not ended.wait(MIND_S):
            self._mind_grid(parent)

    def _mind_grid(self, parent: int) -> None:
        """A worker whose grid was killed or asked to end stops as if it had been asked itself."""
        if os.getppid() != parent or os.path.exists(os.environ.get(STOP_FILE, "")):
            self.stop.set()

    def check(self) -> None:
        """Raises `Interrupted` if the process was asked to stop; on all ranks at once where they work together."""
        asked = self.stop.is_set()
        if self.ranks.any(asked) if self.together else asked:
            raise Interrupted(self.stop.number)

    def report(self, done: float, total: float, unit: str = "tokens", **extra: Any) -> None:
        """Reports the progress of the running stage."""
        if self.progress:
            self.progress.update(done, total, unit, **extra)
        if unit != STEPS:
            self.check()  # a training loop writes a checkpoint before it ends
        if self.ranks.size == 1 and self.is_lost():
            raise Lost


def ignores(number: int) -> bool:
    """Whether a hang-up is not to end this process: it was started with `nohup`."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def in_pool() -> bool:
    """Whether this process is a worker of a grid's own pool, which breaks when one of them ends."""
    return STOP_FILE in os.environ and os.environ.get(PARENT) == str(os.getppid())


def pass_over(number: int, _frame: Any) -> None:
    """What a worker of a pool does with a signal between two jobs: its grid has been sent it too, and decides."""
    if not in_pool():
        raise SystemExit(128 + number)


def check_device_name(device: str) -> None:
    """Raises `ConfigError` if a text names no kind of device."""
    known = re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,6})?", device) is not None
    need(known, "train.device", device, "auto, cpu, cuda, cuda:N, mps, xpu or xpu:N")


def resolve_device(device: str) -> str:
    """The torch device that `auto` (a CUDA device, else the CPU) or a bare `cuda` means here; a named one is checked.

    Raises:
        ConfigError: there is no such device here, or several ranks were given the same one.
    """
    check_device_name(device)
    ranks, (kind, _, index) = Ranks(), device.partition(":")
    if kind == "auto":
        kind = "cuda" if _devices("cuda") else "cpu"
    there = _devices(kind)
    if int(index or 0) >= there:
        found = [name for name in ("cuda", "xpu", "mps") if _devices(name)]
        raise ConfigError(
            f"train.device={device}, but torch found {there or 'no'} {kind} device{'s' * (there > 1)} here"
            f"{' (numbers begin at 0)' * bool(there)}. Available: {', '.join([*found, 'cpu'])}. Use train.device=auto "
            "(the default), or install a torch build for the devices of this machine."
        )
    if index and ranks.size > 1:
        raise ConfigError(
            f"train.device={device} with {ranks.size} ranks: each rank needs its own device. Use train.device={kind}."
        )
    if index:
        return device
    if kind not in ("cuda", "xpu"):
        return kind
    if ranks.local >= there:
        raise ConfigError(f"rank {ranks.local} of this machine has no device: torch found {there} of {kind} here.")
    own = _own_gpu(there) if kind == "cuda" and ranks.size == 1 else ranks.local
    return f"{kind}:{own}"


def check_threads(threads: int) -> None:
    """Raises `ConfigError` if this machine has fewer cores than the requested threads."""
    if threads > (cores := os.cpu_count() or threads):
        raise ConfigError(
            f"train.threads={threads}, but this machine has {cores} cores: more threads than cores only slow each "
            f"other down. Allowed here: 1 to {cores}."
        )


def _devices(kind: str) -> int:
    """How many devices of this kind torch can use here."""
    import torch

    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return module.device_count() if module.is_available() else 0


def take(device: str) -> None:
    """Makes `device` this process's own: what libraries use where none is named."""
    import torch

    if (kind := device.partition(":")[0]) in ("cuda", "xpu"):
        getattr(torch, kind).set_device(device)


def gpus() -> int:
    """NVIDIA GPUs that this process may use, counted without loading torch."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("torch").endswith("+cpu"):
            return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v and v != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def gpu_name() -> str | None:
    """The name of this machine's NVIDIA GPUs as their driver gives it, without torch; None where none says it."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            if said := re.search(r"^Model:\s*(\S.*)$", file.read_text(), re.MULTILINE):
                return said[1].strip()
    return None


def has_bf16() -> bool | None:
    """Whether this CPU computes in bf16, as Linux says it; None where it does not."""
    with contextlib.suppress(OSError):
        if said := re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(said[1].split())
    return None


@functools.cache
def _own_gpu(count: int) -> int:
    """One GPU a worker: the first that no other worker of this user holds here, until this process ends."""
    if count == 1:
        return 0
    from filelock import FileLock, Timeout

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for index in range(count):
        name = visible[index] if len(visible) == count else str(index)
        lock = FileLock(Path(tempfile.gettempdir()) / f"capacity_gap-{os.getuid()}-gpu-{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        return index
    return os.getpid() % count  # more workers than devices: they share


_held: list[Any] = []  # locks are released when they are forgotten


def device_name(device: str) -> str:
    """The name of the chip that `device` is, for the record."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on, and of Python."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the source tree, with `+` if it was changed since; None outside a git checkout."""
    if not IN_CHECKOUT:
        return None  # whatever repository holds the environment, it is not ours
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=ROOT, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")


def provenance(runtime: Runtime) -> dict[str, Any]:
    """What made a result: recorded beside it, never hashed into its name."""
    return {
        "device": device_name(runtime.device),
        "threads": runtime.threads,
        "ranks": runtime.ranks.size,
        "git_commit": git_commit(),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
