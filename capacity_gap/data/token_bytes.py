"""UTF-8 bytes that each token id stands for, from the structure of a tokenizer.json alone; bits per byte depends on it.

The sum over a text's ids is the text's own number of bytes, or `None` where that cannot be promised. What is decided:

- A tokenizer that puts a space before a text (Metaspace, Llama 2) counts it: one byte too many per document.
- A normaliser that loses something (NFKC, lower case, accents, SentencePiece's charsmap) makes every id `None`. NFC
  does not: text in other forms (file names of macOS, say) counts as its NFC form.
- Special tokens stand for no text: 0. The unknown token, where text can become it, stands for unknown text: `None`.
- An added word that swallows spaces beside it is `None`. So is one after which a tokenizer puts a space into the text;
  there, control tokens (`special` in tokenizer.json) keep their own length, since they stand between texts.
- WordPiece loses spaces, and words or characters without a decoder say nothing of them: every id is `None`.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

Content = Mapping[str, Any]  # of a tokenizer.json, or of a part of one
Lengths = list[int | None]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that byte-level BPE writes as they are
_OTHERS = [b for b in range(256) if b not in _PRINTED]
_ALPHABET = {b: chr(b) for b in _PRINTED} | {b: chr(0x100 + i) for i, b in enumerate(_OTHERS)}
_LETTERS = frozenset(_ALPHABET.values())
_IN_TEXT = [b for b in range(0xF5) if b not in (0xC0, 0xC1)]  # bytes that UTF-8 has; Pythia's vocabulary has no others
_BESIDE = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength")  # cut text, lose none of it
_JOINING = ("Fuse", "ByteFallback")

# Text in NFC that shows what a tokenizer loses: spaces, lines, capitals, accents, compatibility forms, other scripts.
PROBE = (
    "The quick brown fox, in 1999: 3.14 + (a_b)!",
    "two  spaces, four    of them\tand a tab ",
    " a space before, UPPER and MiXed Case",
    "one line\nanother\n\nand\r\n  the last\n",
    "naïve café, Ångström, Ελλάδα, Привет",
    "“quotes” — a dash… ½ ﬁ № ™",
    "你好，世界。こんにちは 한국어",
    "नमस्ते สวัสดี مرحبا שלום",
    "emoji 🙂 and 👩‍👩‍👧 and 𝔘",
)


@dataclass(frozen=True)
class Kind:
    """How a tokenizer writes text in its vocabulary."""

    by_byte: bool  # each character is a byte
    mark: str  # what is written for a space, where characters are characters
    normalizer: tuple[Content, ...]
    prefixes: tuple[bool, bool]  # whether the normaliser and the pre-tokeniser put a space before every piece of text
    first: bool  # whether a space is put before the text alone

    @property
    def prepends(self) -> bool:
        """Whether a document's first token may hold a space that is no byte of it."""
        return any(self.prefixes) or self.first


def token_bytes(content: Content, special: Collection[str], ends: Collection[str] = ()) -> Lengths:
    """UTF-8 bytes that each id stands for; 0 for special tokens and for ids that no token has, `None` if not known.

    Args:
        content: of a tokenizer.json.
        special: the special tokens.
        ends: those of them that are more than the unknown token, so that they stay 0 if they are that too.
    """
    tokens = _by_id(content)
    kind = kind_of(content)
    if kind is None:
        return [None] * len(tokens)
    lengths: Lengths = [0 if token is None else _width(token, kind) for token in tokens]
    vocab = _vocabulary(content["model"])
    for token in _added(content):
        lengths[token["id"]] = _added_width(token, kind, token["content"] in vocab)
    unknown = _unknown(content["model"], kind)
    return [
        None if i == unknown and token not in ends else 0 if token in special else n
        for i, (n, token) in enumerate(zip(lengths, tokens, strict=True))
    ]


def kind_of(content: Content) -> Kind | None:
    """How a tokenizer.json writes text, or None if text is lost on the way or the kind is not known."""
    normalizer, cuts, joins = (_steps(content.get(k)) for k in ("normalizer", "pre_tokenizer", "decoder"))
    by_byte = [s["type"] for s in (*normalizer, *cuts)].count("ByteLevel")
    marks = _marks(normalizer, cuts) or _marks_read(joins)
    kind = Kind(
        by_byte=by_byte == 1,
        mark=next(iter(marks), " "),
        normalizer=tuple(normalizer),
        prefixes=(any(s["type"] == "Prepend" for s in normalizer), any(map(_prefixes, cuts))),
        first=any(_scheme(s) == "first" for s in cuts),
    )
    # With two such steps a character of the vocabulary no longer has one known length in bytes.
    if by_byte > 1 or len(marks) + by_byte > 1 or any(map(_prefixes, cuts[1:])):
        return None
    # Without a mark a decoder may add spaces that the text did not have.
    if not (marks or by_byte) and (not joins or any(s["type"] not in _JOINING for s in joins)):
        return None
    kept = all(_keeps(s, kind.mark) for s in normalizer) and all(map(_cuts_only, cuts))
    return kind if kept and _reads_all(content["model"], kind) else None


