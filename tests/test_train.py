"""The one loop: repeatable to the bit, resumable to the bit, and right about what it averages."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.models import accounting
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import new_model
from capacity_gap.runtime import process
from capacity_gap.runtime.process import Interrupted, Runtime
from capacity_gap.settings.errors import ConfigError, StageError
from capacity_gap.training.loop import Plan, learning_rate, make_accelerator, make_optimizer, train
from capacity_gap.training.train_config import OptimConfig
from tests.conftest import ROOT

RUNGS = FAMILIES["pico"].rungs


class Text:
    """Random tokens, the same every time."""

    sequence_length = 16
    tokens = np.random.default_rng(0).integers(0, 1024, (64, 17))

    def __len__(self):
        return len(self.tokens)

    def batch(self, indices):
        return self.tokens[indices]


def plan(**changes):
    given = {
        "order": np.arange(50),
        "optim": OptimConfig(batch_size=8),
        "distill": DistillConfig(),
        "peak": 5e-3,
        "micro_batch": 8,
    }
    return Plan(**{**given, **changes})


def run(tmp_path, the_plan, *, runtime=None, on_log=lambda point: None, seed=0):
    student, teacher = new_model(RUNGS["55k"], seed), new_model(RUNGS["80k"], 7)
    result = train(
        student,
        Text(),
        the_plan,
        runtime=runtime or Runtime(),
        checkpoints=tmp_path,
        teacher=teacher,
        on_log=on_log,
    )
    return student, result


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one, two):
    return all(torch.equal(one[k], two[k]) for k in one)


def test_two_runs_are_bit_identical_and_another_order_is_not(tmp_path):
    one, first = run(tmp_path, plan())
    two, second = run(tmp_path, plan())
    three, _ = run(tmp_path, plan(order=np.arange(50)[::-1].copy()))
    assert equal(weights(one), weights(two))
    assert first.history == second.history
    assert not equal(weights(one), weights(three))


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    whole, expected = run(tmp_path / "whole", plan(order=np.arange(300) % 64))
    runtime = Runtime()

    def stop_at_the_second_point(point):
        if point["step"] > 1:
            runtime.stop.set()

    with pytest.raises(Interrupted):
        run(tmp_path / "parts", plan(order=np.arange(300) % 64), runtime=runtime, on_log=stop_at_the_second_point)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["step-11"]
    resumed, result = run(tmp_path / "parts", plan(order=np.arange(300) % 64), seed=99)
    assert equal(weights(whole), weights(resumed))
    assert result.history == expected.history


def test_micro_batches_change_rounding_only(tmp_path):
    whole, _ = run(tmp_path / "a", plan())
    pieces, _ = run(tmp_path / "b", plan(micro_batch=3))
    for name, p in weights(pieces).items():
        torch.testing.assert_close(p, weights(whole)[name], rtol=1e-3, atol=2e-5)


def test_the_last_step_may_be_short_and_history_counts_tokens(tmp_path):
    _, result = run(tmp_path, plan())
    assert result.steps == 7
    assert result.history[-1]["tokens"] == 50 * 16
    assert result.tokens == 50 * 16
    assert set(result.history[0]) == {
        *("step", "tokens", "learning_rate", "grad_norm", "ce", "kd", "kl", "teacher_entropy")
    }


def test_training_learns_what_repeats(tmp_path):
    _, result = run(tmp_path, plan(order=np.arange(400) % 8, distill=DistillConfig(kd_weight=0.0)))
    assert result.history[-1]["ce"] < result.history[0]["ce"] - 1
    assert "kl" not in result.history[0]


def test_pure_distillation_approaches_the_teacher(tmp_path):
    _, result = run(tmp_path, plan(order=np.arange(300) % 64, distill=DistillConfig(kd_weight=1.0)))
    assert result.history[-1]["kl"] < 0.7 * result.history[0]["kl"]


def test_a_loss_that_is_not_finite_ends_the_run_with_step_rate_and_norm(tmp_path):
    with pytest.raises(StageError, match=r"no longer finite at step \d+ of .*learning_rate.*grad_norm.*Lower the peak"):
        run(tmp_path, plan(order=np.arange(400) % 64, peak=1e20))


def test_decay_is_on_matrices_only():
    model = new_model(RUNGS["55k"], 0)
    groups = make_optimizer(model, OptimConfig()).param_groups
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules_warm_up_to_the_peak_and_end_where_they_say(schedule):
    optim = OptimConfig(schedule=schedule, warmup=0.1, decay=0.2, final=0.1)
    rates = [learning_rate(s, 100, optim, 2.0) for s in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert rates[79] == pytest.approx(2.0) or schedule == "cosine"
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[10:]))


def test_the_rate_falls_in_proportion_to_the_width():
    assert OptimConfig().peak(40) == pytest.approx(0.01)
    assert dataclasses.replace(OptimConfig(), learning_rate=0.3).peak(40) == 0.3


def test_out_of_memory_halves_the_micro_batch_and_nothing_else(tmp_path, monkeypatch, caplog):
    from capacity_gap.training import loop as module

    whole, _ = run(tmp_path / "a", plan(micro_batch=2))
    forward = module.Objective.forward

    def small_device(self, tokens, *rest):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *rest)

    monkeypatch.setattr(module.Objective, "forward", small_device)
    halved, result = run(tmp_path / "b", plan())
    assert result.micro_batch == 2
    assert equal(weights(whole), weights(halved))
    assert "train.micro_batch_size=2 (the same global batch)" in caplog.text


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    from capacity_gap.training import loop as module

    monkeypatch.setattr(module.Objective, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path, plan())


def test_activation_checkpointing_changes_no_bit(tmp_path):
    whole, _ = run(tmp_path / "a", plan(order=np.arange(16)))
    lean, _ = run(tmp_path / "b", plan(order=np.arange(16), activation_checkpointing=True))
    assert equal(weights(whole), weights(lean))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in lean.modules())


@pytest.mark.slow
def test_a_compiled_run_agrees_and_leaves_a_plain_student(tmp_path, monkeypatch):
    compiled = []

    def with_eager_backend(module):
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", with_eager_backend)
    plain, _ = run(tmp_path / "a", plan(order=np.arange(16)))
    student, _ = run(tmp_path / "b", plan(order=np.arange(16), compile=True))
    assert len(compiled) == 2, "student and teacher"
    assert set(weights(plain)) == set(weights(student))
    assert student.base_model._compiled_call_impl is None
    for name, p in weights(student).items():
        torch.testing.assert_close(p, weights(plain)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_worker_compiles_every_model_however_many_came_before(tmp_path, monkeypatch):
    """Torch keeps eight shapes of a function and runs all further ones uncompiled, with a line in its log."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    def with_backend(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", with_backend)
    direct = plan(order=np.arange(8), distill=DistillConfig(kd_weight=0.0), compile=True)
    per_model = []
    for i, rung in enumerate(list(RUNGS)[:10]):
        traced.clear()
        train(new_model(RUNGS[rung], 0), Text(), direct, runtime=Runtime(), checkpoints=tmp_path / str(i))
        per_model.append(len(traced))
    assert per_model == per_model[:1] * 10 and per_model[0] > 0


