"""Vocabulary expansion: ids that stay, exact round trips, old text as before, new rows the means of what spelt them."""

import json
from itertools import islice

import pytest
import torch

from capacity_gap.data.expand_tokenizer import PARTS, Spelling, expand_tokenizer, text_per_token
from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer
from capacity_gap.models.axes import padded
from capacity_gap.models.expand_embeddings import expand_checkpoint
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import load_model, new_model, save_model
from capacity_gap.settings.errors import ConfigError, StageError

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


def _pythia(vocab, merges):
    """Pythia's layout: runs of spaces that are found after normalisation, as tokens behind the model's vocabulary."""
    from tokenizers import AddedToken
    from transformers import GPTNeoXTokenizer

    tokenizer = GPTNeoXTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (24, 16, 8, 4, 3, 2)])
    return tokenizer


def _qwen(vocab, merges):
    """Qwen2.5's layout: roles and tools behind the model's vocabulary, some special, some not."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return tokenizer


def _make(kind, texts, out):
    """A tokenizer of one kind, saved to `out`."""
    if kind in ("BPE", "Unigram"):
        _sentencepiece(kind, texts, out, 600)
        return
    train_tokenizer(texts, 512, out)
    if kind == "ignore_merges":  # Llama 3's: a word that is in the vocabulary is its token, whatever merges say
        content = json.loads((out / "tokenizer.json").read_text())
        content["model"]["ignore_merges"] = True
        (out / "tokenizer.json").write_text(json.dumps(content))
    if kind in ("pythia", "qwen"):
        model = json.loads((out / "tokenizer.json").read_text())["model"]
        for file in out.iterdir():
            file.unlink()
        make = _pythia if kind == "pythia" else _qwen
        make(model["vocab"], [tuple(pair) for pair in model["merges"]]).save_pretrained(out)
    if kind == "unigram_added":
        for file in out.iterdir():
            file.unlink()
        _sentencepiece("Unigram", texts, out, 600)
        tokenizer = load_tokenizer(out)
        tokenizer.add_tokens(["<tool_call>", "    "])
        tokenizer.save_pretrained(out)


KINDS = ["byte_level", "ignore_merges", "pythia", "qwen", "BPE", "Unigram", "unigram_added"]


@pytest.fixture(scope="module", params=KINDS)
def grown(request, english, tmp_path_factory):
    """The folders of a tokenizer before and after it learnt the second script."""
    before, after = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    _make(request.param, english, before)
    size = len(load_tokenizer(before)) + ROOM
    found = expand_tokenizer(before, after, size=size, texts=[*_typographic(english), *SECOND * 3])
    assert size - 0.1 * ROOM <= found["after"] <= size
    return before, after


def _typographic(texts):
    """English as it is printed: with quotation marks, dashes and accents, and more of them than of the new script."""
    return [
        t.replace('"', "“").replace("'", "’").replace(" - ", " — ").replace("...", "…") + " naïve café" for t in texts
    ]


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_round_trips_are_exact_in_both_scripts(grown, english):
    for folder in grown:
        tokenizer = load_tokenizer(folder)
        for text in [*english[:50], *SECOND, *MIXED]:
            ids = _ids(tokenizer, text)
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_latin_text_is_tokenised_as_before_and_the_second_script_in_fewer_tokens(grown, english):
    old, new = map(load_tokenizer, grown)
    printed = _typographic(english)
    assert sum("“" in t or "’" in t for t in printed) > 100
    code = ["if x:\n    y = 1\n\n\n        z", "<|im_start|>user <tool_call>", "Ẻ ﬁ 🙂🙂 € ½ → ≤ ₂ Łódź"]
    for text in (*english, *printed, *code):
        assert _ids(old, text) == _ids(new, text)
    before, after = (sum(len(_ids(t, text)) for text in SECOND) for t in (old, new))
    assert after < 0.75 * before


def test_every_token_keeps_its_id_and_no_two_share_one(grown):
    """`tokenizers` numbers added tokens anew when it loads a file, from the size of the model's vocabulary on."""
    old, new = (load_tokenizer(folder).get_vocab() for folder in grown)
    assert {token: new[token] for token in old} == old
    assert sorted(new.values()) == list(range(len(new)))


def test_the_expanded_tokenizer_is_the_same_after_it_is_saved_again(grown, tmp_path):
    """As tuning does, with a chat template; and as an export does."""
    new = load_tokenizer(grown[1])
    new.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == new.get_vocab()
    assert [_ids(again, t) for t in SECOND] == [_ids(new, t) for t in SECOND]


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
    assert len(found["parts"]) == len(new) - len(old)
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
    expand_tokenizer(tmp_path / "one", tmp_path / "out", size=size, texts=[], second=load_tokenizer(tmp_path / "two"))
    old, new, two = (load_tokenizer(tmp_path / n) for n in ("one", "out", "two"))
    assert sum(len(_ids(new, t)) for t in SECOND) < 0.8 * sum(len(_ids(old, t)) for t in SECOND)
    assert [_ids(old, t) for t in _typographic(english)] == [_ids(new, t) for t in _typographic(english)]
    assert [new.decode(_ids(new, t), clean_up_tokenization_spaces=False) for t in SECOND] == SECOND
    added, spelling = set(new.get_vocab()) - set(old.get_vocab()), Spelling(by_byte=True)
    if kind == "byte_level":
        borrowed = {spelling.read(token) for token in set(two.get_vocab())}
        assert all(any(b.startswith(spelling.read(a)) for b in borrowed) for a in added), "nothing of its own"
        assert len([a for a in added if spelling.read(a) in borrowed]) > 0.8 * len(added)


