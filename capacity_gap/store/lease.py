"""Who computes a stage: a lease with a heartbeat, judged by the observer's own clock.

Stores live on NFS, where clocks disagree and file locks come and go; so the lease holds an owner and a counter, and an
observer takes over when the counter has not moved for `PATIENCE_S` of the observer's time. A lease only saves work:
if two processes ever hold one stage, both compute equal results and the first rename wins.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from capacity_gap.settings.errors import Busy

BEAT_S = 5.0
PATIENCE_S = 40.0  # eight missed beats
POLL_S = 0.5


class Lease:
    """Held while a stage is computed. On entry either `owned` is true, or `done()` has become true while waiting.

    With `waits=False` a stage that another process computes raises `Busy`: a job that holds a GPU must not idle.
    """

    def __init__(self, place: Path, done: Callable[[], bool], *, waits: bool = True, needs: Sequence[str] = ()) -> None:
        self.file = place / "lease.json"
        self.done = done
        self.waits = waits
        self.needs = list(needs)  # keys of the stages that the work reads, which nobody may delete meanwhile
        self.owner = f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.owned = False
        self._lost = False
        self._counter = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        while not self.done():
            if self._acquire():
                # The last owner may have finished between our look and the lease.
                self.owned = not self.done()
                break
            self._wait_for_owner()
        if self.owned:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self.give_back()

    def take_if_free(self) -> bool:
        """Takes the lease without waiting; whether it was free, or its owner known to be dead."""
        if held_elsewhere(self.file.parent):
            return False
        if dead := _read(self.file):
            self._evict(dead)
        return self._acquire()

    def give_back(self) -> None:
        """Frees the lease, and removes its folder if nothing else is in there."""
        if self._holder() == self.owner:
            self.file.unlink(missing_ok=True)
        if self.owned:
            with contextlib.suppress(OSError):
                self.file.parent.rmdir()  # unless somebody's checkpoints are there

    def is_lost(self) -> bool:
        """Whether another process has taken over, because this one was stopped and missed its heartbeats."""
        return self._lost

    def _acquire(self) -> bool:
        """Creates the lease file if there is none: the one step that only one process can win."""
        beside = self.file.with_name(f".lease-{self.owner}")
        while True:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(beside)
                os.link(beside, self.file)  # atomic on local disks and NFS alike, unlike O_EXCL on old NFS
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:
                continue  # the last owner has just removed the folder
            finally:
                beside.unlink(missing_ok=True)

    def _wait_for_owner(self) -> None:
        """Returns when the stage is done, the lease is free, or its owner is dead and the lease was removed.

        Raises:
            Busy: its owner is alive, and this lease was told not to wait.
        """
        pulse = Pulse(self.file.parent)
        while not self.done():
            state = pulse.state()
            if state == "free":
                return
            if state == "dead":
                self._evict(pulse.seen or {})
                return
            if state == "alive" and not self.waits:
                raise Busy(f"{self.file.parent.name} is being computed by {self._holder()}")
            time.sleep(POLL_S)

    def _evict(self, dead: dict) -> None:
        """Removes the lease of a dead owner; a rename first, so that of several observers one succeeds."""
        aside = self.file.with_name(f".evicted-{self.owner}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.file, aside)
            if (_read(aside) or {}).get("owner") != dead.get("owner"):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.file)  # a new owner came in between: give it back
            aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._counter += 1
            with contextlib.suppress(OSError):
                holder = self._holder()
                # None: the lease is being moved aside or was removed, and nobody has taken it yet.
                self._lost = holder not in (None, self.owner)
                if holder == self.owner:
                    beside = self.file.with_name(f".lease-{self.owner}")
                    self._write(beside)
                    os.replace(beside, self.file)

    def _write(self, file: Path) -> None:
        lease = {"owner": self.owner, "counter": self._counter, "boot": _boot_id(), "pid": os.getpid()}
        file.write_text(json.dumps({**lease, "needs": self.needs}))

    def _holder(self) -> str | None:
        return (_read(self.file) or {}).get("owner")


class Pulse:
    """Somebody else's lease, watched by this process's own clock."""

    def __init__(self, place: Path) -> None:
        self.file = place / "lease.json"
        self.seen = _read(self.file)
        self.since = time.monotonic()
        self.beaten = False

    def state(self) -> str:
        """`free`, `dead`, `alive` (its counter has moved since we look), or `silent` (too early to say)."""
        now = _read(self.file)
        if now is None:
            return "free"
        if now != self.seen:
            self.beaten = self.beaten or self.seen is not None
            self.seen, self.since = now, time.monotonic()
        if time.monotonic() - self.since > PATIENCE_S or _dead_here(now):
            return "dead"
        return "alive" if self.beaten else "silent"


def held_elsewhere(place: Path) -> bool:
    """Whether a live process may be at work in `place`: its lease is there, and its owner not known to be dead."""
    lease = _read(place / "lease.json")
    return lease is not None and not _dead_here(lease)


def needs_of(place: Path) -> list[str]:
    """The stages that the process at work in `place` reads."""
    return list((_read(place / "lease.json") or {}).get("needs", ()))


@contextlib.contextmanager
def taking(place: Path) -> Iterator[bool]:
    """Takes the lease of `place` for a moment, unless a process that may be alive has it; yields success."""
    lease = Lease(place, lambda: False)
    lease.owned = lease.take_if_free()
    try:
        yield lease.owned
    finally:
        lease.give_back()


def lives_here(owner: str) -> bool:
    """Whether another process, after which an owner is named, runs on this machine or is stopped there."""
    host, _, rest = owner.rpartition("-")[0].rpartition("-")
    return host == _host() and rest.isdigit() and int(rest) != os.getpid() and _runs(int(rest))


def _read(file: Path) -> dict | None:
    """A lease: None where there is none, nothing known where a crash of its machine left it torn."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _runs(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    """Names this running machine: a process id means something only beside it."""
    try:
        # Containers share the boot id of their machine but number processes apart, hence the PID namespace.
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _dead_here(lease: dict) -> bool:
    """Whether the owner ran on this very machine and is gone, which needs no patience to know."""
    if lease.get("boot") != _boot_id():
        return False
    return str(lease.get("pid")).isdigit() and not _runs(int(lease["pid"]))
