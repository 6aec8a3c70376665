"""Text, split, tokens, budgets."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capacity_gap.cell import pipeline
from capacity_gap.data import corpora, corpus, documents, packing, sources, tokenizer
from capacity_gap.data.corpus_config import CorpusConfig, SourceConfig
from capacity_gap.data.documents import Document
from capacity_gap.settings.errors import ConfigError, StageError
from tests.conftest import compose


def test_html_becomes_plain_text():
    markup = "<p>Adds an <b>object</b> to a&nbsp;bucket &lt;x&gt;.</p><note><p>Not   here.</p></note>"
    assert documents.strip_html(markup) == "Adds an object to a bucket <x>.\nNot here."


def test_groups_are_never_divided_and_every_document_is_in_one_split():
    given = [Document(f"text {g} {i} " * (g + 1), f"g{g}") for g in range(40) for i in range(5)]
    splits = corpus.split_by_group(given, validation=0.1, test=0.1)
    places = {name: {d.group for d in part} for name, part in splits.items()}
    assert sum(map(len, splits.values())) == len(given)
    assert all(splits.values())
    assert not (places["train"] & places["test"] or places["train"] & places["validation"])
    held = sum(len(d.text) for d in splits["test"]) / sum(len(d.text) for d in given)
    assert 0.05 < held <= 0.1 * corpus.OVERSHOOT


def test_containment_counts_runs_of_eight_words():
    known = corpus.shingle_hashes([Document("a b c d e f g h i", "t")])  # two runs
    assert corpus.containment("A B C D E F G H", known) == 1.0
    assert corpus.containment("a b c d e f g h x", known) == 0.5
    assert corpus.containment("a b c", known) == 0.0


def test_near_duplicates_leave_the_held_out_parts(tmp_path):
    words = np.random.default_rng(0).integers(0, 5000, (90, 30))
    given = [Document(" ".join(map(str, text)), f"g{i // 3}") for i, text in enumerate(words)]
    held = {d.group for d in corpus.split_by_group(given, validation=0.1, test=0.1)["test"]}
    source = next(d for d in given if d.group not in held)
    copies = [Document(source.text + f" tail{g}", g) for g in sorted(held)]
    manifest = corpus.build_corpus([*given, *copies], tmp_path, validation=0.1, test=0.1)
    assert manifest["overlap"]["test"]["near_duplicate_rate_before"] > 0
    assert manifest["overlap"]["test"]["near_duplicate_rate"] == 0
    assert not any("tail" in text for text in corpus.read_texts(tmp_path, "test"))


def test_a_corpus_is_the_same_bytes_twice(tmp_path):
    given = [Document(f"sentence number {i} of group {i // 4}, with some words", f"g{i // 4}") for i in range(200)]
    digests = []
    for name in "ab":
        (tmp_path / name).mkdir()
        digests.append(corpus.build_corpus(given, tmp_path / name, validation=0.1, test=0.1)["digest"])
    assert digests[0] == digests[1]
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()


def test_too_small_a_corpus_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"too small or too uniform.*Provide more text"):
        corpus.build_corpus([Document("one", "a")], tmp_path, validation=0.1, test=0.1)


def test_embedded_prose_is_prose_without_exact_copies():
    found = [d for d, _ in zip(corpora.ServiceDocumentation().documents(None), range(2000), strict=False)]
    lines = [line for d in found for line in d.text.split("\n")]
    assert len({d.text for d in found}) == len(found)
    assert not any("<p>" in line or "</" in line for line in lines)
    assert np.mean([len(d.text) for d in found]) > 200


def test_embedded_code_is_code():
    found = [d for d, _ in zip(corpora.SymbolicCode().documents(None), range(50), strict=False)]
    assert all(d.group.endswith(".py") for d in found)
    assert sum("def " in d.text for d in found) > 25


def test_a_wrong_version_of_a_pinned_wheel_is_refused(monkeypatch):
    monkeypatch.setattr(corpora.ServiceDocumentation, "version", "0.0.1")
    with pytest.raises(
        ConfigError, match=r"of the package botocore 0\.0\.1, but botocore .* is installed.*\[embedded\]"
    ):
        next(corpora.ServiceDocumentation().documents(None))


def test_a_mixture_takes_bytes_by_weight_as_far_as_the_scarcest_part_goes():
    long, short = ([Document("x" * 100, f"{i}") for i in range(n)] for n in (1000, 50))
    found = list(sources.mixed([long, short], [3.0, 1.0]))
    counts = [sum(d.group.startswith(f"{part}/") for d in found) for part in (0, 1)]
    assert counts == [150, 50]


def test_a_dataset_is_streamed_from_the_hub_or_a_local_folder(tmp_path):
    rows = "".join(json.dumps({"body": f"row {i}", "n": i}) + "\n" for i in range(250))
    (tmp_path / "train.jsonl").write_text(rows)
    given = SourceConfig(name="hub", dataset=str(tmp_path), column="body", documents=220)
    found = list(sources.documents(given))
    assert [d.text for d in found[:2]] == ["row 0", "row 1"]
    assert len(found) == 220
    assert len({d.group for d in found}) == 3
    with pytest.raises(StageError, match=r"no column 'text'. It has: body, n. Name one with corpus.column="):
        list(sources.documents(SourceConfig(name="hub", dataset=str(tmp_path))))
    with pytest.raises(StageError, match=r"cannot be read.*a folder of .jsonl or .parquet files does"):
        list(sources.documents(SourceConfig(name="hub", dataset=str(tmp_path / "none"))))


def test_identity_of_a_source_is_its_content_or_its_name(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the same text")
    one, two = (sources.identity(SourceConfig(name="text", path=str(tmp_path / f"{n}.txt"))) for n in "ab")
    assert one == two
    parts = [SourceConfig(name="embedded", weight=3.0), SourceConfig(name="code")]
    mixture = CorpusConfig(name="mixture", parts=parts)
    assert sources.identity(mixture)["parts"][0] == {"name": "embedded", "weight": 3.0, "botocore": "1.43.11"}
    assert sources.corpus_name(mixture) == "3*embedded+1*code"


def test_text_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\nline\n\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "third"}\n')
    assert [d.text for d in documents.text_documents(tmp_path)] == ["first", "second\nline", "third"]
    (tmp_path / "b.jsonl").write_text('{"body": "third"}\n')
    with pytest.raises(ConfigError, match=r"b\.jsonl, line 1: .*field `text`"):
        list(documents.text_documents(tmp_path))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_one_small_file_is_split(tmp_path, kind):
    words = random.Random(0).choices([f"w{i}" for i in range(5000)], k=40 * 12)
    texts = [" ".join(words[12 * i : 12 * i + 12]) for i in range(40)]
    file = tmp_path / f"mine.{kind}"
    lines = [json.dumps({"text": t}) for t in texts] if kind == "jsonl" else texts
    file.write_text(("\n" if kind == "jsonl" else "\n\n").join(lines))
    found = corpus.build_corpus(documents.text_documents(file), tmp_path, validation=0.05, test=0.05)
    counts = {name: part["documents"] for name, part in found["splits"].items()}
    assert counts == {"train": 36, "validation": 2, "test": 2}


def test_files_and_services_are_never_divided(tmp_path):
    given = [Document(f"{g} text {i} " * 12, g) for g in ("a", "b") for i in range(50)]
    with pytest.raises(ConfigError, match="too small or too uniform"):
        corpus.build_corpus(given, tmp_path, validation=0.1, test=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("tok")
    texts = [d.text for d in documents.text_documents(text_file)]
    for name in "ab":
        tokenizer.train_tokenizer(texts, 400, out / name)
    return out, texts


def test_equal_texts_give_an_equal_tokenizer(trained):
    out, _ = trained
    assert (out / "a/tokenizer.json").read_bytes() == (out / "b/tokenizer.json").read_bytes()


@given(text=st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_any_text_round_trips_and_bytes_add_up(trained, text):
    tok = tokenizer.load_tokenizer(trained[0] / "a")
    ids = tok(text, add_special_tokens=False)["input_ids"]
    table = tokenizer.bytes_per_id(tok)
    if "<|endoftext|>" not in text:
        assert tok.decode(ids, clean_up_tokenization_spaces=False) == text
        assert sum(table[i] for i in ids) == len(text.encode())


def test_packed_sequences_predict_every_token_once(trained, tmp_path):
    out, texts = trained
    tok = tokenizer.load_tokenizer(out / "a")
    total = packing.pack(texts, tok, tmp_path / "train")
    packed = packing.Packed(tmp_path / "train", 16)
    flat = np.concatenate([[*tok(t, add_special_tokens=False)["input_ids"], 0] for t in texts])
    assert total == len(flat)
    everything = packed.batch(np.arange(len(packed)))
    assert everything.shape == (len(packed), 17)
    np.testing.assert_array_equal(everything[:, :-1].ravel(), flat[: len(packed) * 16])
    np.testing.assert_array_equal(everything[:, 1:].ravel(), flat[1 : len(packed) * 16 + 1])


def test_a_token_that_begins_sequences_takes_the_place_of_an_input_and_of_no_label(trained, tmp_path):
    out, texts = trained
    tok = tokenizer.load_tokenizer(out / "a")
    found = []
    for name, begin in (("plain", None), ("begun", 7)):
        packing.pack(texts, tok, tmp_path / name, begin=begin)
        packed = packing.Packed(tmp_path / name, 16)
        found.append(packed.batch(np.arange(len(packed))))
    plain, begun = found
    assert set(begun[:, 0]) == {7} != set(plain[:, 0])
    np.testing.assert_array_equal(begun[:, 1:], plain[:, 1:])


def test_sequences_for_gemma_begin_as_its_texts_do():
    """Without that token Gemma 3 270M has 1.6 nats more."""
    gemma = ["family=gemma3", "student=270m", "teacher=270m", "prune.init=random"]
    cell, off, llama = (
        pipeline.resolve(compose(words)) for words in (gemma, [*gemma, "corpus.bos=false"], ["corpus.bos=true"])
    )
    assert (cell.tokens.config, off.tokens.config, llama.tokens.config) == ({"bos": True}, {}, {"bos": True})
    assert "corpus.bos" not in cell.description.get("settings", ""), "it is usual there"
    assert "corpus.bos=False" in off.description["settings"]
    assert "corpus.bos=True" in llama.description["settings"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    stem = tmp_path_factory.mktemp("packed") / "train"
    np.arange(1001, dtype="<u2").tofile(stem.with_suffix(".bin"))
    stem.with_suffix(".json").write_text(json.dumps({"dtype": "<u2", "tokens": 1001}))
    return packing.Packed(stem, 10)


@given(small=st.integers(10, 1000), large=st.integers(10, 1000))
def test_budgets_nest(packed, small, large):
    small, large = sorted((small, large))
    np.testing.assert_array_equal(packing.subset(packed, large)[: small // 10], packing.subset(packed, small))


@given(budget=st.integers(10, 1000), seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)))
def test_seeds_reorder_the_same_sequences(packed, budget, seeds):
    chosen = packing.subset(packed, budget)
    one, two = (packing.order(chosen, s) for s in seeds)
    assert sorted(one) == sorted(two) == sorted(chosen)
    assert len(chosen) < 8 or list(one) != list(two)


def test_epochs_repeat_the_text_and_must_be_said(packed):
    with pytest.raises(ConfigError, match=r"data=2k with epochs=1 .* holds 1,000.*epochs=2"):
        packing.subset(packed, 2000)
    chosen = packing.subset(packed, 2000, epochs=2)
    seen = packing.order(chosen, 0, epochs=2)
    assert len(seen) == 200
    assert sorted(seen[:100]) == sorted(seen[100:]) == list(range(100))


def test_an_offset_passes_over_the_first_tokens_and_says_what_is_left():
    packed = type("Packed", (), {"sequence_length": 8, "__len__": lambda self: 100})()
    whole = packing.subset(packed, 800)
    assert np.array_equal(packing.subset(packed, 160, skip=400), whole[50:70])
    assert np.array_equal(packing.subset(packed, 320, epochs=2, skip=400), whole[50:70])
    with pytest.raises(ConfigError, match="holds 400 behind data_offset=400. Set at most data=400"):
        packing.subset(packed, 480, skip=400)
    with pytest.raises(ConfigError, match="holds 0 behind"):
        packing.subset(packed, 80, skip=900)


def test_an_offset_is_another_cell_with_another_signal_and_the_same_teacher():
    given = ["student=40k", "teacher=55k", "distill.signal=sampled"]
    plain, other = (pipeline.resolve(compose([*given, *more])) for more in ([], ["data_offset=128k"]))
    assert plain.teacher.digest == other.teacher.digest and plain.student.digest == other.student.digest
    assert plain.distilled.digest != other.distilled.digest
    assert plain.distilled.inputs["signal"].digest != other.distilled.inputs["signal"].digest
    assert other.description["settings"] == "data_offset=128k"
    assert pipeline.resolve(compose([*given, "data_offset=0"])).record.digest == plain.record.digest
