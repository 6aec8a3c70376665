"""On a CUDA device: what the CPU computes, and what only a GPU has. Skipped elsewhere; `pytest -m gpu` runs them."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch

from capacity_gap import records
from capacity_gap.distill import distill_loss, divergences, fused
from capacity_gap.models.accounting import peak_flops
from capacity_gap.models.axes import dims
from capacity_gap.pruning import choose_shape, expressive_scores, prune
from tests.conftest import ROOT, compose, ran, run_py
from tests.small_models import SMALL, small_model
from tests.test_ranks import RATES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
CELL = ["student=40k", "teacher=55k", *RATES]


@pytest.fixture(scope="module")
def on_cpu(tiny, tmp_path_factory):
    return ran(compose([*tiny, *CELL, "train.device=cpu", f"store={tmp_path_factory.mktemp('cpu')}"]))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize(
    ("given", "within"),
    [
        ([], 1e-3),
        (["distill.signal=topk"], None),
        (["distill.signal=sampled"], None),
        (["train.precision=bf16"], 0.02),
        (["train.compile=true"], 1e-3),
        (["train.activation_checkpointing=true"], 1e-3),
        (["train.micro_batch_size=2"], 1e-3),
        (["family.placement=devices"], 1e-3),
        (["prune.method=movement", "prune.layers=loss_increase", "prune.depth=3"], None),
    ],
    ids=lambda given: (given[-1] if given else "plain") if isinstance(given, list) else "",
)
def test_a_cell_on_the_gpu_agrees_with_the_cpu(tiny, on_cpu, store, given, within):
    row = ran(compose([*tiny, *CELL, *given, f"store={store}"]))
    assert row["status"] == "done"
    assert row["device"] == torch.cuda.get_device_name()
    assert row["peak_memory_bytes"] > 0
    assert (row["mfu"] is not None) == (peak_flops(row["device"], row["precision"]) is not None)
    if within is not None:
        for name in ("student_loss", "teacher_loss", "init_loss"):
            assert row[name] == pytest.approx(on_cpu[name], abs=within), name
    if within == 1e-3 and not any("compile" in word for word in given):
        assert row["cell"] == on_cpu["cell"], "a device is no part of an identity"


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_one_rank_over_nccl_agrees(tiny, on_cpu, tmp_path, sharding):
    words = [sys.executable, "-m", "capacity_gap.runtime.one_machine", "1", str(ROOT / "run.py"), *tiny, *CELL]
    done = subprocess.run(
        [*words, f"train.sharding={sharding}", f"store={tmp_path}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert records.read(tmp_path)[0]["student_loss"] == pytest.approx(on_cpu["student_loss"], abs=1e-3)


def test_a_cell_that_is_stopped_goes_on(tiny, tmp_path):
    words = [*tiny, *CELL, "data=140k", "epochs=2", "family.teacher_data=30k", f"store={tmp_path}"]
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = ""
    for line in started.stdout:
        seen += line
        if "distil" in line:
            os.kill(started.pid, signal.SIGTERM)
            break
    seen += started.communicate(timeout=120)[0]
    again = run_py(*words)
    assert records.read(tmp_path)[0]["status"] == "done", seen + again.stdout


def test_the_plan_counts_with_this_gpu(tiny, tmp_path):
    out = run_py(*tiny, *CELL, "plan=true", f"store={tmp_path}").stdout
    assert torch.cuda.get_device_name().split()[1].casefold() in out.casefold(), out


@pytest.mark.parametrize("loss", sorted(divergences.LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_equal_those_in_double_precision(monkeypatch, loss, dtype):
    monkeypatch.setattr(fused, "installed", lambda: False)
    _agrees(loss, dtype, 0.5)


@pytest.mark.parametrize("w", [0.0, 0.4, 1.0])
def test_liger_agrees(w):
    pytest.importorskip("liger_kernel")
    _agrees("forward_kl", torch.float32, w)


def _agrees(loss, dtype, w, tokens=300, vocabulary=5003, width=96):
    g = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(2, tokens, width, generator=g, dtype=torch.float64) for _ in range(2))
    weight, theirs = (torch.randn(vocabulary, width, generator=g, dtype=torch.float64) * 0.1 for _ in range(2))
    labels = torch.randint(0, vocabulary, (2, tokens), generator=g)
    labels[:, :7] = -100
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        h, t, u, v = (x.detach().to(device, kind) for x in (hidden, taught, weight, theirs))
        h.requires_grad_(), u.requires_grad_()
        value, parts = distill_loss(h, u, labels.to(device), teacher_hidden=t, teacher_weight=v, loss=loss, kd_weight=w)
        grads = torch.autograd.grad(value, (h, u))
        found.append((value.detach(), *grads, *(parts[k].detach() for k in ("ce", "kl") if k in parts)))
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for exact, here in zip(*found, strict=True):
        error = (here.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-12)
        assert float(error) < bound


@pytest.mark.parametrize("name", sorted(SMALL))
def test_scores_and_students_are_those_of_the_cpu(name):
    model = small_model(name).eval()
    g = torch.Generator().manual_seed(0)
    batches = [torch.randint(2, 40, (2, 8), generator=g) for _ in range(2)]
    here = expressive_scores(copy.deepcopy(model).cuda(), [b.cuda() for b in batches])
    there = expressive_scores(model, batches)
    for a, b in zip((here.heads, here.neurons, here.hidden), (there.heads, there.neurons, there.hidden), strict=True):
        torch.testing.assert_close(torch.as_tensor(a).cpu(), torch.as_tensor(b), rtol=1e-4, atol=1e-7)
    kept = dims(model.config.to_dict())
    fixed = f"{kept.layers}x{kept.hidden // 2}x{kept.kv_heads // 2 * kept.heads // kept.kv_heads}x{kept.neurons // 2}"
    shape = choose_shape(model.config, 0, "fixed", fixed=fixed)
    students = [prune(m, s, shape) for m, s in ((copy.deepcopy(model).cuda(), here), (model, there))]
    for a, b in zip(*(s.state_dict().values() for s in students), strict=True):
        torch.testing.assert_close(a.cpu(), b)