def _steps(part: Content | None) -> list[Content]:
    """A normaliser, pre-tokeniser or decoder as a list; sequences lie within sequences."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = next(v for k, v in part.items() if k != "type")
    return [step for one in inner for step in _steps(one)]


def _marks(normalizer: Iterable[Content], cuts: Iterable[Content]) -> set[str]:
    """What text gets for a space before it is looked up."""
    found = {s["content"] for s in normalizer if s["type"] == "Replace" and _pattern(s) == " "}
    return found | {s.get("replacement", "▁") for s in cuts if s["type"] == "Metaspace"}


def _marks_read(joins: Iterable[Content]) -> set[str]:
    """What a decoder makes a space of."""
    found = {_pattern(s) for s in joins if s["type"] == "Replace" and s["content"] == " "}
    return found | {s.get("replacement", "▁") for s in joins if s["type"] == "Metaspace"}


def _pattern(step: Content) -> str:
    return next(iter(step["pattern"].values())) if isinstance(step["pattern"], Mapping) else step["pattern"]


def _scheme(step: Content) -> str | None:
    """Where Metaspace puts a space: always, first, or never. Older files say only whether."""
    if step["type"] != "Metaspace":
        return None
    return step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")


def _prefixes(step: Content) -> bool:
    """Whether every piece of text gets a space, so that a cut before this step would put spaces into the text."""
    return _scheme(step) == "always" or (step["type"] == "ByteLevel" and step.get("add_prefix_space", True))


def _keeps(step: Content, mark: str) -> bool:
    """Whether a normaliser's step keeps the bytes of text in NFC, but for a space before it."""
    if step["type"] == "Replace":
        return _pattern(step) == " " and step["content"] == mark
    if step["type"] == "Prepend":
        return step["prepend"] in (" ", mark)
    return step["type"] in ("NFC", "ByteLevel")


def _cuts_only(step: Content) -> bool:
    """Whether a pre-tokeniser's step keeps all of a text; that an inverted Split finds all of it, the probe shows."""
    if step["type"] == "Split":
        return step["behavior"] != "Removed" or step.get("invert", False)
    if step["type"] == "Punctuation":
        return step.get("behavior") != "Removed"
    return step["type"] in _BESIDE


