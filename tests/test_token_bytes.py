"""Bytes of token ids: summed over a text they are the text's, for each kind of tokenizer, or they are not known."""

import json
import random
import re
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from capacity_gap.data import token_bytes
from capacity_gap.data.packing import Packed, pack
from capacity_gap.data.token_bytes import PROBE, kind_of, old_bytes_were_wrong
from capacity_gap.data.tokenizer import bytes_per_id, load_tokenizer, train_tokenizer

TEXT = "naïve café 你好，世界 — emoji 🙂 and plain words, again and again. 你好 你好"
BYTES = len(TEXT.encode())  # 91
LEARNT = [TEXT, "foo bar  baz\n\nthe lazy dog 12345"] * 50
E = "<e>"


def old_formula(tokenizer):
    """What was counted before: `len` of a token where the decoder is byte-level, else SentencePiece's spelling."""

    def sentencepiece(token):
        return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())

    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
    byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str().partition('"decoder"')[2][:400]
    width = len if byte_level else sentencepiece
    return [0 if i in special or token is None else width(token) for i, token in enumerate(tokens)]


def wrapped(raw, **roles):
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{"eos_token": E, **roles})


@lru_cache
def _vocabulary_of_bytes():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        LEARNT, trainers.BpeTrainer(vocab_size=500, special_tokens=[E], initial_alphabet=alphabet, show_progress=False)
    )
    return raw.to_str()


def by_bytes(*words, normalizer=None, cut=None, decoder="ByteLevel", special=(), **roles):
    raw = Tokenizer.from_str(_vocabulary_of_bytes())
    raw.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel() if decoder == "ByteLevel" else decoder
    if normalizer:
        raw.normalizer = normalizer
    raw.add_special_tokens(list(special))
    raw.add_tokens(list(words))
    return wrapped(raw, **roles)


