"""Several ranks at one cell, as `torchrun` or Slurm starts them.

Rank 0 leads: it alone holds leases, writes to the store and prints. The others follow: they learn which
training stage comes next, and take their share of every step. Everything else they sit out, however long it takes.
"""

import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

from capacity_gap.settings.errors import StageError, first_line

T = TypeVar("T")
ALONE = "CAPACITY_GAP_ONE_MACHINE"  # set by `one_machine.py`: all ranks are on this machine
LOOPBACK = "127.0.0.1"
MEETING = datetime.timedelta(minutes=10)  # until all ranks have come
PARTING = datetime.timedelta(minutes=1)
PATIENCE = datetime.timedelta(days=14)  # of a rank that has nothing to do but wait


class Ranks:
    """The processes that `torchrun` started together; one alone outside it."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size)))
        self.deserted = False

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @cached_property
    def _group(self) -> Any:
        """A CPU process group for messages, independent of the device of tensors."""
        import torch.distributed as dist

        if not dist.is_initialized():
            import torch

            given = self._on_one_machine() if os.environ.get(ALONE) else {}
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE, **given)
        return dist.new_group(backend="gloo", timeout=PATIENCE)

    def _on_one_machine(self) -> dict[str, Any]:
        """Where ranks of one machine meet: on its loopback, where no other machine can join or listen.

        torch's own server would listen on every network, so rank 0 hands it a socket.
        """
        import torch.distributed as dist

        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
        port, more = int(os.environ["MASTER_PORT"]), dict[str, Any]()
        if self.leads:
            listening = socket.create_server((LOOPBACK, port))
            more["master_listen_fd"] = listening.detach()
        store = dist.TCPStore(LOOPBACK, port, self.size, self.leads, timeout=MEETING, **more)
        return {"store": store, "rank": self.rank, "world_size": self.size}

    def tell(self, message: Any = None) -> Any:
        """Returns on every rank what rank 0 has given; called by all of them."""
        if self.size == 1 or self.deserted:
            return message
        import torch.distributed as dist

        words = [message]
        dist.broadcast_object_list(words, src=0, group=self._group)
        return words[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; called by all of them."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group)
        return bool(said)

    def in_turns(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by one rank of each machine after the other; called by all of them.

        Raises:
            StageError: it failed on some rank. All raise it, so that none waits for another.
        """
        found: list[T] = []
        failed: Exception | None = None
        for turn in range(self.local_size):
            if turn == self.local:
                try:
                    found.append(work())
                except Exception as error:
                    failed = error
            self.any(False)
        if not self.any(failed is not None):
            return found[0]
        if isinstance(failed, StageError):
            raise failed
        said = f"{type(failed).__name__}: {first_line(failed)}" if failed else "see the message of the other rank"
        raise StageError(f"rank {self.rank} of {self.size} cannot go on: {said}") from failed

    def desert(self) -> None:
        """Marks that this rank alone has failed: the others are inside a step and cannot be reached.

        From here on no message is sent or waited for. This process ends, and then `torchrun` ends the others.
        """
        self.deserted = self.size > 1

    def part(self) -> None:
        """Ends the groups, all ranks together: one that leaves while their threads run is aborted.

        Ranks that do not come within a minute have failed on their own; then `torchrun` ends everything. A rank that
        has failed alone waits for none, and breaks its connections: left open at the end of the process, gloo's threads
        now and then abort it, and its exit status is lost.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        if not self.deserted:
            with contextlib.suppress(RuntimeError):
                dist.monitored_barrier(group=self._group, timeout=PARTING)
        elif not dist.is_initialized() or dist.get_backend() != "gloo":
            return  # NCCL's may hang, and aborts nothing
        dist.destroy_process_group()
        self.__dict__.pop("_group", None)