def _model_type(model: Content) -> str:
    """Older files do not say it."""
    if "type" in model:
        return model["type"]
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _reads_all(model: Content, kind: Kind) -> bool:
    """Whether no character vanishes: one that is no token must become bytes or the unknown token."""
    if _model_type(model) not in ("BPE", "Unigram", "WordLevel"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    return _covers(model, kind) or _unknown(model, kind) is not None


def _covers(model: Content, kind: Kind) -> bool:
    """Whether every byte of UTF-8 is a token, and text that is none becomes bytes."""
    if _model_type(model) == "WordLevel" or not (kind.by_byte or model.get("byte_fallback")):
        return False
    vocab = _vocabulary(model)
    return all((_ALPHABET[b] if kind.by_byte else f"<0x{b:02X}>") in vocab for b in _IN_TEXT)


def _unknown(model: Content, kind: Kind) -> int | None:
    """The id that text becomes which is no token, if there may be such text."""
    if _covers(model, kind):
        return None
    return model.get("unk_id") if _model_type(model) == "Unigram" else model["vocab"].get(model.get("unk_token"))


def _vocabulary(model: Content) -> Collection[str]:
    return model["vocab"] if isinstance(model["vocab"], dict) else {token for token, _ in model["vocab"]}


def _added(content: Content) -> list[Content]:
    return content.get("added_tokens") or []


def _by_id(content: Content) -> list[str | None]:
    """Each id's token: added words before the model's own, and None for ids that are left out."""
    vocab = content["model"]["vocab"]
    pairs = [(i, t) for t, i in vocab.items()] if isinstance(vocab, dict) else [(i, t[0]) for i, t in enumerate(vocab)]
    found = dict(pairs) | {t["id"]: t["content"] for t in _added(content)}
    return [found.get(i) for i in range(max(found) + 1)]


def _width(token: str, kind: Kind) -> int:
    """Bytes of a token of the model's own vocabulary."""
    if kind.by_byte:
        return len(token)
    return 1 if _BYTE.fullmatch(token) else len(token.replace(kind.mark, " ").encode())


def _added_width(token: Content, kind: Kind, in_model: bool) -> int | None:
    """Bytes of an added word, which is written as in the text, whatever the model's vocabulary is written in."""
    if token.get("lstrip") or token.get("rstrip") or _puts_spaces(token, kind):
        return None
    text = _normalized(token["content"], kind.normalizer) if token.get("normalized") else token["content"]
    length = len(text.encode()) if kind.by_byte else _width(text, kind)
    twofold = in_model and (not kind.by_byte or _LETTERS.issuperset(token["content"]))
    return None if twofold and length != _width(token["content"], kind) else length  # as added, and by the model


def _puts_spaces(token: Content, kind: Kind) -> bool:
    """Whether the text after a word gets a space that it may not have. Control tokens stand between texts."""
    by_normalizer, by_cut = kind.prefixes
    return not token.get("special") and (by_cut or (by_normalizer and not token.get("normalized")))


def _normalized(text: str, normalizer: Iterable[Content]) -> str:
    """An added word as it is looked for in normalised text, but for how its spaces and bytes are written."""
    for step in normalizer:
        if step["type"] == "NFC":
            text = unicodedata.normalize("NFC", text)
        elif step["type"] == "Prepend":
            text = step["prepend"] + text
    return text


def proved(lengths: Lengths, tokenizer: Any, *, prepends: bool) -> bool:
    """Whether no text of `PROBE` has other bytes than its ids, but for one space before it and for unknown tokens."""
    special = set(tokenizer.all_special_ids)
    for text in PROBE:
        try:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception:  # the Rust library raises no narrower class for text that it cannot read
            return False
        known = [n for n in (lengths[i] for i in ids) if n is not None]
        unknown = len(known) < len(ids) or not special.isdisjoint(ids)
        if not unknown and not 0 <= sum(known) - len(text.encode()) <= prepends:
            return False
    return True


def old_bytes_were_wrong(folder: Path) -> bool:
    """Whether what was counted before this module differs from `token_bytes` for the tokenizer saved in `folder`.

    Reads JSON only, and never raises: a folder that cannot be read is refused elsewhere, and is False here. So is a
    folder without a tokenizer.json, but for BERT's vocab.txt. Names of special tokens come from tokenizer_config.json
    and special_tokens_map.json.
    """
    if not (folder / "tokenizer.json").is_file():
        return (folder / "vocab.txt").is_file()
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return _were_wrong(folder, tuple(_stamp(folder / name) for name in names))


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=64)
def _were_wrong(folder: Path, stamps: tuple[tuple[int, int] | None, ...]) -> bool:
    try:
        content = _read(folder / "tokenizer.json")
        said = [_read(f) for f in (folder / "special_tokens_map.json", folder / "tokenizer_config.json") if f.is_file()]
        roles = {name: value for one in said for name, value in one.items()}
        content = {**content, "added_tokens": [*_added(content), *_added_later(content, roles)]}
        special, ends = _special(roles, but=()), _special(roles, but=("unk_token",))
        return token_bytes(content, special, ends) != _old_bytes(content, special)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError):
        return False


def _read(file: Path) -> Content:
    return json.loads(file.read_text(encoding="utf-8"))


def _added_later(content: Content, config: Content) -> list[Content]:
    """Words that tokenizer_config.json adds to those of tokenizer.json."""
    known = {t["content"] for t in _added(content)}
    given = config.get("added_tokens_decoder") or {}
    return [{**t, "id": int(i)} for i, t in given.items() if t["content"] not in known]


def _special(roles: Content, but: Collection[str]) -> set[str]:
    """The tokens that have a role (`eos_token`, `additional_special_tokens`), as tokenizer_config.json names them."""
    found: list[Any] = []
    for name, value in roles.items():
        if name.endswith("_token") and name not in but:
            found.append(value)
        elif name in ("additional_special_tokens", "extra_special_tokens"):
            found += value.values() if isinstance(value, dict) else value or []
    texts = [t.get("content") if isinstance(t, dict) else t for t in found]
    return {t for t in texts if isinstance(t, str)}


def _old_bytes(content: Content, special: Collection[str]) -> Lengths:
    """What was counted: added words by the character too, and byte-level only if the decoder's first letters say so."""
    model = {k: v for k, v in content["model"].items() if k not in ("vocab", "merges")}
    keys = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    told = json.dumps({**{k: content.get(k) for k in keys}, "model": model}, ensure_ascii=False, separators=(",", ":"))
    by_byte = "ByteLevel" in told.partition('"decoder"')[2][:400]
    kind = Kind(by_byte=by_byte, mark="▁", normalizer=(), prefixes=(False, False), first=False)
    lengths: Lengths = [0 if t is None or t in special else _width(t, kind) for t in _by_id(content)]
    for token in _added(content):
        if token.get("normalized") and token["content"] not in special:
            lengths[token["id"]] = _width(_looked_for(token["content"], content), kind)
    return lengths


def _looked_for(word: str, content: Content) -> str:
    """What tokenizers 0.23 gives for the id of an added word that is normalised."""
    steps = _steps(content.get("normalizer"))
    text = _normalized(word, steps)
    return "".join(_ALPHABET[b] for b in text.encode()) if any(s["type"] == "ByteLevel" for s in steps) else text
