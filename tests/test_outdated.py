"""Cells that an earlier version got wrong are named, and what was right of them is used again."""

import json
import math
import os
import shutil

import pytest

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.cell.outdated import CHECKED, _common, outdated, without_outdated
from capacity_gap.cell.stages import evaluate_model
from capacity_gap.commands import cli
from capacity_gap.data.packing import Packed
from capacity_gap.models import loading
from capacity_gap.report.content import gather
from capacity_gap.runner.run_cell import run_config
from capacity_gap.store.stage import Store
from tests.conftest import compose


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """A Llama folder whose tokenizer has added words outside ASCII."""
    from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer

    place = tmp_path_factory.mktemp("outdated") / "words"
    shape = {"model_type": "llama", "vocab_size": 516, "hidden_size": 48, "intermediate_size": 96}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12, "tie_word_embeddings": True}
    loading.save_model(loading.new_model(shape, 1), place)
    train_tokenizer([text_file.read_text()], 512, place)
    tokenizer = load_tokenizer(place)
    tokenizer.add_tokens(["café", "世界"])
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def text(tmp_path_factory, text_file):
    """Prose in which those words stand."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(text_file.read_text().replace(" the ", " café 世界 "), encoding="utf-8")
    return file


def cell_of(folder, text, tiny, store, *more):
    given = [g for g in tiny if not g.startswith(("family.", "corpus.path="))]
    local = ["family=folders", f"family.folders=[{folder}]", "teacher=words", "student=50k", f"corpus.path={text}"]
    return compose([*given, *local, f"store={store}", *more])


@pytest.fixture
def made(folder, text, tiny, tmp_path):
    """A store with one right cell, and the cell."""
    config = cell_of(folder, text, tiny, tmp_path / "store", "data=0")
    run_config(config)
    return Store(tmp_path / "store"), pipeline.resolve(config)


def reasons(store, cell):
    (store.root / CHECKED).unlink(missing_ok=True)
    return outdated(store, [cell.record.key]).get(cell.record.key)


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_bytes_counted_wrongly_are_counted_again_and_nothing_is_trained_again(
    folder, text, tiny, tmp_path, monkeypatch, capsys
):
    config = cell_of(folder, text, tiny, tmp_path)
    with monkeypatch.context() as before:
        before.setattr(evaluate_model, "old_bytes_were_wrong", lambda folder: False)
        before.setattr("capacity_gap.data.tokenizer.token_bytes", lambda *given: [3] * 514)
        before.setattr("capacity_gap.data.tokenizer.proved", lambda *given, **more: True)
        run_config(config)
    (old,) = records.read(tmp_path)
    now, store = pipeline.resolve(config), Store(tmp_path)
    assert store.has(now.distilled), "what was trained is used again"
    assert not store.has(now.record)
    cli.main(["status", str(tmp_path)])
    assert "bits per byte used a wrong byte count" in capsys.readouterr().out
    run_config(config)
    new = next(r for r in records.read(tmp_path) if r["cell"] == now.record.digest)
    assert new["student_loss"] == old["student_loss"]
    assert new["student_bits_per_byte"] == pytest.approx(bits(new, store, now))
    assert new["student_bits_per_byte"] != pytest.approx(old["student_bits_per_byte"], rel=0.01)


def bits(row, store, cell):
    """Bits per byte by the text that the scored ids decode to, its separators left out."""
    from capacity_gap.data.tokenizer import load_tokenizer

    packed = Packed(store.path(cell.tokens) / "test", 32)
    labels = packed.batch(range(row["held_out_tokens"] // 32))[:, 1:].ravel()
    tokenizer = load_tokenizer(store.path(cell.tokenizer))
    pieces = [tokenizer.convert_ids_to_tokens(int(i)) for i in labels if i != tokenizer.eos_token_id]
    added = set(tokenizer.get_added_vocab())
    count = sum(len(p.encode()) if p in added else len(p) for p in pieces)
    return row["student_loss"] / math.log(2) * row["held_out_tokens"] / count


def test_a_right_cell_is_looked_at_once(made):
    store, cell = made
    assert reasons(store, cell) is None
    assert len(without_outdated(records.load(store.root), store.root)[0]) == 1
    assert json.loads((store.root / CHECKED).read_text())["right"] == [cell.record.key]


def test_counts_that_differ_from_the_shapes_are_named_and_left_out_of_fits(made, capsys):
    store, cell = made
    row = store.path(cell.record) / "record.json"
    rewrite(row, teacher_params=cell.description["teacher_params"] + 48)
    assert reasons(store, cell) == "parameters of its teacher were counted wrongly"
    kept, notes = without_outdated(records.load(store.root), store.root)
    assert kept.empty
    assert notes == ["1 stale cell left out: `python -m capacity_gap status` lists the reasons"]
    assert cli.main(["fit", str(store.root)]) == 2
    assert "1 stale cell left out" in capsys.readouterr().err
    assert gather(str(store.root)).notes == notes


def test_a_run_of_no_steps_is_named(folder, text, tiny, tmp_path):
    config = cell_of(folder, text, tiny, tmp_path)
    run_config(config)
    store, cell = Store(tmp_path), pipeline.resolve(config)
    assert reasons(store, cell) is None
    rewrite(store.path(cell.distilled) / "result.json", steps=0)
    assert reasons(store, cell) == "trained on zero sequences"


def test_a_folder_is_judged_only_as_it_was(made, folder, tmp_path):
    store, cell = made
    pointer = store.path(cell.teacher) / "published.json"
    shutil.copytree(folder, tmp_path / "copy")
    rewrite(pointer, repository=str(tmp_path / "copy"))
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"")
    assert reasons(store, cell) is None, "it was changed after the cell was made"
    assert not (store.root / CHECKED).exists(), "and so nobody knows"
    old = (folder / "config.json").stat().st_mtime - 1000
    for file in (tmp_path / "copy").iterdir():
        os.utime(file, (old, old))
    assert "do not match its config.json" in str(reasons(store, cell))


def test_what_is_damaged_is_passed_over(made):
    store, cell = made
    (store.path(cell.corpus) / "stage.json").write_text("[]")
    assert reasons(store, cell) is None
    assert not (store.root / CHECKED).exists()


def test_common_students_of_a_mixed_ladder_are_known():
    assert _common("qwen2_5", 10**9) == (10**9, (151936, False))
    assert _common("qwen2_5", 15 * 10**8)[0] == 1_543_714_304
