"""How a stage is run here and now: device, threads, progress, interruption. Nothing in this file changes a result."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capacity_gap.errors import ConfigError
from capacity_gap.ranks import Ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
ECHO_S = 10.0  # one request to stop reaches a rank several times: from Slurm, from submitit, from torchrun
PARENT = "CAPACITY_GAP_PARENT"  # process id of the grid that started this worker
TRAINERS = ("accelerate", "liger_kernel", "trl", "peft")
VERSIONED = ("capacity_gap", "torch", "transformers", "tokenizers", "numpy", *TRAINERS)


class Interrupted(BaseException):
    """The process was asked to end (SIGTERM, or Slurm's early warning): a checkpoint is written, then it goes."""


class Stop:
    """Whether the process was asked to end.

    No `threading.Event`: setting one takes a lock, and a signal that comes while the handler of another one holds it
    would wait for it for ever.
    """

    asked = False

    def set(self) -> None:
        """Asks."""
        self.asked = True

    def is_set(self) -> bool:
        """Whether somebody did."""
        return self.asked


@dataclass
class Progress:
    """A small file that says how far a running stage is, for whoever watches the store."""

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
    ranks: Ranks = field(default_factory=Ranks)
    stop: Stop = field(default_factory=Stop)
    progress: Progress | None = None

    @contextlib.contextmanager
    def following(self, stage: str, path: Path, cost: float) -> Iterator[None]:
        """Sets the process up for one stage and points `report` at its progress file."""
        import torch

        torch.set_num_threads(self.threads)
        self.progress = Progress(stage, path, cost)
        try:
            yield
        finally:
            self.progress = None

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Turns the first SIGTERM, SIGINT or USR2 (Slurm's early warning) into a checkpoint; a second one kills.

        Several ranks are stopped by programs, not by people: there a second one within `ECHO_S` is the first again.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers; whoever owns it decides
            return

        asked: dict[int, float] = {}

        def stop(number: int, _frame: Any) -> None:
            now = time.monotonic()
            if number not in asked:
                self.stop.set()
                asked[number] = now
                if self.ranks.size == 1:
                    signal.signal(number, before[signal.Signals(number)])
            elif now - asked[number] > ECHO_S:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)

        before = {number: signal.signal(number, stop) for number in STOPPING}
        ended = threading.Event()
        if os.environ.get(PARENT) == str(os.getppid()):
            threading.Thread(target=self._mind_parent, args=(os.getppid(), ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _mind_parent(self, parent: int, ended: threading.Event) -> None:
        """A worker whose grid was killed stops as if it had been asked to: nobody waits for it any more."""
        while not ended.wait(1.0):
            if os.getppid() != parent:
                self.stop.set()
                return

    def check(self) -> None:
        """Raises `Interrupted` if the process was asked to stop."""
        if self.stop.is_set():
            raise Interrupted

    def report(self, done: float, total: float, unit: str = "tokens", **extra: Any) -> None:
        """Says how far the running stage is."""
        if self.progress:
            self.progress.update(done, total, unit, **extra)


def resolve_device(device: str) -> str:
    """The torch device that `auto` (a CUDA device, else the CPU) or a bare `cuda` means here; a named one is checked.

    Raises:
        ConfigError: there is no such device here, or several ranks were given the same one.
    """
    ranks, (kind, _, index) = Ranks(), device.partition(":")
    if kind == "auto":
        kind = "cuda" if _devices("cuda") else "cpu"
    there = _devices(kind)
    if int(index or 0) >= there:
        found = [name for name in ("cuda", "xpu", "mps") if _devices(name)]
        raise ConfigError(
            f"train.device={device}, but torch finds {there or 'no'} {kind} device{'s' * (there > 1)} here"
            f"{' (numbers begin at 0)' * bool(there)}. There is: {', '.join([*found, 'cpu'])}. Use train.device=auto "
            "(the default), or install a torch that was built for the devices of this machine."
        )
    if index and ranks.size > 1:
        raise ConfigError(
            f"train.device={device} with {ranks.size} ranks: each needs a device of its own. Use train.device={kind}."
        )
    if index:
        return device
    if kind not in ("cuda", "xpu"):
        return kind
    if ranks.local >= there:
        raise ConfigError(f"rank {ranks.local} of this machine has no device: torch finds {there} of {kind} here.")
    own = _own_gpu(there) if kind == "cuda" and ranks.size == 1 else ranks.local
    return f"{kind}:{own}"


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
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, stderr=subprocess.DEVNULL, text=True)
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, text=True)
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
