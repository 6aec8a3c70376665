"""Nothing acts in training mode only, whatever a config says; what once did is named in identities."""

import json
import shutil

import pytest
import torch

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.cell.outdated import CHECKED
from capacity_gap.cell.stages import shared
from capacity_gap.commands import cli
from capacity_gap.models import loading
from capacity_gap.models.axes import architecture
from capacity_gap.models.defaults import PADDED, assumed, training_only
from capacity_gap.models.quiet import quiet
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.errors import StageError
from capacity_gap.store.stage import Store
from tests.conftest import compose
from tests.small_models import EVERY, TOKENS, logits_of, small_model

RATES = {kind: [k for k in assumed(kind) if "drop" in k] for kind, _ in EVERY.values()}


def noisy(name):
    """A small model of one kind with every rate of its config at one half, and token 0 for padding."""
    kind = EVERY[name][0]
    return small_model(name, pad_token_id=0, **dict.fromkeys(RATES[kind], 0.5))


@pytest.mark.parametrize("name", [n for n in EVERY if n != "mpt"])  # whose class takes whole numbers for rates
def test_training_computes_what_evaluation_does(name):
    model = noisy(name)
    assert RATES[model.config.model_type], "each of these architectures has some dropout"
    with torch.no_grad():
        expected = logits_of(model.eval(), TOKENS[0])
        assert not torch.equal(logits_of(model.train(), TOKENS[0]), expected), "the config alone would act"
        assert torch.equal(logits_of(quiet(model).train(), TOKENS[0]), expected)


@pytest.mark.parametrize("name", EVERY)
def test_the_padding_tokens_embedding_learns(name):
    model = quiet(noisy(name)).train()
    tokens = torch.zeros_like(TOKENS[0])
    logits_of(model, tokens)[..., 1].sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


def test_activation_checkpointing_and_tuning_see_no_noise_either(tmp_path):
    model = noisy("gpt2").float()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"resid_pdrop": 0.5}))
    loaded = loading.load_model(tmp_path)
    loaded.activation_checkpointing_enable()
    tokens = TOKENS[0][:, :-1]
    assert torch.equal(loaded.train()(tokens).logits, loaded.eval()(tokens).logits)


@pytest.mark.parametrize("kind", PADDED)
def test_a_padding_token_starts_as_random_as_the_others(kind):
    settings = next(s for k, s in EVERY.values() if k == kind)
    plain, padded = (loading.new_model({"model_type": kind, **settings, "pad_token_id": pad}, 0) for pad in (None, 5))
    rows = [m.get_input_embeddings().weight for m in (plain, padded)]
    assert torch.equal(*rows)
    assert rows[1][5].abs().sum() > 0
    assert padded.config.pad_token_id == 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_file):
    """Model folders that transformers would train with dropout, and with a frozen row; and one without either."""
    from capacity_gap.data.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("noise")
    shapes = {
        "drop": {"model_type": "gpt2", "n_embd": 48, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "pad": {"model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2},
    }
    shapes["pad"] |= {"num_attention_heads": 4, "head_dim": 12, "tie_word_embeddings": False, "pad_token_id": 0}
    shapes["clean"] = {**shapes["pad"], "pad_token_id": None}
    for name, shape in shapes.items():
        full = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, **shape}
        loading.save_model(loading.new_model(full, 1), root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | dict.fromkeys(RATES[full["model_type"]], 0.1)))
        if name != "drop":
            (root / name / "config.json").write_text(json.dumps(config))
        train_tokenizer([text_file.read_text()], 512, root / name)
    return root


def cell_of(folder, tiny, store, *more):
    given = [g for g in tiny if not g.startswith("family.")]
    local = ["family=folders", f"family.folders=[{folder}]", f"teacher={folder.name}", "student=50k"]
    return compose([*given, *local, f"store={store}", *more])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drop", "pad"])
