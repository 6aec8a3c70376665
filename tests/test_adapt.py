"""Cells whose teachers get a second script before anything is pruned."""

import json
import random
import shutil

import pytest
import torch

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.data.expand_tokenizer import PARTS
from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import load_model, new_model, save_model
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.stage import Store, closure
from tests.conftest import compose
from tests.test_expand import SECOND, _qwen

COMMIT = "0123456789" * 4


@pytest.fixture(scope="session")
def folders(text_file, tmp_path_factory):
    """Two folders of text, English and other scripts (words of a few sentences in many orders), 40 files each."""
    draw = random.Random(0)
    words = [w for line in SECOND for w in line.split()]
    first = text_file.read_text(encoding="utf-8").split("\n\n")
    second = [" ".join(draw.choices(words, k=12)) for _ in range(400)]
    made = []
    for name, paragraphs in (("first", first), ("second", second)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(40):
            (folder / f"{i}.txt").write_text("\n\n".join(paragraphs[i::40]), encoding="utf-8")
        made.append(folder)
    return made


@pytest.fixture(scope="session")
def adapted(tiny, folders):
    """Overrides of a tiny cell with an expanded and adapted teacher."""
    parts = ",".join(f"{{name:text,path:{folder},weight:1}}" for folder in folders)
    return [*tiny, "expand.vocab=1100", "adapt.data=4k", f"adapt.parts=[{parts}]", "student=40k", "teacher=55k"]


@pytest.fixture(scope="session")
def adapted_cell(adapted, tmp_path_factory):
    """A tiny expanded cell that has been run."""
    config = compose([*adapted, f"store={tmp_path_factory.mktemp('store')}"])
    run_config(config)
    return pipeline.resolve(config)


def test_an_expanded_cell_says_so_in_its_record(adapted_cell):
    (row,) = records.read(adapted_cell.config.store_path)
    assert (row["expanded_vocab"], row["adapt_tokens"]) == (1152, 4000)
    assert row["teacher_params"] == 55_032 + 24 * 128
    assert row["expanded_tokens"] == 1100, "the rest of the rows is padding, and the record says so"
    assert row["second_bytes_per_token"] > 1.2 * row["second_bytes_per_token_before"]
    assert row["corpus"] == "1*text+1*text"
    assert row["student_loss"] < row["init_loss"]


def test_the_student_has_the_new_vocabulary_and_learns_from_the_adapted_teacher(adapted_cell):
    store = Store(adapted_cell.config.store_path)
    assert load_model(store.path(adapted_cell.distilled)).config.vocab_size == 1152
    assert adapted_cell.distilled.inputs["teacher"].name == "adapt"
    names = [s.name for s in closure(adapted_cell.record).values()]
    assert names.count("corpus") == names.count("tokens") == 2, "the teacher's own text, and the mixture"


def test_an_expanded_model_names_its_second_tokenizer_among_its_parents(adapted_cell, tmp_path):
    from capacity_gap.export.student import Lineage

    shutil.copytree(adapted_cell.config.store_path, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert "alice" not in str(Lineage.of(store, adapted_cell.record.digest).parents)
    file = store.path(adapted_cell.tokenizer) / "result.json"
    for name, said in (("hfl/chinese", "hfl/chinese"), ("/home/alice/zh", "the user's folder zh")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"second": name}))
        assert said in dict(Lineage.of(store, adapted_cell.record.digest).parents)


def test_the_base_teacher_is_shared_with_cells_that_do_not_expand(adapted, tiny):
    plain = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k"]))
    grown = pipeline.resolve(compose(adapted))
    assert plain.teacher.digest in {s.digest for s in closure(grown.teacher).values()}
    assert plain.record.digest != grown.record.digest


