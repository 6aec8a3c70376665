"""Vocabulary expansion: exact round trips, old text as before, new rows the means of what spelt them."""

import json
from itertools import islice

import pytest
import torch

from capacity_gap.data.expand import PARTS, Spelling, expand_tokenizer, text_per_token
from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer
from capacity_gap.errors import ConfigError
from capacity_gap.models.axes import padded
from capacity_gap.models.expand import expand_checkpoint
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import load_model, new_model, save_model

ROOM = 100
# Hiragana, Cyrillic, Greek and Han, so that the tests need no extra; each paragraph once for learning, once held out.
SECOND = """
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны поступать
в отношении друг друга в духе братства. Каждый человек должен обладать всеми правами и всеми свободами.
人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神互相對待。人人有權享有生命、自由和人身安全。
すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
""".strip().split("\n")
MIXED = ["a word of 人人 in English,  two spaces\tand tabs\n", "naïve café — “quoted” 𡃉囖 🙂", "", " ", "人", "Все"]


@pytest.fixture(scope="module")
def english(text_file) -> list[str]:
    return text_file.read_text(encoding="utf-8").split("\n\n")[:300]


def _save(tokenizer, folder):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def _sentencepiece(kind, texts, out, vocab):
    """A tokenizer as SentencePiece's models come to transformers: `▁` for a space, bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    ends, raw = ["<unk>", "</s>"], [f"<0x{b:02X}>" for b in range(256)]
    model = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True) if kind == "BPE" else models.Unigram()
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if kind == "BPE":
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[*ends, *raw], show_progress=False)
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab, special_tokens=[*ends, *raw], unk_token="<unk>", show_progress=False
        )
    pieces = [w for t in texts for w in t.replace(" ", " ▁").split(" ")]  # words, so that training is quick
    tokenizer.train_from_iterator(pieces, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["byte_fallback"] = True
    content["added_tokens"] = content["added_tokens"][:2]
    _save(Tokenizer.from_str(json.dumps(content)), out)


@pytest.fixture(scope="module", params=["byte_level", "BPE", "Unigram"])
def grown(request, english, tmp_path_factory):
    """The folders of a tokenizer before and after it learnt the second script."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    if request.param == "byte_level":
        train_tokenizer(english, 512, before)
    else:
        _sentencepiece(request.param, english, before, 600)
    size = len(load_tokenizer(before)) + ROOM
    assert expand_tokenizer(before, after, size=size, texts=[*english, *SECOND * 3])["after"] <= size
    return before, after


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_round_trips_are_exact_in_both_scripts(grown, english):
    for folder in grown:
        tokenizer = load_tokenizer(folder)
        for text in [*english[:50], *SECOND, *MIXED]:
            ids = _ids(tokenizer, text)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_ascii_text_is_tokenised_as_before_and_the_second_script_in_fewer_tokens(grown, english):
    old, new = map(load_tokenizer, grown)
    ascii_only = [t for t in english if t.isascii()]
    assert len(ascii_only) > 100
    assert [_ids(old, t) for t in ascii_only] == [_ids(new, t) for t in ascii_only]
    before, after = (sum(len(_ids(t, text)) for text in SECOND) for t in (old, new))
    assert after < 0.75 * before


def test_a_text_without_new_tokens_is_tokenised_as_before(grown):
    old, new = map(load_tokenizer, grown)
    untouched = [t for t in ["שלום", "naïve ÿ", "🙂🙂", "ØÅ", *MIXED] if max(_ids(new, t), default=0) < len(old)]
    assert len(untouched) >= 4
    assert [_ids(old, t) for t in untouched] == [_ids(new, t) for t in untouched]


def test_parts_spell_the_new_tokens(grown):
    """The old tokens that a new one is averaged from are what spelt its text before."""
    old, new = map(load_tokenizer, grown)
    found = json.loads((grown[1] / PARTS).read_text())
    spelling = Spelling.of(json.loads(old.backend_tokenizer.to_str()))
    assert found["first"] == len(old)
    checked = 0
    for i, ids in enumerate(found["parts"]):
        value = spelling.read(new.convert_ids_to_tokens(len(old) + i))
        assert len(ids) > 1 or spelling.by_byte is False
        if not value.startswith(b" "):
            try:
                text = value.decode()
            except UnicodeDecodeError:
                continue  # a part of a character
            assert ids == _ids(old, text)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("kind", ["byte_level", "BPE"])
