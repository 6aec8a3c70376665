"""What an export publishes: a model that its own card can use, its own scores, its parents, and no place of a file."""

import contextlib
import json
import os
import shutil

import pytest
from safetensors.torch import load_file

from capacity_gap.cell import pipeline
from capacity_gap.commands import cli
from capacity_gap.export.student import export, public
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.errors import UserError
from capacity_gap.store.files import CHECKSUM, write_checked
from capacity_gap.store.stage import Store
from tests.conftest import compose


def _run(*given):
    config = compose(given)
    run_config(config)
    cell = pipeline.resolve(config)
    return cell, Store(config.store_path)


def _head(out):
    """The YAML that the hub reads, as it reads it."""
    import yaml

    return yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def use_as_the_card_says(out):
    """Runs the card's own lines in the exported folder; returns what they printed."""
    lines = (out / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    said = []
    with contextlib.chdir(out):
        exec(lines, {"print": said.append})
    return said[0]


@pytest.fixture(scope="module")
def plain(tiny_cell, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "plain"
    return export(Store(tiny_cell.store_path), pipeline.resolve(tiny_cell).record.digest, out)


def test_the_card_of_a_distilled_student(plain):
    card, row = (plain / "README.md").read_text(encoding="utf-8"), json.loads((plain / "record.json").read_text())
    assert "cut from 55k and distilled from 55k (55,032 parameters) on 6,000 tokens of `text`." in card
    assert f"| held-out loss, nats per token | {row['student_loss']:.4f} | {row['student_loss_stderr']:.4f} |" in card
    assert "epochs 1" in card and "before tuning" not in card
    assert _head(plain)["license"] == "other", "nobody knows the licence of the user's text"
    assert "base_model" not in _head(plain)
    assert use_as_the_card_says(plain)


@pytest.mark.slow
def test_an_encoder_decoder_is_exported_as_one(tiny, tmp_path):
    cell, store = _run(*tiny, "family=pico_t5", "student=50k", "teacher=80k", "data=1k", f"store={tmp_path / 'store'}")
    out = export(store, cell.record.digest, tmp_path / "out")
    assert "pipeline_tag" not in _head(out)
    assert use_as_the_card_says(out)


def test_what_began_with_random_weights_is_not_called_cut(tiny, tmp_path):
    given = ["student=40k", "teacher=55k", "prune.init=random", "distill.kd_weight=0", "data=1k"]
    cell, store = _run(*tiny, *given, f"store={tmp_path / 'store'}")
    card = (export(store, cell.record.digest, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "randomly initialised and trained without a teacher on 1,000 tokens" in card
    assert "cut from" not in card


@pytest.fixture(scope="module")
def alice(tiny_cell, tmp_path_factory):
    """A model folder of the user's, somewhere in her home."""
    store, cell = Store(tiny_cell.store_path), pipeline.resolve(tiny_cell)
    folder = tmp_path_factory.mktemp("home") / "alice" / "secret" / "mine"
    shutil.copytree(store.path(cell.teacher), folder)
    for file in store.path(cell.base_tokenizer).glob("token*.json"):
        shutil.copy(file, folder)
    return folder


def test_no_place_of_a_file_is_published(tiny, alice, text_file, tmp_path):
    """Neither of a teacher nor of a dataset: the folder's own name stands for it."""
    pytest.importorskip("datasets")
    rows = alice.parent / "rows"
    rows.mkdir()
    lines = (json.dumps({"text": text}) + "\n" for text in text_file.read_text(encoding="utf-8").split("\n\n"))
    (rows / "part.jsonl").write_text("".join(lines), encoding="utf-8")
    given = [g for g in tiny if not g.startswith(("family.", "corpus=", "corpus.path="))]
    hub = ["corpus=hub", f"corpus.dataset={rows}", "corpus.dataset_split=train", "corpus.column=text"]
    chosen = ["family=folders", f"teacher={alice}", "student=40k", "data=1k", f"store={tmp_path / 'store'}"]
    cell, store = _run(*given, *hub, *chosen)
    out = export(store, cell.record.digest, tmp_path / "out")
    for file in out.iterdir():
        assert b"alice" not in file.read_bytes(), file.name
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "- the user's folder mine: see its own page or owner" in card
    assert "- the user's folder rows: see its own page or owner" in card
    assert json.loads((out / "record.json").read_text())["corpus"] == "rows"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
        ("gpt2", "gpt2"),
        ("/home/alice/mine/", "mine"),
        ("~/mine", "mine"),
        ("../alice/mine", "mine"),
        ("alice/secret/mine", "mine"),
        ("C:\\Users\\alice\\mine", "mine"),
    ],
)
def test_names_that_may_be_published(name, said):
    assert public(name) == said


def test_published_parents_are_named_where_the_hub_looks_for_them(tiny_cell, tmp_path):
    """A store as a published teacher leaves it; nothing but what it points to is another's."""
    from capacity_gap.export.student import Lineage

    shutil.copytree(tiny_cell.store_path, tmp_path / "store")
    store, cell = Store(tmp_path / "store"), pipeline.resolve(tiny_cell)
    pointer = {"repository": "meta-llama/Llama-2-7b-hf", "revision": None, "dtype": "bf16", "quantization": "none"}
    (store.path(cell.teacher) / "published.json").write_text(json.dumps(pointer))
    for stage in (cell.corpus, cell.base_corpus):
        meta = json.loads((store.path(stage) / "stage.json").read_text())
        meta["config"] = {"name": "hub", "dataset": "meta-llama/Llama-2-text"}
        write_checked(store.path(stage) / "stage.json", {k: v for k, v in meta.items() if k != CHECKSUM})
    lineage = Lineage.of(store, cell.record.digest)
    assert lineage.parents == [
        ("meta-llama/Llama-2-7b-hf", "Llama 2 Community License"),
        ("meta-llama/Llama-2-text", "Llama 2 Community License"),
    ]
    head = _head(export(store, cell.record.digest, tmp_path / "out"))
    assert head["license"] == "llama2"
    assert head["base_model"] == ["meta-llama/Llama-2-7b-hf"]


def test_a_size_that_is_none_says_so_and_leaves_nothing(tiny_cell, tmp_path, capsys):
    digest, store = pipeline.resolve(tiny_cell).record.digest, str(tiny_cell.store_path)
    assert cli.main(["export", digest, str(tmp_path / "out"), "--store", store, "--shard", "abc"]) == 2
    assert "--shard abc: write a whole number and KB, MB, GB or TB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(tiny_cell, tmp_path, monkeypatch):
    from capacity_gap.export import student as module

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "card", full)
    with pytest.raises(OSError, match="no space left"):
        export(Store(tiny_cell.store_path), pipeline.resolve(tiny_cell).record.digest, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_writes_over_nothing(tiny_cell, tmp_path):
    store, digest = Store(tiny_cell.store_path), pipeline.resolve(tiny_cell).record.digest
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(store, digest, tmp_path / "file")
    (tmp_path / "out").mkdir()
    out = export(store, digest, tmp_path / "out", shard="60KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    assert sum(len(load_file(f)) for f in out.glob("*.safetensors")) > 10
    assert os.listdir(tmp_path / "out") and sorted(os.listdir(tmp_path)) == ["file", "out"]


@pytest.mark.parametrize("cell", ["", "*", "../..", "[a-f]", "record/", "xyz", "A" * 300])
def test_only_a_digest_names_a_cell(cell, tiny_cell, tmp_path):
    with pytest.raises(UserError, match="is not a cell: pass the first hexadecimal digits"):
        export(Store(tiny_cell.store_path), cell, tmp_path / "out")
    assert not (tmp_path / "out").exists()
