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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from capacity_gap.settings.errors import Busy
from capacity_gap.store.files import tell

BEAT_S = 5.0
PATIENCE_S = 40.0  # eight missed beats
POLL_S = 0.5
LEASE = "lease.json"


class Lease:
    """Held while a stage is computed. On entry either `owned` is true, or `done()` has become true while waiting.

    With `waits=False` a stage that another process computes raises `Busy`: a job that holds a GPU must not idle.
    """

    def __init__(self, place: Path, done: Callable[[], bool], *, waits: bool = True, needs: Sequence[str] = ()) -> None:
        self.file = place / LEASE
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

    def take_unless_alive(self, known_dead: str | None = None) -> bool:
        """Takes the lease if it is free or its owner dead, which takes `PATIENCE_S` to know of another machine's."""
        place = self.file.parent
        dead = _read(self.file)
        if dead is not None:
            if owner_of(place) != known_dead and at_work([place]):
                return False
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

    def is_taken(self) -> bool:
        """The same, looked up now: a process that was just resumed may not have seen it yet."""
        return self._lost or self._holder() not in (None, self.owner)

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
        while not self._is_done():
            state = pulse.state()
            if state == "free":
                return
            if state == "dead":
                self._evict(pulse.seen or {})
                return
            if state == "alive" and not self.waits:
                raise Busy(f"{self.file.parent.name} is being computed by {self.holder()}")
            time.sleep(POLL_S)

    def _is_done(self) -> bool:
        """A file server that does not answer for a moment (ESTALE, EIO) costs a look and not the waiting process."""
        try:
            return self.done()
        except OSError:
            return False

    def _evict(self, dead: dict) -> None:
        """Removes the lease of a dead owner; a rename first, so that of several observers one succeeds."""
        aside = self.file.with_name(f".evicted-{self.owner}")
        with contextlib.suppress(OSError):
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

    def holder(self) -> str:
        """Who has the lease, in words."""
        return self._holder() or "an unknown owner"

    def _holder(self) -> str | None:
        return (_read(self.file) or {}).get("owner")


class Pulse:
    """Another process's lease, watched by this process's own clock."""

    def __init__(self, place: Path) -> None:
        self.file = place / LEASE
        self.seen = _read(self.file)
        self.since = time.monotonic()
        self.beaten = False

    def state(self) -> str:
        """`free`, `dead`, `alive` (its counter has moved since we look), or `silent` (too early to say)."""
        now = _read(self.file)
        if now is None:
            return "free"
        if now and now != self.seen:  # one that cannot be read tells nothing
            self.beaten = self.beaten or bool(self.seen)
            self.seen, self.since = now, time.monotonic()
        if time.monotonic() - self.since > PATIENCE_S or _dead_here(now):
            return "dead"
        return "alive" if self.beaten else "silent"


def at_work(places: Iterable[Path]) -> dict[Path, str]:
    """Where a live process may be at work, and which one: those of this machine at once, others once they beat.

    Returns after `PATIENCE_S` at most: by then an owner elsewhere that has not beaten is dead.
    """
    leases = {place: lease for place in places if (lease := _read(place / LEASE)) is not None}
    alive = {place for place, lease in leases.items() if _alive_here(lease)}
    watched = {place: Pulse(place) for place in leases.keys() - alive}
    if watched:
        tell(f"waiting at most {PATIENCE_S:.0f} s for a heartbeat of {len(watched)} owners on other machines")
    while watched:
        states = {place: pulse.state() for place, pulse in watched.items()}
        alive |= {place for place, state in states.items() if state == "alive"}
        watched = {place: watched[place] for place, state in states.items() if state == "silent"}
        if watched:
            time.sleep(POLL_S)
    return {place: leases[place].get("owner", "an unknown owner") for place in alive}


def owner_of(place: Path) -> str | None:
    """Who has the lease of `place`; None where there is none, nothing where it cannot be read."""
    lease = _read(place / LEASE)
    return None if lease is None else str(lease.get("owner", ""))


def needs_of(place: Path) -> list[str]:
    """The stages that the process at work in `place` reads."""
    return list((_read(place / LEASE) or {}).get("needs", ()))


@contextlib.contextmanager
def taking(place: Path, *, dead: str | None = None) -> Iterator[str]:
    """Takes the lease of `place` for a moment; yields nothing, or who is at work there and will not be disturbed.

    `dead`: an owner that has been watched already.
    """
    lease = Lease(place, lambda: False)
    lease.owned = lease.take_unless_alive(dead)
    try:
        yield "" if lease.owned else f"{lease.holder()} is working on it ({lease.file})"
    finally:
        lease.give_back()


def lives_here(owner: str) -> bool:
    """Whether another process, after which an owner is named, runs on this machine or is stopped there."""
    host, _, rest = owner.rpartition("-")[0].rpartition("-")
    return host == _host() and rest.isdigit() and int(rest) != os.getpid() and _runs(int(rest))


def _read(file: Path) -> dict | None:
    """A lease: None where there is none, nothing known where it is torn or the file server does not give it."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
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
    return _is_from_here(lease) and not _runs(int(lease["pid"]))


def _alive_here(lease: dict) -> bool:
    """Whether the owner exists on this very machine, running or stopped."""
    return _is_from_here(lease) and _runs(int(lease["pid"]))


def _is_from_here(lease: dict) -> bool:
    return lease.get("boot") == _boot_id() and str(lease.get("pid")).isdigit()