def test_a_character_is_built_from_its_first_byte_where_the_second_tokenizer_did_not(english, tmp_path):
    """Its merges join the last two bytes first, which may be the end of a shared character and so are not taken."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first, second, third = (Spelling(by_byte=True).write(bytes([b])) for b in "人".encode())
    vocab = {token: i for i, token in enumerate((first, second, third, second + third, first + second + third))}
    merges = [(second, third), (first, second + third)]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    train_tokenizer(english, 400, tmp_path)
    (tmp_path / "out").mkdir()
    two = PreTrainedTokenizerFast(tokenizer_object=raw)
    expand_tokenizer(tmp_path, tmp_path / "out", size=402, texts=english, second=two)
    new = load_tokenizer(tmp_path / "out")
    assert _ids(new, "人") == [401]
    assert new.convert_ids_to_tokens([400, 401]) == [first + second, first + second + third]


def test_what_cannot_be_expanded_says_so(english, tmp_path):
    train_tokenizer(english, 400, tmp_path)
    with pytest.raises(ConfigError, match="expand.vocab=300, but the tokenizer already has 400 tokens"):
        expand_tokenizer(tmp_path, tmp_path, size=300, texts=SECOND)
    with pytest.raises(ConfigError, match="no token to add was found"):
        expand_tokenizer(tmp_path, tmp_path, size=500, texts=_typographic(english))


def test_too_few_tokens_for_the_room_say_how_many_there_are(english, tmp_path):
    """The number that the message gives is one that works."""
    (tmp_path / "out").mkdir()
    train_tokenizer(english, 400, tmp_path)
    with pytest.raises(ConfigError, match=r"asks for 8,600 tokens in addition to the old 400, but only") as caught:
        expand_tokenizer(tmp_path, tmp_path / "out", size=9000, texts=SECOND * 3)
    assert list((tmp_path / "out").iterdir()) == []
    size = int(str(caught.value).split("Set expand.vocab=")[1].split(",")[0])
    assert expand_tokenizer(tmp_path, tmp_path / "out", size=size, texts=SECOND * 3)["after"] == size


@pytest.mark.parametrize("harm", ["moved", "merged"])
def test_an_expanded_tokenizer_that_reads_otherwise_is_refused(harm, english, tmp_path, monkeypatch):
    """Whatever a tokenizer's file may hold that is not foreseen: nothing is kept that changes old text."""
    from capacity_gap.data import expand_tokenizer as module

    def harmful(content, found, *, first):
        made = expand_fully(content, found, first=first)
        if harm == "moved":
            swapped = {"Ġa": made["model"]["vocab"]["Ġt"], "Ġt": made["model"]["vocab"]["Ġa"]}
            return {**made, "model": {**made["model"], "vocab": made["model"]["vocab"] | swapped}}
        return {**made, "model": {**made["model"], "merges": made["model"]["merges"][5:]}}

    expand_fully = module.with_tokens
    monkeypatch.setattr(module, "with_tokens", harmful)
    (tmp_path / "out").mkdir()
    train_tokenizer(english, 400, tmp_path)
    with pytest.raises(StageError, match="keep their ids" if harm == "moved" else "would tokenise '.*' differently"):
        expand_tokenizer(tmp_path, tmp_path / "out", size=450, texts=[*english, *SECOND * 3])


@pytest.mark.parametrize(
    ("token", "may"),
    [
        ("人", True),
        (" 人人", True),
        ("人".encode()[:2], True),
        ("。", True),
        ("я", True),
        ("人".encode() + "好".encode()[:1], True),
        ("人a", False),
        (" ", False),
        ("“", False),
        ("人”", False),
        ("é", False),
        ("🙂", False),
        ("“".encode()[:2], False),
        ("人".encode()[1:], False),
        ("🙂".encode()[:2], False),
    ],
)
def test_what_a_new_token_may_hold(token, may):
    spelling = Spelling(by_byte=True)
    assert spelling.is_new_script(spelling.write(token if isinstance(token, bytes) else token.encode())) is may


def test_a_part_of_a_character_is_judged_by_all_that_it_may_become():
    """Against the definition: some character with these first bytes is a shared one."""
    from capacity_gap.data.scripts import SHARED, is_shared

    shared = {chr(c).encode()[:n] for a, b in SHARED for c in range(a, b + 1) for n in range(1, 5)}
    for code in (*range(0x80, 0xD800, 7), *range(0xE000, 0x110000, 13)):
        for n in range(2, len(chr(code).encode()) + 1):  # every single byte is a token already
            start = chr(code).encode()[:n]
            assert is_shared(start) == (start in shared), (hex(code), n)


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


def test_a_tokenizer_with_more_tokens_than_its_model_has_rows():
    """A padding token that was added and never trained: new rows still stand where the tokenizer numbers them."""
    from capacity_gap.models.expand_embeddings import grown as grown_matrix

    matrix = torch.arange(12.0).reshape(4, 3)
    found = grown_matrix(matrix, 6, [[0, 2]], 8)
    assert torch.equal(found[:4], matrix)
    assert torch.equal(found[6], matrix[[0, 2]].mean(0))
    assert all(torch.equal(found[i], matrix.mean(0)) for i in (4, 5, 7))


def test_the_cantonese_corpus_is_speech_as_chinese_is_written():
    pytest.importorskip("pycantonese")
    from capacity_gap.data.corpora import CantoneseSpeech

    documents = list(CantoneseSpeech().documents(None))
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
