"""Two processes at one cell: the loss of one process with the same global batch."""

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from capacity_gap import records
from hydra_plugins.capacity_gap_launchers.slurm_launcher import SlurmLauncher
from tests.conftest import ROOT, run_py

# A gentle learning rate: at the pico recipe's, training amplifies the last bit of a sum to 1e-2 within forty steps.
RATES = ["train.learning_rate=1e-3", "family.pretrain.learning_rate=1e-3"]
CELL = ["student=40k", "teacher=55k", "train.batch_size=5", "family.pretrain.batch_size=3", *RATES]


def torchrun(*arguments):
    """Two ranks, started as a Slurm job starts them."""
    return subprocess.Popen(
        [*SlurmLauncher(gpus=2)._torchrun, str(ROOT / "run.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def listening(process):
    """The addresses at which the ranks and what started them listen, as long as they run."""
    found = set()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            for each in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                found |= {c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        time.sleep(0.5)
    return found


def ended(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request):
    return f"train.precision={request.param}"


@pytest.fixture(scope="module")
def alone(tiny, precision, tmp_path_factory):
    store = tmp_path_factory.mktemp("alone")
    run_py(*tiny, *CELL, precision, f"store={store}")
    return records.read(store)[0]


def agrees(row, alone, within=1e-4):
    assert row["cell"] == alone["cell"], "the number of ranks is no part of an identity"
    assert row["ranks"] == 2
    assert alone["ranks"] == 1
    for name in ("student_loss", "teacher_loss", "init_loss", "train_ce", "train_kl"):
        assert row[name] == pytest.approx(alone[name], abs=within), name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_ranks_agree_with_one_process(tiny, tmp_path, precision, alone, sharding):
    """In bf16 sums in another order round otherwise."""
    given = [*tiny, *CELL, precision, f"train.sharding={sharding}", "train.micro_batch_size=1"]
    process = torchrun(*given, f"store={tmp_path}")
    heard = listening(process)
    ended(process)
    assert heard, "ranks meet somewhere"
    assert all(ipaddress.ip_address(where).is_loopback for where in heard), "no other machine can reach them"
    (row,) = records.read(tmp_path)
    agrees(row, alone, 1e-4 if precision.endswith("fp32") else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_ranks_stop_and_go_on(tiny, tmp_path, sharding):
    """As before a time-out: Slurm warns every process of the job, then submitit asks those that work to end."""
    given = [*tiny, *CELL, f"store={tmp_path}", "data=25k", "epochs=2", f"train.sharding={sharding}"]
    first = torchrun(*given)
    while not list((tmp_path / ".work").glob("distil-*/*/progress.json")):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    ranks = psutil.Process(first.pid).children(recursive=True)
    for process in (first, *ranks):
        process.send_signal(signal.SIGUSR2)
    assert len(ranks) >= 2
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode > 0, "torchrun ended when its ranks had, not by the warning"
    left = list((tmp_path / ".work").glob("distil-*/*/checkpoint/step-*"))
    assert len(left) == 1
    ended(torchrun(*given))
    (row,) = records.read(tmp_path)
    run_py(*tiny, *CELL, f"store={tmp_path}/alone", "data=25k", "epochs=2")
    assert row["student_loss"] == pytest.approx(records.read(tmp_path / "alone")[0]["student_loss"], abs=1e-4)


RANK = """
    import errno, sys
    from capacity_gap.runtime.process import Runtime
    from capacity_gap.settings.errors import StageError
    from capacity_gap.store.stage import Stage, Store

    def train(run):
        run.runtime.ranks.any(False)  # a step of all ranks
        if run.runtime.ranks.leads:  # it alone writes the checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        run.runtime.ranks.any(False)  # the next step
        print("the other rank came", flush=True)

    stage, runtime = Stage("s", 1, {}, {}, train, collective=True), Runtime()
    store, ranks = Store(sys.argv[1]), runtime.ranks
    if ranks.leads:
        try:
            store.compute(stage, runtime)
        except StageError as error:
            print(error, flush=True)
            status = 2
        finally:
            ranks.tell(None)
            ranks.part()
        sys.exit(status)
    store.follow({stage.key: stage}, runtime)
"""


def test_a_disk_that_is_full_under_the_first_rank_alone_ends_both(tmp_path):
    """The other one waits in the next step, where no word reaches it: it is not waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANK), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **world, "RANK": str(n), "LOCAL_RANK": str(n)},
        )
        for n in range(2)
    ]
    try:
        told = [rank.communicate(timeout=90)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 2, told[0]
    assert "the disk is full: stage s/" in told[0]
    assert ranks[1].returncode != 0
    assert "the other rank came" not in told[1]
