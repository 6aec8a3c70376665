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

from capacity_gap.runtime.process import ENDING, PARENT, STOP_FILE, Interrupted, ignores

GRACE_S = 25.0  # for checkpoints; who is still at work then is killed, so that all has ended within half a minute
TRACKERS = ("resource_tracker", "resource_sharer")  # helpers of multiprocessing, which end with their parent

Launch = Callable[..., Sequence[Any]]


class Asked:
    """Whether a grid was asked to end, by which signal, and whether its workers are to be told through a file."""

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.number = 0
        self.in_pool = False
        self.pools = 0  # that were started

    def __call__(self, number: int, _frame: Any) -> None:
        """The signal handler. Inside joblib the first signal raises nothing; a second one does."""
        again, self.number = bool(self.number), self.number or number
        if again or not self.in_pool:
            raise Interrupted(number)
        self.stop_file.touch()
        # A worker that never returns would keep joblib waiting for ever.
        watchdog = threading.Timer(GRACE_S, kill_children)
        watchdog.daemon = True
        watchdog.start()

    def telling(self, launch: Launch) -> Launch:
        """A launcher of a pool in this machine: its workers are told, and it is waited for."""

        def launch_all(jobs: Sequence[Any], initial_job_idx: int) -> Sequence[Any]:
            os.environ[STOP_FILE] = str(self.stop_file)  # only workers of a pool may ignore signals
            self.in_pool = True
            self.pools += 1
            try:
                return launch(UntilAsked(jobs, self), initial_job_idx=initial_job_idx)
            finally:
                self.in_pool = False
                if self.number:
                    raise Interrupted(self.number)

        return launch_all


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
def noting_signals() -> Iterator[Callable[[], None]]:
    """For libraries that swallow what a signal handler raises, and set handlers of their own.

    Gives a function, to be called now and then, that raises `Interrupted` once the process was asked to end.
    """
    asked: list[int] = []
    before = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in ENDING if not ignores(n)}

    def check() -> None:
        if asked:
            raise Interrupted(asked[0])

    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[Any]:
    import psutil

    def helps(child: Any) -> bool:
        with contextlib.suppress(psutil.Error):
            return any(name in " ".join(child.cmdline()) for name in TRACKERS)
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