def test_a_cell_repeats_and_its_wrong_predecessor_is_not_reused(folders, tiny, tmp_path, monkeypatch, capsys, name):
    first, again, old = (tmp_path / n for n in ("first", "again", "old"))
    for store in (first, again):
        run_config(cell_of(folders / name, tiny, store))
    rows = [records.read(store)[0] for store in (first, again)]
    assert rows[0]["student_loss"] == rows[1]["student_loss"]
    with monkeypatch.context() as before:
        before.setattr(shared, "_identity", lambda cell, keys: {})
        run_config(cell_of(folders / name, tiny, old))
    now = pipeline.resolve(cell_of(folders / name, tiny, old))
    assert not Store(old).has(now.record)
    assert now.record.digest == rows[0]["cell"]
    assert cli.main(["status", str(old)]) == 0
    assert "stale: 1 recorded cells" in (said := capsys.readouterr().out)
    assert ", ".join(training_only(now.teacher_shape)) in said
    for _ in range(2):  # looked at, and then known to be right
        assert cli.main(["status", str(first)]) == 0
        assert "stale" not in capsys.readouterr().out
    assert json.loads((first / CHECKED).read_text())["right"] == [now.record.key]
    assert cli.main(["status", str(old)]) == 0
    assert "stale: 1 recorded cells" in capsys.readouterr().out, "what is wrong is named each time"


def test_a_config_in_which_nothing_acts_keeps_its_identity(folders, tiny, tmp_path):
    cell = pipeline.resolve(cell_of(folders / "clean", tiny, tmp_path))
    assert "ignored" not in cell.distilled.config
    assert "ignored" in pipeline.resolve(cell_of(folders / "pad", tiny, tmp_path)).distilled.config
    random = cell_of(folders / "pad", tiny, tmp_path, "prune.init=random")
    assert pipeline.resolve(random).student.config["ignored"] == ["pad_token_id"]


def test_scores_that_read_the_embedding_name_its_frozen_row(folders, tiny, tmp_path):
    cells = {
        method: pipeline.resolve(cell_of(folders / "pad", tiny, tmp_path, f"prune.method={method}"))
        for method in ("expressive", "magnitude", "taylor", "movement")
    }
    assert {m for m, c in cells.items() if "ignored" in c.scores.config} == {"taylor", "movement"}


def test_a_padding_token_that_no_text_holds_changes_no_identity(folders, tiny, tmp_path, text_file):
    shutil.copytree(folders / "clean", tmp_path / "apart")
    config = json.loads((tmp_path / "apart" / "config.json").read_text())
    (tmp_path / "apart" / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))
    tokenizer = json.loads((tmp_path / "apart" / "tokenizer.json").read_text())
    word = next(t for t, i in tokenizer["model"]["vocab"].items() if i == 7)
    read = pipeline.resolve(cell_of(tmp_path / "apart", tiny, tmp_path))
    assert read.distilled.config["ignored"] == ["pad_token_id"], "a word like any other"
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 7, "content": word})
    (tmp_path / "apart" / "tokenizer.json").write_text(json.dumps(tokenizer))
    apart = pipeline.resolve(cell_of(tmp_path / "apart", tiny, tmp_path))
    assert "ignored" not in apart.distilled.config, "a control token"
    random = pipeline.resolve(cell_of(tmp_path / "apart", tiny, tmp_path, "prune.init=random"))
    assert random.student.config["ignored"] == ["pad_token_id"], "its row started at zero"


def test_keys_that_a_class_does_not_read_change_no_identity():
    config = {"model_type": "llama", "hidden_dropout": 0.1, "use_dropout": True, "attention_dropout": 0.0}
    assert training_only(config) == []
    assert training_only(config | {"attention_dropout": 0.1}) == ["attention_dropout"]


def test_a_tokenizer_whose_end_of_text_changed_is_refused(folders, tiny, tmp_path):
    from capacity_gap.data.tokenizer import load_tokenizer

    shutil.copytree(folders / "clean", tmp_path / "moved")
    config = cell_of(tmp_path / "moved", tiny, tmp_path / "store", "data=0")
    run_config(config)
    tokenizer = load_tokenizer(tmp_path / "moved")
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer_config.json", tmp_path / "moved")
    again = cell_of(tmp_path / "moved", tiny, tmp_path / "store", "data=0", "prune.batches=3")
    with pytest.raises(StageError, match=r"end-of-text token was '<\|endoftext\|>'.* now '!'"):
        run_config(again)


def test_every_architecture_says_what_would_act():
    for name in EVERY:
        config = noisy(name).config.to_dict()
        frozen = ["pad_token_id"] if config["model_type"] in (*PADDED, "olmo2", "gemma3_text", "mixtral") else []
        assert training_only(config) == sorted([*RATES[config["model_type"]], *frozen])
        assert architecture(config).embedding
