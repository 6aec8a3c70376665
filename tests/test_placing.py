"""Teachers larger than one device: the numbers of a whole one, and what each rank holds of it."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import accelerate
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.models.loading import hidden_states, load_model, output_weight, save_model
from capacity_gap.models.placing import load_teacher, spread
from capacity_gap.pruning import expressive_scores
from capacity_gap.runner.preflight import check_budgets
from capacity_gap.runtime.process import Interrupted, Runtime
from capacity_gap.settings.errors import ConfigError, StageError
from capacity_gap.store.stage import Store
from tests.conftest import ROOT, compose, run_py
from tests.small_models import TOKENS, small_model
from tests.test_ranks import CELL, agrees, ended, torchrun

TWO = [sys.executable, "-m", "capacity_gap.runtime.one_machine", "2"]
MEASURE = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from capacity_gap.models.loading import hidden_states, load_model, output_weight
from capacity_gap.models.placing import gathered_states, load_teacher
from capacity_gap.pruning.methods import SCORES
from capacity_gap.runtime.process import Runtime
from tests.small_models import TOKENS

torch.set_num_threads(1)
runtime = Runtime(placement="ranks")
runtime.ranks.tell(None)
with runtime.working(collective=True):
    teacher = load_teacher(Path(sys.argv[1]), runtime)
whole = load_model(Path(sys.argv[1]))
held = {"bytes": sum(p.to_local().nbytes for p in teacher.parameters())}
layers = [m for m in teacher.modules() if type(m).__name__.removeprefix("FSDP") in teacher._no_split_modules]
gathered = lambda layer: not isinstance(next(layer.parameters()), DTensor)
at_once = []
for layer in layers:
    layer.self_attn.register_forward_hook(lambda *_: at_once.append(sum(map(gathered, layers))))
with torch.no_grad():
    ours, theirs = hidden_states(teacher, TOKENS[0]), hidden_states(whole, TOKENS[0])
    split = gathered_states(teacher, TOKENS[0])
held |= {"layers": len(layers), "at once": at_once, "after": sum(map(gathered, layers))}
held["all sharded"] = all(isinstance(p, DTensor) for p in teacher.parameters())
held["off"] = float(max((x - theirs).abs().max() for x in (ours, split)))
held["weight off"] = float((output_weight(teacher) - output_weight(whole)).abs().max())
for method in SCORES:
    if SCORES.entry(method).traits["spread"]:
        one, two = (SCORES[method](model, list(TOKENS)) for model in (teacher, whole))
        names = ("heads", "neurons", "hidden")
        held[method] = float(max((getattr(one, n) - getattr(two, n)).abs().max() for n in names))
held["grads"] = sum(p.grad is not None for p in teacher.parameters())
Path(f"{sys.argv[2]}/{runtime.ranks.rank}.json").write_text(json.dumps(held))
runtime.ranks.part()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama with biases", "opt"])
def test_each_rank_holds_half_of_a_teacher_and_gathers_a_layer_at_a_time(tmp_path, name):
    """The bytes of its own shards, not of a plan; of five rows one rank has three, so the halves differ a little."""
    model = small_model(name, num_hidden_layers=5).float()
    save_model(model, tmp_path / "teacher")
    (tmp_path / "measure.py").write_text(MEASURE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TWO, str(tmp_path / "measure.py"), str(tmp_path / "teacher"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "returned a view" not in done.stderr
    ranks = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    total = sum(p.nbytes for p in model.parameters())
    assert sum(r["bytes"] for r in ranks) == total
    for held in ranks:
        assert held["bytes"] == pytest.approx(total / 2, rel=0.02)
        assert (held["layers"], set(held["at once"]), held["after"]) == (5, {1}, 0)
        assert held["all sharded"]
        assert held["off"] < 1e-5
        assert held["weight off"] == 0
        assert held["grads"] == 0, "a model stays as it was"
        assert {m: held[m] for m in ("expressive", "taylor", "magnitude", "activation", "wanda")} == pytest.approx(
            dict.fromkeys(("expressive", "taylor", "magnitude", "activation", "wanda"), 0.0), abs=1e-5
        )


WAYS = {
    "online": ["train.sharding=fsdp", "prune.layers=loss_increase", "prune.depth=3"],
    "topk": ["train.sharding=fsdp", "distill.signal=topk", "distill.signal_size=8", "prune.method=wanda"],
    "sampled": ["family.placement=ranks", "distill.signal=sampled", "prune.method=taylor"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_teacher_teaches_and_is_scored_as_a_whole_one(tiny, tmp_path, way):
    """Two ranks and one process: the same cell, the same scores and cached targets, the same record to 1e-4."""
    given = [*tiny, *CELL, *WAYS[way], "evaluate.batch_size=5"]
    out = ended(torchrun(*given, f"store={tmp_path / 'ranks'}"))
    run_py(*given, f"store={tmp_path / 'alone'}")
    (row,), (alone,) = (records.read(tmp_path / kind) for kind in ("ranks", "alone"))
    agrees(row, alone)
    for file in (tmp_path / "alone").glob("scores/*/scores.safetensors"):
        ours = load_file(tmp_path / "ranks" / file.relative_to(tmp_path / "alone"))
        for key, value in load_file(file).items():
            torch.testing.assert_close(ours[key], value, atol=1e-4, rtol=1e-4)
    for file in (tmp_path / "alone").glob("signal/*/block-*.npy"):
        ours = np.load(tmp_path / "ranks" / file.relative_to(tmp_path / "alone"))
        close = np.isclose(ours.astype(float), np.load(file).astype(float), atol=1e-4)
        assert close.mean() > 0.999, "a draw between two tokens may fall to the other by the last bit"
    ranks = {p.parent.parent.name: json.loads(p.read_text())["ranks"] for p in tmp_path.glob("ranks/*/*/stage.json")}
    assert {"scores", "distil", "evaluate"} <= {kind for kind, n in ranks.items() if n == 2}, out


@pytest.mark.slow
def test_ranks_that_cache_a_teacher_stop_together_when_one_is_asked_to(tiny, tmp_path):
    given = [*tiny, *CELL, "train.sharding=fsdp", "distill.signal=topk", "data=40k", "evaluate.batch_size=4"]
    process = torchrun(*given, f"store={tmp_path}")
    while not list(tmp_path.glob(".work/signal-*/*/checkpoint/step-0/block-00001-entropy.npy")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[-1].terminate()
    process.communicate(timeout=120)
    assert process.returncode > 0
    assert len(list(tmp_path.glob(".work/signal-*/*/checkpoint/step-0/*entropy.npy"))) < 5, "it stopped on the way"
    ended(torchrun(*given, f"store={tmp_path}"))
    assert records.read(tmp_path)[0]["status"] == "done"


@pytest.fixture(scope="module")
def config():
    return compose(["student=40k", "teacher=55k", "distill.signal=topk"])


def cell(config, *given):
    """The cell with other settings: composing each takes longer than the rest."""
    for key, value in (each.split("=") for each in given):
        section, name = key.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return pipeline.resolve(config)


def test_where_a_teacher_lies_decides_no_digest(config):
    plain = cell(config)
    for given in ("family.placement=devices", "family.placement=ranks", "train.sharding=fsdp"):
        other = cell(config, given)
        assert other.record.digest == plain.record.digest
        assert other.description == plain.description


@pytest.mark.parametrize(
    ("given", "placement"),
    [
        ([], "one"),
        (["train.sharding=fsdp"], "ranks"),
        (["train.sharding=fsdp", "family.placement=one"], "one"),
        (["family.placement=devices"], "devices"),
        (["train.sharding=fsdp", "prune.method=movement"], "one"),
        (["train.sharding=fsdp", "prune.method=movement", "prune.init=random"], "ranks"),
    ],
)
def test_what_reads_a_teacher_is_for_all_ranks_where_it_is_sharded(config, given, placement):
    made = cell(config, *given)
    assert made.placement == placement
    readers = [made.scores, made.distilled.inputs["signal"], made.scored(made.teacher, made.teacher_shape)]
    assert {stage.collective for stage in readers} == {placement == "ranks"}
    assert made.distilled.collective


@pytest.mark.parametrize(
    "given",
    [
        ["family.placement=ranks", "prune.method=movement"],
        ["family.placement=devices", "prune.method=movement"],
    ],
)
def test_what_needs_a_whole_teacher_is_refused_before_compute(config, given):
    with pytest.raises(
        ConfigError, match="with prune.method=movement: this combination needs the whole teacher on one device"
    ):
        cell(config, *given)


def test_an_8bit_teacher_is_not_sharded():
    given = ["family=llama2", "student=1b", "teacher=7b", "family.quantization=8bit", "prune.init=random"]
    assert pipeline.resolve(compose([*given, "train.sharding=fsdp"])).placement == "one"
    with pytest.raises(ConfigError, match="family.placement=ranks with family.quantization=8bit"):
        pipeline.resolve(compose([*given, "family.placement=ranks"]))


def test_devices_are_for_one_process(config, tmp_path):
    several = Runtime()
    several.ranks.size = 2
    with pytest.raises(ConfigError, match="family.placement=devices with 2 ranks"):
        check_budgets(cell(config, "family.placement=devices"), Store(tmp_path), several)


def test_ranks_at_one_stage_stop_together():
    """One that stopped alone would leave the others in a gather."""
    runtime = Runtime()
    runtime.ranks.size = 2
    runtime.ranks.any = lambda asked: True  # another one was asked
    runtime.check()
    with pytest.raises(Interrupted), runtime.working(collective=True):
        runtime.check()
    runtime.check()


def test_ranks_take_turns_and_fail_together():
    runtime = Runtime()
    assert runtime.ranks.in_turns(lambda: "mine") == "mine"
    with pytest.raises(StageError, match=r"rank 0 of 1 cannot go on: ValueError: broken"):
        runtime.ranks.in_turns(lambda: (_ for _ in ()).throw(ValueError("broken")))


@pytest.fixture
def folder(tmp_path):
    save_model(small_model().float(), tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_teacher_is_spread_as_accelerate_does_it(folder, monkeypatch):
    """Without a GPU everything goes to the CPU: what it does with two devices is not tested here."""
    one, many = load_model(folder), load_teacher(folder, Runtime(placement="devices"))
    assert many.hf_device_map == {"": "cpu"}
    assert torch.equal(hidden_states(one, TOKENS[0]), hidden_states(many, TOKENS[0]))
    with pytest.raises(StageError, match="does not fit on the devices of this process: layers were left on cpu"):
        spread(folder, "cuda:0")


def test_a_teacher_whose_layers_lie_apart_gives_the_same_states(folder, tmp_path):
    """Its layers come from disk one by one, by the hooks that carry states from device to device on GPUs."""
    one, many = load_model(folder), load_model(folder)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    accelerate.dispatch_model(many, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert next(many.model.layers[1].parameters()).is_meta
    with torch.no_grad():
        assert torch.equal(hidden_states(one, TOKENS[0]), hidden_states(many, TOKENS[0]))
    assert torch.equal(output_weight(one), output_weight(many))


def test_scores_of_a_teacher_whose_layers_lie_apart(folder):
    one, many = load_model(folder), load_model(folder)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{n}": "cpu" for n in range(3)}
    accelerate.dispatch_model(many, places, main_device="cpu", force_hooks=True)
    ours, theirs = (expressive_scores(model, list(TOKENS)) for model in (many, one))
    for name in ("heads", "neurons", "hidden"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
