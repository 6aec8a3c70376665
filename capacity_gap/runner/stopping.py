"""A grid that is asked to end (SIGTERM, SIGINT, SIGHUP): its workers write checkpoints and end before it does.

joblib kills its workers as soon as an exception passes through it, and a worker that ends by itself breaks the pool,
which kills the others. So nothing is raised inside joblib and no worker is sent a signal: the grid makes a file that
every worker looks for, a worker that sees it stops as if it had been asked itself and returns, no further job is
handed out, and the grid ends once joblib has all its answers. Other launchers are interrupted where they wait.
"""

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.runtime.process import ENDING, MIND_S, PARENT, STOP_FILE, Interrupted, ignores

GRACE_S = 25.0  # for checkpoints; who is still at work then is killed, so that all has ended within half a minute
# Helpers of multiprocessing and of W&B, which end with their parent. Those of W&B still send what they were told.
HELPERS = ("resource_tracker", "resource_sharer", f"{os.sep}wandb{os.sep}bin{os.sep}")

Launch = Callable[..., Sequence[Any]]


class Asked:
    """Whether a grid was asked to end, by which signal, and whether its workers are notified through a file."""

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.number = 0
        self.in_pool = False
        self.pools = 0  # that were started

    def __call__(self, number: int, _frame: Any) -> None:
        """The signal handler. Inside joblib the first signal raises nothing; a second one does.

        It starts no thread and takes no lock: the code that it interrupts may hold it.
        """
        again, self.number = bool(self.number), self.number or number
        if again or not self.in_pool:
            raise Interrupted(number)
        self.stop_file.touch()

    def telling(self, launch: Launch) -> Launch:
        """A launcher of a local pool: its workers are notified through a file, and the grid waits for them."""

        def launch_all(jobs: Sequence[Any], initial_job_idx: int) -> Sequence[Any]:
            os.environ[STOP_FILE] = str(self.stop_file)  # only workers of a pool may ignore signals
            self.in_pool = True
            self.pools += 1
            ended = threading.Event()
            threading.Thread(target=self._limit_grace, args=(ended,), daemon=True).start()
            try:
                return launch(UntilAsked(jobs, self), initial_job_idx=initial_job_idx)
            finally:
                self.in_pool = False
                ended.set()
                if self.number:
                    raise Interrupted(self.number)

        return launch_all

    def _limit_grace(self, ended: threading.Event) -> None:
        """Kills a worker that never returns, which would keep joblib waiting for ever."""
        while not self.number:
            if ended.wait(MIND_S):
                return
        if not ended.wait(GRACE_S):
            kill_children()


class Noted:
    """The signals that have come. Called, it raises `Interrupted` if one has."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self) -> None:
        """Raises once the process was asked to end."""
        if self.numbers:
            raise Interrupted(self.numbers[0])

    @property
    def again(self) -> bool:
        """Whether there was more than one request to stop: a second one does not wait."""
        return len(self.numbers) > 1


class UntilAsked(list):
    """Jobs that are handed out one by one, and no more once the grid was asked to end."""

    def __init__(self, jobs: Sequence[Any], asked: Asked) -> None:
        super().__init__(jobs)
        self.asked = asked

    def __iter__(self) -> Iterator[Any]:
        for job in super().__iter__():
            if self.asked.number:
                return
            yield job


@contextlib.contextmanager
def ending_workers() -> Iterator[Asked]:
    """A grid that is asked to end takes its workers along: they write checkpoints first."""
    with tempfile.TemporaryDirectory(prefix="capacity_gap-") as folder:
        asked = Asked(Path(folder) / "stop")
        os.environ[PARENT] = str(os.getpid())
        before = {n: signal.signal(n, asked) for n in ENDING if not ignores(n)}
        try:
            yield asked
        except (Interrupted, KeyboardInterrupt):
            if asked.pools:
                kill_children()  # they have returned what they had, or were given time enough
            else:
                end_children()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.environ.pop(STOP_FILE, None)


@contextlib.contextmanager
def noting_signals() -> Iterator[Noted]:
    """For libraries that swallow what a signal handler raises, and set handlers of their own.

    What is given is to be called now and then, and raises `Interrupted` once the process was asked to end.
    """
    noted = Noted()
    before = {n: signal.signal(n, lambda number, _: noted.numbers.append(number)) for n in ENDING if not ignores(n)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def holding_signals() -> Iterator[Noted]:
    """The same for a short command that must come to its end: Ctrl-C reaches neither this process nor the command."""
    with noting_signals() as noted:
        held = signal.pthread_sigmask(signal.SIG_BLOCK, [])  # what is held is handed on to the command
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            yield noted
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _children() -> list[Any]:
    import psutil

    def helps(child: Any) -> bool:
        with contextlib.suppress(psutil.Error):
            return any(name in " ".join(child.cmdline()) for name in HELPERS)
        return True

    return [child for child in psutil.Process().children(recursive=True) if not helps(child)]


def end_children() -> None:
    """Asks what still runs below this process to end, waits, and kills the rest."""
    import psutil

    children = _children()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=GRACE_S)
    _kill(alive)


def kill_children() -> None:
    """Kills what runs below this process."""
    _kill(_children())


def _kill(children: Sequence[Any]) -> None:
    import psutil

    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