@lru_cache
def _vocabulary_of_pieces():
    """Llama 2's: characters with `▁` for a space, and a token for each byte."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokens = ["<unk>", "<s>", E, *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, limit_alphabet=50, show_progress=False)
    raw.train_from_iterator([w for t in LEARNT for w in t.replace(" ", " ▁").split(" ")], trainer)
    content = json.loads(raw.to_str())
    return json.dumps({**content, "added_tokens": content["added_tokens"][:3]})


def by_pieces(*words, normalizer=None, cut=None, special=()):
    raw = Tokenizer.from_str(_vocabulary_of_pieces())
    if normalizer:
        raw.normalizer = normalizer
    if cut:
        raw.pre_tokenizer = cut
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(list(special))
    raw.add_tokens(list(words))
    return wrapped(raw, unk_token="<unk>", bos_token="<s>")


def unigram(*, scheme="always", normalizer=None, fallback=False, **roles):
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace()
    tokens = [E, "<unk>", *(f"<0x{b:02X}>" for b in range(256) if fallback)]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=tokens, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(LEARNT, trainer)
    content = json.loads(raw.to_str())
    content["model"]["byte_fallback"], content["added_tokens"] = fallback, content["added_tokens"][:2]
    raw = Tokenizer.from_str(json.dumps(content))
    if normalizer:
        raw.normalizer = normalizer
    return wrapped(raw, **roles)


def by_words(model, trainer, *, cut=None, decoder=None, normalizer=None):
    raw = Tokenizer(model)
    raw.pre_tokenizer = cut or pre_tokenizers.Whitespace()
    if normalizer:
        raw.normalizer = normalizer
    raw.train_from_iterator(LEARNT, trainer(special_tokens=[E, "[UNK]"], show_progress=False))
    if decoder:
        raw.decoder = decoder
    return wrapped(raw, unk_token="[UNK]")


def qwen_cut():
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def llama_normalizer():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def metaspace(scheme):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


SPACES = [AddedToken(" " * n, normalized=True) for n in (24, 16, 8, 4, 3, 2)]
ROLES = ("<|im_start|>", "<|im_end|>")
TOOLS = [AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)]
INST = [AddedToken("[INST]", normalized=False), AddedToken("[/INST]", normalized=False)]

# Each with the bytes that its sums have too many on a text: the space that some put before it.
UNCHANGED = {
    "gpt2": (lambda: by_bytes(bos_token=E, unk_token=E), 0),
    "pythia": (lambda: by_bytes(*SPACES, normalizer=normalizers.NFC()), 0),
    "opt": (lambda: by_bytes(special=["<pad>", "</s>"], bos_token="</s>", pad_token="<pad>", unk_token="</s>"), 0),
    "qwen2.5": (lambda: by_bytes(*TOOLS, normalizer=normalizers.NFC(), cut=qwen_cut(), special=ROLES), 0),
    "llama3": (lambda: by_bytes(cut=qwen_cut(), special=["<|reserved_special_token_0|>"]), 0),
    "byte-level with a space before": (lambda: by_bytes(cut=pre_tokenizers.ByteLevel(add_prefix_space=True)), 1),
    "llama2": (lambda: by_pieces(normalizer=llama_normalizer()), 1),
    "mistral": (lambda: by_pieces(cut=metaspace("always"), special=INST), 1),
    "mistral, the first": (lambda: by_pieces(cut=metaspace("first"), special=INST), 1),
    "gemma": (
        lambda: by_pieces("\n\n", AddedToken("▁▁", normalized=False), normalizer=normalizers.Replace(" ", "▁")),
        0,
    ),
    "llama2 + words, normalised": (lambda: by_pieces("emoji 🙂", normalizer=llama_normalizer()), 1),
    "unigram with bytes": (lambda: unigram(fallback=True, unk_token="<unk>"), 1),
    "unigram, never a space": (lambda: unigram(scheme="never", fallback=True, unk_token="<unk>"), 0),
}
COUNTED_ANEW = {
    "byte-level + words": (lambda: by_bytes("你好", "世界", "café"), 0),
    "byte-level + words, raw": (lambda: by_bytes(*(AddedToken(w, normalized=False) for w in ("你好", " 世界"))), 0),
    "qwen + words": (lambda: by_bytes("你好", " and", normalizer=normalizers.NFC(), cut=qwen_cut()), 0),
    "byte-level, no decoder": (lambda: by_bytes(decoder=None), 0),
    "byte-level in a sequence, no decoder": (lambda: by_bytes(cut=qwen_cut(), decoder=None), 0),
    "byte-level by its normaliser": (
        lambda: by_bytes(
            normalizer=normalizers.ByteLevel(), cut=pre_tokenizers.Split("Ġ", "merged_with_next"), decoder=None
        ),
        0,
    ),
    "byte-level by its normaliser + words": (
        lambda: by_bytes(
            "世界",
            AddedToken("你好", normalized=False),
            normalizer=normalizers.ByteLevel(),
            cut=pre_tokenizers.Digits(),
        ),
        0,
    ),
    "byte-level decoder after long others": (
        lambda: by_bytes(decoder=decoders.Sequence([decoders.Replace("\0" * 80, "")] * 9 + [decoders.ByteLevel()])),
        0,
    ),
    "unigram with an unknown token": (lambda: unigram(unk_token="<unk>"), 1),
    "unigram whose unknown token has no role": (unigram, 1),
}
NOT_KNOWN = {
    "wordpiece": lambda: by_words(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
    "bert": lambda: by_words(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer,
        cut=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
        normalizer=normalizers.BertNormalizer(),
    ),
    "words": lambda: by_words(models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer),
    "characters": lambda: by_words(
        models.BPE(unk_token="[UNK]"), trainers.BpeTrainer, cut=pre_tokenizers.Split("", "isolated")
    ),
    "words with ends": lambda: by_words(
        models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"), trainers.BpeTrainer, decoder=decoders.BPEDecoder()
    ),
    "byte-level after words": lambda: by_bytes(
        cut=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    ),
    "spaces put into the text": lambda: by_bytes(
        cut=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    ),
    "byte-level, lower case": lambda: by_bytes(normalizer=normalizers.Lowercase()),
    "unigram, NFKC": lambda: unigram(normalizer=normalizers.NFKC()),
    "no accents": lambda: by_bytes(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
}


@pytest.fixture(scope="module")
def stand_ins():
    """Name → tokenizer; each is made once."""
    makers = {name: make for name, (make, _) in (UNCHANGED | COUNTED_ANEW).items()} | NOT_KNOWN
    return {name: make() for name, make in makers.items()}


def counted(tokenizer, text):
    """The bytes of each token of a text."""
    lengths = bytes_per_id(tokenizer)
    return [lengths[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("name", UNCHANGED | COUNTED_ANEW)
def test_bytes_of_ids_add_up_to_the_texts(stand_ins, name):
    """But for one byte a text where the tokenizer puts a space before it, which packing keeps."""
    extra = (UNCHANGED | COUNTED_ANEW)[name][1]
    assert sum(counted(stand_ins[name], TEXT)) == BYTES + extra


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_was_right_is_what_it_was(stand_ins, name):
    assert bytes_per_id(stand_ins[name]) == old_formula(stand_ins[name])


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_no_id_has_bytes_where_text_is_lost(stand_ins, name):
    assert bytes_per_id(stand_ins[name]) == [None] * (max(stand_ins[name].get_vocab().values()) + 1)


def test_the_projects_own_tokenizer_counts_as_before(tmp_path):
    train_tokenizer(LEARNT, 400, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert sum(counted(tokenizer, TEXT)) == BYTES
    assert bytes_per_id(tokenizer) == old_formula(tokenizer)
    assert not old_bytes_were_wrong(tmp_path)


@pytest.mark.parametrize("name", UNCHANGED | COUNTED_ANEW | NOT_KNOWN)
def test_a_folder_says_whether_it_was_counted_wrongly(stand_ins, tmp_path, name):
    """As a comparison of both lists does, for the tokenizer as it is loaded."""
    stand_ins[name].save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert old_bytes_were_wrong(tmp_path) == (bytes_per_id(loaded) != old_formula(loaded)) == (name not in UNCHANGED)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        by_bytes,
        lambda *w: by_bytes(*w, normalizer=normalizers.NFC(), cut=qwen_cut()),
        lambda *w: by_bytes(*w, normalizer=normalizers.ByteLevel(), cut=pre_tokenizers.Digits(False)),
        lambda *w: by_bytes(*w, cut=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda *w: by_pieces(*w, normalizer=llama_normalizer()),
        lambda *w: by_pieces(*w, cut=metaspace("always")),
        lambda *w: by_pieces(*w, cut=metaspace("first")),
        lambda *w: by_pieces(*w, normalizer=normalizers.Replace(" ", "▁")),
    ],
)
def test_added_words_are_counted_as_in_the_text_or_not_at_all(make, normalized):
    """Any text: also where words of the model's vocabulary were added, or words with spaces in or beside them."""
    added, strips = ["foo", "你好", "  ", "café", "é", " foo", "gnu"], [("bar", "lstrip"), ("世界", "rstrip")]
    tokenizer = make(
        *(AddedToken(w, normalized=normalized) for w in added), *(AddedToken(w, **{s: True}) for w, s in strips)
    )
    table, prepends = bytes_per_id(tokenizer), kind_of(json.loads(tokenizer.backend_tokenizer.to_str())).prepends
    words = [*added, "bar", "世界", " ", "\n", "x", "🙂", "12", "Ġ", "ß", "gnat"]
    draw, known = random.Random(0), 0
    for _ in range(300):
        text = "".join(draw.choices(words, k=draw.randint(1, 6)))
        lengths = [table[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if None not in lengths:
            known += 1
            assert 0 <= sum(lengths) - len(text.encode()) <= prepends, text
    assert known > 20


def test_a_word_that_is_bytes_too_is_not_counted():
    """`é` added is the id of byte 0xE9 as well: two bytes of a text, or one."""
    tokenizer = by_bytes("é")
    assert bytes_per_id(tokenizer)[tokenizer.convert_tokens_to_ids("é")] is None
    assert None not in counted(tokenizer, "foo bar")


def test_words_that_swallow_spaces_are_not_counted():
    tokenizer = by_bytes(AddedToken("<sep>", rstrip=True), AddedToken("<x>"))
    assert counted(tokenizer, "<sep>  ") == [None]
    assert counted(tokenizer, "<x>") == [3]


def test_unknown_text_is_not_counted_and_special_tokens_are_nothing():
    tokenizer = unigram(unk_token="<unk>")
    table = bytes_per_id(tokenizer)
    assert table[tokenizer.eos_token_id] == 0
    assert table[tokenizer.unk_token_id] is None
    assert None in counted(tokenizer, "Ω") and None not in counted(tokenizer, "foo")
    assert bytes_per_id(by_pieces(normalizer=llama_normalizer()))[0] == 0, "text becomes bytes, and is never unknown"


def test_characters_that_vanish_make_all_unknown():
    """Byte-level BPE that saw ASCII alone drops other bytes without a token that says so."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(["foo bar"], trainers.BpeTrainer(special_tokens=[E], show_progress=False))
    assert set(bytes_per_id(wrapped(raw))) == {None}


def test_words_with_a_decoder_that_adds_nothing_add_up():
    cut = pre_tokenizers.Split(" ", "isolated")
    tokenizer = by_words(
        models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer, cut=cut, decoder=decoders.Fuse()
    )
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert sum(counted(tokenizer, TEXT)) == BYTES
    assert None in counted(tokenizer, "foo gnu")


def test_text_outside_nfc_counts_as_its_nfc():
    tokenizer = by_bytes(normalizer=normalizers.NFC())
    assert sum(counted(tokenizer, "cafe\u0301")) == len("café".encode()) == 5


def test_the_probe_disproves_what_the_structure_does_not_show(monkeypatch):
    """A Split that keeps only letters loses all else; its expression is not looked into."""
    cut = pre_tokenizers.Split(Regex(r"\p{L}+"), "removed", invert=True)
    tokenizer = by_bytes(cut=pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    assert kind_of(json.loads(tokenizer.backend_tokenizer.to_str())) is not None
    assert set(bytes_per_id(tokenizer)) == {None}
    monkeypatch.setattr("capacity_gap.data.token_bytes.PROBE", ("letters",))
    assert set(bytes_per_id(tokenizer)) != {None}


def test_a_tokenizer_written_in_python_is_not_known():
    assert bytes_per_id(SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 3})) == [None] * 4


def test_the_probe_is_in_nfc_and_ids_may_be_left_out():
    assert all(normalizers.NFC().normalize_str(text) == text for text in PROBE)
    content = json.loads(_vocabulary_of_bytes())
    content["added_tokens"].append({"id": 510, "content": "你好", "special": False})
    assert token_bytes.token_bytes(content, {E})[499:] == [
        *token_bytes.token_bytes(content, {E})[499:500],
        *[0] * 10,
        6,
    ]


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_packing_keeps_one_space_for_each_document(tmp_path, scheme):
    """So the bytes of a split are too many by its documents, where the tokenizer puts a space before a text."""
    texts = [TEXT, "foo bar", "the lazy dog"]
    tokenizer = unigram(scheme=scheme, fallback=True, unk_token="<unk>")
    pack(texts, tokenizer, tmp_path / "test")
    (tmp_path / "bytes_per_id.json").write_text(json.dumps(bytes_per_id(tokenizer)))
    packed = Packed(tmp_path / "test", 4)
    extra = len(texts) if scheme == "always" else 0
    assert packed.bytes_per_id[packed.stream].sum() == sum(len(t.encode()) for t in texts) + extra


@pytest.mark.parametrize(("table", "known"), [([0, 1, 2, 3], True), ([0, None, 2, 3], False), ([None] * 4, False)])
def test_bits_per_byte_are_none_where_a_labels_bytes_are_not_known(tmp_path, monkeypatch, table, known):
    import torch

    from capacity_gap.evaluate import heldout
    from capacity_gap.runtime.process import Runtime

    (tmp_path / "bytes_per_id.json").write_text(json.dumps(table))
    (tmp_path / "test.json").write_text(json.dumps({"dtype": "<u2", "tokens": 5}))
    np.asarray([0, 2, 1, 3, 2], dtype="<u2").tofile(tmp_path / "test.bin")
    packed = Packed(tmp_path / "test", 2)
    monkeypatch.setattr(heldout, "predicted", lambda model, length: length)
    monkeypatch.setattr(heldout, "_sequence_means", lambda model, tokens: (torch.full((len(tokens),), np.log(2)),) * 2)
    found = heldout.held_out(None, packed, tokens=4, batch_size=1, runtime=Runtime())
    assert len(packed.bytes_per_id) == 4
    assert found.bits_per_byte == (pytest.approx(4 / 8) if known else None)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{}", '{"model": {}}', '{"model": {"type": "BPE", "vocab": {}}}', "\udcff", "[" * 9999],
)
def test_a_folder_that_cannot_be_read_is_no_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    assert old_bytes_were_wrong(tmp_path) is False


def test_a_folder_is_read_again_once_it_changes(tmp_path, stand_ins):
    assert not old_bytes_were_wrong(tmp_path)
    stand_ins["gpt2"].save_pretrained(tmp_path)
    assert not old_bytes_were_wrong(tmp_path)
    stand_ins["bert"].save_pretrained(tmp_path)
    assert old_bytes_were_wrong(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("[UNK]\n##ing\n")
    assert old_bytes_were_wrong(tmp_path)
