"""Files of the user's own that cannot be read: text, tables of rows, model folders. Each error names file and place."""

import codecs
import gzip
import io
import json
import os
import subprocess
import sys

import pytest

from capacity_gap.cell import pipeline
from capacity_gap.data.documents import text_documents, text_files
from capacity_gap.instruct.rows import TALK, read_rows, rows_in
from capacity_gap.models.building import check_builds
from capacity_gap.models.config_files import read_config
from capacity_gap.models.folders import checkpoint_family, end_of_text
from capacity_gap.settings.errors import ConfigError, ImpossibleCell, UserError
from tests.conftest import ROOT, run_here

LINE = json.dumps({"text": "A line of text."}).encode() + b"\n"
TEXTS = {
    "latin.txt": (
        "Ein schöner Tag.\n\n".encode("latin-1") * 2,
        r"line 1: not UTF-8 text \(byte 0xf6 .*iconv -f WIN",
    ),
    "late.jsonl": (LINE * 3 + LINE.replace(b"A", b"\xff"), "line 4: not UTF-8 text"),
    "wide.txt": (codecs.BOM_UTF16_LE + "text".encode("utf-16-le"), "line 1: not UTF-8 text .*iconv -f UTF-16"),
    "half.txt": ("text é".encode()[:-1], "not UTF-8 text"),
    "null.jsonl": (LINE + b'{"text": null}\n', "line 2: the text is null"),
    "number.jsonl": (LINE + b'{"text": 3}\n', "line 2: the text is a number"),
    "list.jsonl": (LINE + b'{"text": ["a"]}\n', "line 2: the text is a list"),
    "pair.jsonl": (LINE + b'{"text": "cut \\ud83d"}\n', "line 2: half of a surrogate pair"),
    "mark.jsonl": (codecs.BOM_UTF8 + LINE, "line 1: it begins with a byte order mark"),
    "field.jsonl": (LINE + b'{"txt": "a"}\n', "line 2: not a JSON object with a field `text`"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1: not a JSON object"),
    "cut.jsonl.gz": (gzip.compress(LINE * 1000)[:60], "is not a complete .gz file"),
    "plain.txt.gz": (b"no gzip at all", "is not a complete .gz file"),
    "flipped.txt.gz": (gzip.compress(os.urandom(500))[:-9] + b"123456789", "is not a complete .gz file|not UTF-8"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_read_is_named_with_its_place(name, tmp_path):
    content, said = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        list(text_documents(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_pipes_and_devices_are_no_text_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match="a pipe, a socket or a device"):
        text_files(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match="contains no text"):
        text_files(tmp_path)
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="a pipe, a socket or a device"):
        text_files(tmp_path / "link.txt")


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', b"\xff", b"3"]
)
def test_rows_that_cannot_be_read_are_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 1"):
        read_rows(tmp_path / "rows.jsonl", "instruct.path", TALK)


@pytest.fixture(scope="module")
def model(tiny_cell, tmp_path_factory):
    """A tiny model folder as save_pretrained writes it."""
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.models.loading import load_model
    from capacity_gap.store.stage import Store

    store, cell = Store(tiny_cell.store_path), pipeline.resolve(tiny_cell)
    folder = tmp_path_factory.mktemp("folders") / "model"
    load_model(store.path(cell.teacher)).save_pretrained(folder)
    load_tokenizer(store.path(cell.tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    """Copies of it, each with another file changed."""
    import shutil

    def made(name="m", **changes):
        folder = tmp_path / name
        shutil.copytree(model, folder)
        for file, change in changes.items():
            path = folder / file.replace("_json", ".json")
            if callable(change):
                path.write_text(json.dumps(change(json.loads(path.read_text()))))
            else:
                path.write_bytes(change)
        return folder

    return made


CONFIGS = {
    "no JSON": (b"{'model_type': 'llama'}", "is not JSON"),
    "not UTF-8": (b"\xff{}", "is not JSON"),
    "marked": (codecs.BOM_UTF8 + b"{}", "is not JSON"),
    "empty": (b"", "is not JSON"),
    "a list": (b"[]", "is not a JSON object"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "no type": (lambda c: {k: v for k, v in c.items() if k != "model_type"}, "model_type is None"),
    "a type that is a list": (lambda c: c | {"model_type": ["llama"]}, r"model_type is \['llama'\]"),
    "own code": (lambda c: c | {"model_type": "mine", "auto_map": {"AutoConfig": "x.C"}}, r"auto_map.*never run"),
    "several inputs": (lambda c: {"model_type": "llava", "text_config": c}, "is a multimodal model"),
    "quantised": (lambda c: c | {"quantization_config": {"bits": 4}}, "quantised checkpoint"),
    "a size of text": (lambda c: c | {"hidden_size": "24"}, "hidden_size='24' is not a valid size"),
    "no size": (lambda c: c | {"hidden_size": None}, "hidden_size=None is not a valid size"),
    "zero": (lambda c: c | {"num_attention_heads": 0}, "num_attention_heads=0 is not a valid size"),
    "negative": (lambda c: c | {"vocab_size": -5}, "vocab_size=-5 is not a valid size"),
    "true": (lambda c: c | {"intermediate_size": True}, "intermediate_size=True is not a valid size"),
    "fraction": (lambda c: c | {"intermediate_size": 1.5}, "intermediate_size=1.5 is not a valid size"),
    "endless layers": (
        lambda c: c | {"num_hidden_layers": 10**15},
        "num_hidden_layers=1000000000000000 is not a valid number",
    ),
    "endless width": (lambda c: c | {"hidden_size": 10**15}, "hidden_size=1000000000000000 is not a valid size"),
    "heads that do not divide": (lambda c: c | {"num_key_value_heads": 2, "num_attention_heads": 3}, "do not divide"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_describes_no_model_is_refused_by_name(kind, copy):
    change, said = CONFIGS[kind]
    folder = copy(config_json=change)
    with pytest.raises(ConfigError, match=said) as error:
        read_config(folder)
    assert str(folder) in str(error.value)


UNBUILT = {
    "activation": {"hidden_act": "nonsense"},
    "rope": {"rope_scaling": {"rope_type": "nonsense", "factor": 2.0}},
    "eps": {"rms_norm_eps": "x"},
    "type": {"dtype": "nonsense"},
}


@pytest.mark.parametrize("kind", UNBUILT)
def test_what_transformers_cannot_make_is_refused_before_anything_is_computed(kind, copy):
    config = read_config(copy(config_json=lambda c: c | UNBUILT[kind]))
    with pytest.raises(ConfigError, match="transformers cannot build the model"):
        check_builds("here", config)


TOKENIZERS = {
    "no JSON": b"{",
    "marked": codecs.BOM_UTF8 + b"{}",
    "no model": b"{}",
    "no readable vocabulary": b'{"model": {"type": "BPE"}}',
    "a vocabulary of lists": b'{"model": {"vocab": [[1, 2, 3]]}}',
    "ids of text": b'{"model": {"vocab": {"a": "b"}}}',
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_name(kind, copy):
    folder = copy(tokenizer_json=TOKENIZERS[kind])
    with pytest.raises(ConfigError, match=r"tokenizer\.json is no"):
        checkpoint_family([str(folder)])


def test_the_end_of_texts_is_the_configs_where_the_tokenizer_names_none(copy):
    bare = dict.fromkeys(("eos_token", "bos_token", "pad_token"))
    folder = copy(tokenizer_config_json=lambda c: {k: v for k, v in c.items() if k not in bare})
    assert end_of_text(folder) == "<|endoftext|>"
    checkpoint_family([str(folder)])
    silent = copy("n", tokenizer_config_json=lambda c: {}, config_json=lambda c: c | {"eos_token_id": None})
    with pytest.raises(ConfigError, match="has no end-of-text token"):
        checkpoint_family([str(silent)])


def test_one_bad_folder_is_left_out_by_name_and_its_cells_are_skipped(copy, tiny, capsys):
    good, bad = copy("good"), copy("bad", config_json=b"{")
    ladder = checkpoint_family([str(good), str(bad)])
    assert list(ladder.rungs) == ["good"]
    assert "bad is left out of the ladder" in capsys.readouterr().err
    for name in ("bad", str(bad)):
        with pytest.raises(ImpossibleCell, match="is not JSON"):
            ladder.rung(name)
    grid = [
        *tiny,
        "-m",
        "family=folders",
        f"family.folders=[{good},{bad}]",
        "teacher=good,bad",
        "student=40k",
        "plan=true",
    ]
    done = run_here(*grid, f"store={good.parent / 'store'}", cwd=good.parent)
    assert done.returncode == 0, done.stderr
    assert "plan: 1 cell," in done.stdout and "skipped" in done.stdout and "config.json is not JSON" in done.stdout
    with pytest.raises(ConfigError, match="is not JSON"):
        checkpoint_family([str(bad)])


def test_a_generation_config_that_would_not_save_is_mended_in_copies(copy):
    from capacity_gap.models.loading import load_model, save_model

    given = {"bos_token_id": 0, "eos_token_id": 0, "temperature": 0.7, "top_p": 0.8}
    folder = copy(generation_config_json=json.dumps(given).encode())
    save_model(load_model(folder), folder.parent / "saved")
    saved = json.loads((folder.parent / "saved/generation_config.json").read_text())
    assert saved["temperature"] == 0.7 and saved["do_sample"] is True
    worse = copy("w", generation_config_json=json.dumps(given | {"temperature": -1.0, "num_beams": "x"}).encode())
    save_model(load_model(worse), folder.parent / "again")
    assert json.loads((folder.parent / "again/generation_config.json").read_text())["eos_token_id"] == 0


def test_code_of_a_folder_is_never_run(copy, monkeypatch):
    from transformers import AutoModelForCausalLM

    from capacity_gap.models.loading import load_model, published_tokenizer, whole_model

    folder = copy(config_json=lambda c: c | {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    load_model(folder)
    published_tokenizer(str(folder))
    # A kind that transformers does not know: without our refusal it would ask, and run what the folder names.
    own = copy("own", config_json=lambda c: c | {"model_type": "mine", "auto_map": {"AutoConfig": "own.C"}})
    (own / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *given: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for load in (lambda: load_model(own), lambda: whole_model(AutoModelForCausalLM, own)):
        with pytest.raises((UserError, ValueError, OSError)):
            load()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "-1.0", "0", "3"])
def test_an_epsilon_that_is_no_small_number_is_refused(copy, value):
    text = json.dumps(json.loads((copy() / "config.json").read_text()) | {"rms_norm_eps": 12345})
    folder = copy("eps", config_json=text.replace("12345", value).encode())
    with pytest.raises(ConfigError, match="not a number between 0 and 1|not a JSON"):
        read_config(folder)


def test_a_pipe_among_the_weights_is_passed_over(copy):
    folder = copy()
    os.mkfifo(folder / "other.safetensors")
    assert list(checkpoint_family([str(folder)]).rungs) == [folder.name]


def test_rows_with_blank_lines_and_names_that_are_none(tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(talk) + "\n\n" + json.dumps(talk) + "\n\n")
    assert len(read_rows(file, "instruct.path", TALK)) == 2 == rows_in(str(file))
    for wrong in (json.dumps(talk | {"task": ["x"]}), '{"messages": 1' + "0" * 5000 + "}"):
        file.write_text(json.dumps(talk) + "\n\n" + wrong)
        with pytest.raises(ConfigError, match="line 3"):
            read_rows(file, "instruct.path", TALK)


@pytest.mark.slow
def test_a_sample_of_the_fuzz_is_read_or_refused():
    """The whole is `python -m benchmarks.fuzz`, whose table is results/fuzz.csv."""

    command = [sys.executable, "-m", "benchmarks.fuzz", "--rounds", "15", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