def test_adaptation_alone_trains_on(tiny):
    cell = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k", "adapt.data=2k"]))
    assert cell.teacher.name == "adapt" and cell.teacher.inputs["model"].name == "teacher"
    assert cell.tokens is not cell.base_tokens and cell.tokens.digest == cell.base_tokens.digest
    assert cell.description["adapt_tokens"] == 2000 and "expanded_vocab" not in cell.description


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["expand.vocab=1000"], "expand.vocab=1000, but pico already has 1024 tokens"),
        (["expand.tokenizer=x"], "expand.tokenizer=x needs expand.vocab="),
        (["expand.vocab=2000", "expand.tokenizer=/"], "expand.tokenizer=/ has no tokenizer.json"),
        (
            ["expand.vocab=2000", "expand.tokenizer=a/b"],
            "expand.tokenizer=a/b is not a local folder; .*expand.revision=",
        ),
        (["expand.vocab=2000", "expand.tokenizer=a/b", "expand.revision=main"], "expand.revision=main is out of range"),
        (["expand.vocab=2000", f"expand.revision={COMMIT}"], "given with expand.tokenizer= only"),
        (["expand.vocab=2000", "expand.tokenizer=/", f"expand.revision={COMMIT}"], "is a folder: expand.revision="),
        (["adapt.data=-1"], "adapt.data=-1 cannot be read as a scale"),
    ],
)
def test_bad_settings_say_what_to_do(tiny, given, said):
    with pytest.raises(ConfigError, match=said):
        pipeline.resolve(compose([*tiny, *given]))


def test_too_little_text_to_adapt_to_stops_before_any_model_is_trained(adapted, tmp_path):
    config = compose([*adapted, "adapt.data=50m", f"store={tmp_path}"])
    with pytest.raises(ConfigError, match="adapt.data=50m with adapt.epochs=1 needs"):
        run_config(config)
    assert not (tmp_path / "teacher").exists()


def test_fewer_tokens_than_there_is_room_for_stop_before_any_model_is_trained(adapted, tmp_path):
    """Else thousands of rows that no token uses would count as parameters."""
    config = compose([*adapted, "expand.vocab=9000", f"store={tmp_path}"])
    with pytest.raises(ConfigError, match=r"expand.vocab=9000 asks for 7,976 tokens .* only .* Set expand.vocab=\d+"):
        run_config(config)
    assert not (tmp_path / "teacher").exists()


def test_a_tokenizer_on_the_hub_is_identified_and_loaded_by_its_commit(adapted, qwen_like, monkeypatch):
    """What a name stands for may change; what a commit holds may not."""
    from transformers import AutoTokenizer

    from capacity_gap.models.loading import published_tokenizer

    one, other = (
        pipeline.resolve(compose([*adapted, "expand.tokenizer=a/b", f"expand.revision={commit}"]))
        for commit in (COMMIT, COMMIT[::-1])
    )
    assert one.tokenizer.config["second"] == {"repository": "a/b", "revision": COMMIT}
    assert one.tokenizer.digest != other.tokenizer.digest
    asked, load = [], AutoTokenizer.from_pretrained

    def from_hub(name, **given):
        asked.append((name, given))
        return load(qwen_like)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_hub)
    published_tokenizer("a/b", COMMIT)
    assert asked == [("a/b", {"revision": COMMIT, "trust_remote_code": False})]


@pytest.fixture(scope="session")
def qwen_like(text_file, tmp_path_factory):
    """A model folder whose tokenizer has tokens behind its model's vocabulary, as Qwen2.5's has."""
    folder = tmp_path_factory.mktemp("home") / "alice" / "mine"
    folder.mkdir(parents=True)
    train_tokenizer(text_file.read_text(encoding="utf-8").split("\n\n"), 1000, folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    _qwen(model["vocab"], [tuple(pair) for pair in model["merges"]]).save_pretrained(folder)
    save_model(new_model(FAMILIES["pico"].rungs["55k"], 0), folder)
    return folder


@pytest.mark.slow
def test_a_teacher_with_tokens_behind_its_vocabulary_keeps_their_rows(adapted, qwen_like, tmp_path):
    given = [g for g in adapted if not g.startswith(("family.", "teacher=", "student="))]
    config = compose([*given, "family=folders", f"teacher={qwen_like}", "student=45k", f"store={tmp_path}"])
    run_config(config)
    cell, store = pipeline.resolve(config), Store(tmp_path)
    old, new = (load_tokenizer(f) for f in (qwen_like, store.path(cell.tokenizer)))
    assert {token: new.get_vocab()[token] for token in old.get_vocab()} == old.get_vocab()
    expanded = load_model(store.path(cell.teacher.inputs["model"])).get_input_embeddings().weight
    before = load_model(qwen_like).get_input_embeddings().weight
    assert torch.equal(expanded[: len(old)], before[: len(old)])
    parts = json.loads((store.path(cell.tokenizer) / PARTS).read_text())["parts"]
    torch.testing.assert_close(expanded[len(old)], before[parts[0]].mean(0))