def test_held_out_losses_come_at_their_tokens_and_change_nothing(tmp_path):
    plain, _ = run(tmp_path / "a", plan())
    student, teacher = new_model(RUNGS["55k"], 0), new_model(RUNGS["80k"], 7)
    every = plan(evaluate_every=300)
    result = train(student, Text(), every, runtime=Runtime(), checkpoints=tmp_path, teacher=teacher, held_out=Few())
    assert equal(weights(plain), weights(student))
    measured = {p["tokens"]: p["held_out"] for p in result.history if "held_out" in p}
    assert list(measured) == [384, 640, 800], "the first steps of 128 tokens that passed 300 and 600; then the last"
    with torch.no_grad():
        rows = torch.from_numpy(Text.tokens[:5])
        exact = student(rows[:, :-1]).logits.flatten(0, 1)
    assert measured[800] == pytest.approx(float(torch.nn.functional.cross_entropy(exact, rows[:, 1:].flatten())))


class Few(Text):
    """A text that holds five sequences."""

    def __len__(self):
        return 5

    def batch(self, indices):
        assert max(indices) < 5
        return self.tokens[indices]


def test_hidden_states_come_nearer_and_an_interrupted_run_keeps_their_projection(tmp_path):
    the_plan = plan(order=np.arange(300) % 64, distill=DistillConfig(hidden_weight=1.0))
    whole, expected = run(tmp_path / "whole", the_plan)
    assert expected.history[-1]["hidden"] < 0.7 * expected.history[0]["hidden"]
    runtime = Runtime()
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", the_plan, runtime=runtime, on_log=lambda p: p["step"] > 1 and runtime.stop.set())
    resumed, result = run(tmp_path / "parts", the_plan, seed=99)
    assert equal(weights(whole), weights(resumed))
    assert result.history == expected.history


def test_mfu_is_what_the_tokens_cost_over_the_peak(tmp_path):
    points = []
    _, result = run(tmp_path, plan(order=np.arange(16), peak_flops=1e10), on_log=points.append)
    student, teacher = (accounting.multiplied(RUNGS[r]) for r in ("55k", "80k"))
    for rate, mfu in ((points[-1]["tokens_per_s"], points[-1]["mfu"]), (result.tokens_per_s, result.mfu)):
        assert mfu == pytest.approx((6 * student + 2 * teacher) * rate / 1e10)
    assert "mfu" not in result.history[0], "a history repeats to the bit"
    assert run(tmp_path / "cpu", plan(order=np.arange(16)))[1].mfu is None


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A10G", None, None),
        ("cpu (x86_64)", None, None),
    ],
)
def test_peaks_go_by_the_devices_whole_name(name, bf16, fp32):
    assert accounting.peak_flops(name, "bf16") == bf16
    assert accounting.peak_flops(name, "fp32") == fp32


