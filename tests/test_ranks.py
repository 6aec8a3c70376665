"""Two processes at one cell: the loss of one process with the same global batch."""

import os
import signal
import subprocess
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
    ended(torchrun(*given, f"store={tmp_path}"))
    (row,) = records.read(tmp_path)
    agrees(row, alone, 1e-4 if precision.endswith("fp32") else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_ranks_stop_and_go_on(tiny, tmp_path, sharding):
    """As before a time-out: Slurm warns every process of the job, then submitit asks those that work to end."""
    given = [*tiny, *CELL, f"store={tmp_path}", "data=60k", "epochs=2", f"train.sharding={sharding}"]
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
    run_py(*tiny, *CELL, f"store={tmp_path}/alone", "data=60k", "epochs=2")
    assert row["student_loss"] == pytest.approx(records.read(tmp_path / "alone")[0]["student_loss"], abs=1e-4)
