"""`python -m capacity_gap.runtime.one_machine 4 run.py …`: four ranks of this machine, which listen on loopback alone.

It is `torchrun --nproc-per-node=4 run.py …`, but for where processes meet: torchrun's own server listens on every
network. Here its meeting place is a file, and the ranks' is a socket of loopback (`ranks.py`).
"""

import os
import sys
import tempfile
from pathlib import Path

from capacity_gap.runtime.ranks import ALONE, LOOPBACK


def command(processes: str, program: list[str]) -> list[str]:
    """torchrun's command line for so many ranks of a program."""
    meeting = Path(tempfile.mkdtemp(prefix="capacity_gap-ranks-")) / "meeting"
    where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-conf=store_type=file"]
    ours = [f"--local-addr={LOOPBACK}", "--nnodes=1", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", "torch.distributed.run", *where, *ours, *program]


def main() -> None:
    """Becomes torchrun."""
    if len(sys.argv) < 3:
        raise SystemExit("error: give the number of ranks and the program to run, such as 4 run.py student=0.5b.")
    os.environ |= {ALONE: "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    words = command(sys.argv[1], sys.argv[2:])
    os.execv(words[0], words)


if __name__ == "__main__":
    main()