def test_vocabularies_of_two_heights_are_cropped_with_a_note(tmp_path, caplog):
    student = new_model({**RUNGS["55k"], "vocab_size": 1100}, 0)
    teacher = new_model(RUNGS["80k"], 7)
    train(student, Text(), plan(order=np.arange(8)), runtime=Runtime(), checkpoints=tmp_path, teacher=teacher)
    assert "padded to 1100 rows, the teacher's to 1024: KD uses the first 1024" in caplog.text


def test_bf16_trains_nearly_the_same(tmp_path):
    points = []
    for precision in ("fp32", "bf16"):
        student, teacher = new_model(RUNGS["55k"], 0), new_model(RUNGS["80k"], 7)
        where = {"runtime": Runtime(), "checkpoints": tmp_path / precision}
        result = train(student, Text(), plan(order=np.arange(24)), **where, teacher=teacher, precision=precision)
        points.append(result.history[-1])
        assert {p.dtype for p in student.parameters()} == {torch.float32}
    for name in ("ce", "kl", "teacher_entropy"):
        assert points[1][name] == pytest.approx(points[0][name], rel=0.02)


class Cards:
    """A pretended torch.cuda."""

    def __init__(self, count):
        self.count, self.taken = count, []

    def is_available(self):
        return self.count > 0

    def device_count(self):
        return self.count

    def set_device(self, device):
        self.taken.append(device)


def test_devices_are_named_checked_and_taken(monkeypatch):
    cards = Cards(2)
    monkeypatch.setattr(torch, "cuda", cards)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(process, "_own_gpu", lambda count: count - 1)
    assert [process.resolve_device(d) for d in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    with pytest.raises(ConfigError, match="torch found 2 cuda devices here .numbers begin at 0.. Available: cuda, cpu"):
        process.resolve_device("cuda:2")
    with pytest.raises(ConfigError, match="torch found no xpu device here"):
        process.resolve_device("xpu:0")
    for device in ("cuda:1", "cpu"):
        process.take(device)
    assert cards.taken == ["cuda:1"], "libraries that name no device get this one"


def test_each_rank_takes_the_device_of_its_number(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Cards(4))
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    assert process.resolve_device("auto") == process.resolve_device("cuda") == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="rank 4 of this machine has no device: torch found 4 of cuda here"):
        process.resolve_device("auto")
    with pytest.raises(ConfigError, match="train.device=cuda:1 with 4 ranks: each rank needs its own device"):
        process.resolve_device("cuda:1")


def test_of_several_ranks_a_repeated_signal_is_the_first_one_again(monkeypatch):
    """Slurm, submitit and torchrun each pass a request to stop on to every rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = Runtime()
    killed = []
    before = signal.signal(signal.SIGTERM, lambda *_: killed.append("killed"))
    try:
        with ranks.catching_signals():
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert ranks.stop.is_set()
            assert not killed
            monkeypatch.setattr(process, "ECHO_S", -1.0)
            signal.raise_signal(signal.SIGTERM)
            assert killed == ["killed"], "after a while a second one is meant"
        alone = Runtime()
        alone.ranks.size = 1
        with alone.catching_signals():
            signal.raise_signal(signal.SIGTERM)
            assert killed == ["killed"]
            signal.raise_signal(signal.SIGTERM)
            assert killed == ["killed"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sharding_leaves_precision_to_autocast(monkeypatch):
    """On GPUs accelerate would have FSDP compute, reduce and return everything in bf16, the loss too."""
    made = {}
    monkeypatch.setattr("accelerate.Accelerator", lambda **given: made.update(given))
    several = Runtime(sharding="fsdp")
    several.ranks.size = 2
    make_accelerator(several, "bf16", new_model(RUNGS["55k"], 0))
    assert made["mixed_precision"] == "bf16"
    made["fsdp_plugin"].set_mixed_precision("bf16")  # as AcceleratorState does
    policy = made["fsdp_plugin"].mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (None, None, None)


NESTED = """
import signal, sys
from capacity_gap.runtime.process import Runtime

seen = []

def nest(frame, event, arg):
    return again if frame.f_code.co_name == "set" else None  # what marks the request, whatever it does

def again(frame, event, arg):
    seen.append(event)
    if seen.count("line") == len(seen) == int(sys.argv[1]):
        signal.raise_signal(signal.SIGTERM)  # a first one of its kind, so it is marked too
    return again

runtime = Runtime()
with runtime.catching_signals():
    sys.settrace(nest)
    signal.raise_signal(signal.SIGUSR2)
    sys.settrace(None)
    print("caught", runtime.stop.is_set(), bool(seen))
"""


@pytest.mark.parametrize("line", ["1", "2"])
def test_a_signal_in_the_middle_of_another_ones_handler_does_not_lock_up(line):
    """A cluster sends two of them at once: USR2 to all of a job, TERM to those that work."""
    environment = {**os.environ, "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", NESTED, line], env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stdout == "caught True True\n", done.stderr
