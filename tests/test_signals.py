"""Cached teacher outputs: written once, resumed block by block, read back in any order."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.distill import signals
from capacity_gap.distill.signals import Signal, write_signal
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import hidden_states, new_model, output_weight
from capacity_gap.runner.plan import make_plan
from capacity_gap.runner.run_cell import run_config
from capacity_gap.store.files import is_whole
from capacity_gap.store.stage import Store
from tests.conftest import compose

TOKENS = np.random.default_rng(0).integers(0, 1024, (40, 9))
ORDER = np.array([7, 3, 30, 12, 39, 0, 21])


class Text:
    sequence_length = 8

    def batch(self, indices):
        return TOKENS[indices]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(signals, "BLOCK", 3)


@pytest.fixture(scope="module")
def teacher():
    return new_model(FAMILIES["pico"].rungs["55k"], 3)


def written(teacher, folder, kind="topk", **changes):
    given = {"size": 5, "temperature": 1.0, "seed": 1, "batch_size": 2, "autocast": nullcontext, **changes}
    write_signal(teacher, Text(), ORDER, folder, kind=kind, **given)
    return Signal(folder)


@torch.no_grad()
def log_probs(teacher, indices, tau=1.0):
    inputs = torch.from_numpy(TOKENS[indices][:, :-1])
    return (hidden_states(teacher, inputs) @ output_weight(teacher).T / tau).log_softmax(-1).flatten(0, 1)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_topk_holds_the_likeliest_tokens_of_the_named_sequences(teacher, tmp_path, tau):
    signal = written(teacher, tmp_path, temperature=tau)
    for indices in ([7], [21, 7, 30], list(ORDER)):
        found = signal.targets(np.array(indices))
        expected = log_probs(teacher, indices, tau)
        torch.testing.assert_close(found.values, expected.topk(5).values, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.entropy, -(expected.exp() * expected).sum(-1))
        assert found.ids.shape == (len(indices) * 8, 5)


def test_samples_average_to_the_distribution(teacher, tmp_path):
    total = torch.zeros(8, 1024)
    for seed in range(60):
        targets = written(teacher, tmp_path / str(seed), "sampled", size=200, seed=seed).targets(np.array([12]))
        total.scatter_add_(1, targets.ids, targets.values)
    exact = log_probs(teacher, [12]).exp()
    assert (total / 60 - exact).abs().max() < 5 * (exact.max() / 12000) ** 0.5


def test_a_killed_writer_loses_one_block_and_ends_with_the_same_signal(teacher, tmp_path):
    whole = written(teacher, tmp_path / "calm", "sampled")

    class Killed(Exception):
        pass

    def kill(done, total):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        written(teacher, tmp_path / "again", "sampled", on_block=kill)
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "again").glob("block-0000[01]-*.npy")}
    assert len(kept) == 6
    again = written(teacher, tmp_path / "again", "sampled")
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    for name in ("ids", "values", "entropy"):
        assert torch.equal(getattr(whole.targets(ORDER), name), getattr(again.targets(ORDER), name))


def test_a_changed_byte_of_a_block_is_noticed_before_the_signal_goes_on(teacher, tmp_path):
    written(teacher, tmp_path)
    assert is_whole(tmp_path)
    block = tmp_path / "block-00001-values.npy"
    content = bytearray(block.read_bytes())
    content[-3] ^= 1
    block.write_bytes(content)
    assert not is_whole(tmp_path)


def test_rows_beyond_the_tokenizer_are_no_part_of_a_signal(teacher, tmp_path):
    kept = written(teacher, tmp_path, size=5, vocabulary=900).targets(ORDER)
    assert kept.ids.max() < 900
    inputs = torch.from_numpy(TOKENS[ORDER][:, :-1])
    with torch.no_grad():
        logits = hidden_states(teacher, inputs) @ output_weight(teacher)[:900].T
    expected = logits.log_softmax(-1).flatten(0, 1).topk(5).values
    torch.testing.assert_close(kept.values, expected, rtol=2e-3, atol=2e-3)


def test_a_sequence_that_is_not_there_is_an_error(teacher, tmp_path):
    with pytest.raises(IndexError, match="lack some of these sequences"):
        written(teacher, tmp_path).targets(np.array([7, 5]))


@pytest.mark.parametrize("signal", [pytest.param("topk", marks=pytest.mark.slow), "sampled"])
def test_cells_share_one_signal_and_come_near_the_online_result(tiny, tmp_path, signal):
    given = [*tiny, "teacher=80k", f"store={tmp_path}", "epochs=2", "data=8k"]
    cached = [f"distill.signal={signal}", "distill.signal_size=128"]
    online = compose([*given, "student=40k"])
    run_config(online)
    cells = [
        compose([*given, *cached, *more]) for more in (["student=40k"], ["student=50k"], ["student=40k", "seed=1"])
    ]
    for config in cells:
        run_config(config)
    folders = list(tmp_path.glob("signal/*"))
    assert len(folders) == 1
    assert list(folders[0].glob("*.crc32")) == []
    assert json.loads((folders[0] / "signal.json").read_text())["bytes_per_token"] < 600
    rows = {r["cell"]: r for r in records.read(tmp_path)}
    planned = make_plan([pipeline.resolve(cells[0])], Store(tmp_path)).signals
    on_disk = json.loads((folders[0] / "signal.json").read_text())["bytes_per_token"]
    assert [float(s.split()[1]) for s in planned] == [pytest.approx(on_disk, rel=0.05)], "but for headers of blocks"
    near, exact = (rows[pipeline.resolve(c).record.digest] for c in (cells[0], online))
    assert near["signal"] == f"{signal}-128"
    assert near["signal_bytes_per_token"] == on_disk
    assert exact["signal_bytes_per_token"] is None
    # A teacher of 8k tokens is nearly uniform: the likeliest 128 tokens are a poor picture of it, draws a fair one.
    assert near["student_loss"] == pytest.approx(exact["student_loss"], abs=0.2 if signal == "topk" else 0.05)
    assert near["teacher_entropy"] == exact["teacher_entropy"]
    stage = pipeline.resolve(cells[0])
    assert "teacher" not in stage.distilled.inputs
    assert any("signal" in s.name for wave in stage.waves for s in wave)
    assert Store(tmp_path).has(stage.record)