def test_tokens_of_a_second_tokenizer_are_added(kind, english, tmp_path):
    for name in ("one", "two", "out"):
        (tmp_path / name).mkdir()
    if kind == "byte_level":
        train_tokenizer(english, 400, tmp_path / "one")
    else:
        _sentencepiece("BPE", english, tmp_path / "one", 500)
    train_tokenizer(SECOND * 3, 600, tmp_path / "two")
    size = len(load_tokenizer(tmp_path / "one")) + ROOM
    expand_tokenizer(tmp_path / "one", tmp_path / "out", size=size, second=tmp_path / "two")
    old, new, two = (load_tokenizer(tmp_path / n) for n in ("one", "out", "two"))
    assert sum(len(_ids(new, t)) for t in SECOND) < 0.8 * sum(len(_ids(old, t)) for t in SECOND)
    assert [_ids(old, t) for t in english[:100] if t.isascii()] == [_ids(new, t) for t in english[:100] if t.isascii()]
    assert [new.decode(_ids(new, t), clean_up_tokenization_spaces=False) for t in SECOND] == SECOND
    if kind == "byte_level":
        added = set(new.get_vocab()) - set(old.get_vocab())
        assert added <= set(two.get_vocab())


def test_what_cannot_be_expanded_says_so(english, tmp_path):
    train_tokenizer(english, 400, tmp_path)
    with pytest.raises(ConfigError, match="expand.vocab=300, but the tokenizer already has 400 tokens"):
        expand_tokenizer(tmp_path, tmp_path, size=300, texts=SECOND)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["10GB", "40KB"])
def test_new_rows_are_the_means_of_old_ones_and_nothing_else_changes(tied, shards, tmp_path):
    shape = {**FAMILIES["pico"].rungs["55k"], "tie_word_embeddings": tied}
    model = new_model(shape, 0)
    (tmp_path / "out").mkdir()
    if shards == "10GB":
        save_model(model, tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size=shards)
    parts = [[5, 7], [9, 9, 12]]
    expand_checkpoint(tmp_path, tmp_path / "out", first=1020, parts=parts, rows=padded(1030, 64))
    grown = load_model(tmp_path / "out")
    assert grown.config.vocab_size == 1088
    matrices = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name, parameter in grown.named_parameters():
        old = dict(model.named_parameters())[name]
        if name in matrices:
            assert torch.equal(parameter[:1020], old[:1020])
            torch.testing.assert_close(parameter[1020], old[[5, 7]].mean(0))
            torch.testing.assert_close(parameter[1021], old[[9, 9, 12]].mean(0))
            torch.testing.assert_close(parameter[1087], old[:1020].mean(0))
        else:
            assert torch.equal(parameter, old), name
    tokens = torch.tensor([list(islice(range(3, 1000, 7), 40))])
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens).logits[..., :1020], model(tokens).logits[..., :1020])


def test_the_cantonese_corpus_is_speech_as_chinese_is_written():
    pytest.importorskip("pycantonese")
    from capacity_gap.data.documents import cantonese_documents

    documents = list(cantonese_documents())
    text = "\n".join(d.text for d in documents)
    assert len({d.group for d in documents}) == 58, "a conversation is never divided between splits"
    assert 0.7 < sum(len(c.encode()) for c in text if not c.isascii()) / len(text.encode()) < 1
    assert "跟住後來呢我唔想跑" in text
    assert "assistant manager" in text, "Latin words stay apart"


def test_bytes_per_token_are_counted_by_script(english, tmp_path):
    train_tokenizer(english, 400, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    spent = text_per_token(tokenizer, ["人人生", "all people", "free"])
    assert spent["second"] == 9 / len(_ids(tokenizer, "人人生"))
    assert spent["first"] == 14 / (len(_ids(tokenizer, "all people")) + len(_ids(tokenizer, "free")))
    assert text_per_token(tokenizer, ["only one"])["second"] is None
