"""A tokenizer with more tokens: those of a second script, learnt from text or taken from a second tokenizer.

A new token begins with a character of another script (or a space and one) and holds nothing that Latin text may hold:
no ASCII, no accented letter, and no sign that scripts share, as “ ” ’ — … € and emoji. So text in Latin letters is
tokenised exactly as before, whatever the new tokens were learnt from. Other text is, unless a new token applies: a BPE
tokenizer gets its new merges after all old ones, so it first does all that it did; a Unigram tokenizer keeps its old
pieces and their scores, so a text without new pieces has the same best segmentation. Every byte stays in reach of the
old tokens, so what round-tripped before still does. All this is checked on the saved tokenizer before it counts.
"""

import codecs
import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.data.scripts import OTHER_SCRIPT, is_shared
from capacity_gap.data.tokenizer import load_tokenizer
from capacity_gap.settings.errors import ConfigError, StageError
from capacity_gap.store.files import write_json

PARTS = "parts.json"
LEAST = 2  # a token that text holds once saves nothing
FILLED = 0.9  # share of the new rows that must get a token: the others would be trained, and counted, for nothing
CHECKED = 500  # texts on which an expanded tokenizer is compared with the old one
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_CANNOT = "the teacher's tokenizer cannot be expanded; use a family with another one:"
Pair = tuple[str, str]


@dataclass(frozen=True)
class Addition:
    """One new token, in the tokenizer's own spelling: the pairs that merge into it (BPE), its score (Unigram)."""

    token: str
    merges: tuple[Pair, ...] = ()
    score: float = 0.0


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer writes tokens: byte by byte in an alphabet of 256, or as characters with `▁` for a space."""

    by_byte: bool

    @staticmethod
    def of(content: dict[str, Any]) -> "Spelling":
        """That of a tokenizer.json."""
        return Spelling("ByteLevel" in json.dumps([content["pre_tokenizer"], content["decoder"]]))

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        """Character → byte of byte-level BPE: printable bytes are themselves, the others follow from U+0100."""
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in plain]
        return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}

    def read(self, token: str) -> bytes:
        """The bytes that a token stands for; those of a byte token are no character's."""
        if self.by_byte:
            return bytes(self._alphabet[c] for c in token) if all(c in self._alphabet for c in token) else b""
        return b"" if _BYTE.fullmatch(token) else token.replace("▁", " ").encode()

    def write(self, value: bytes) -> str | None:
        """The token that stands for bytes, or None where only whole characters can be written."""
        if self.by_byte:
            back = {b: c for c, b in self._alphabet.items()}
            return "".join(back[b] for b in value)
        try:
            return value.decode().replace(" ", "▁")
        except UnicodeDecodeError:
            return None

    def steps(self, token: str) -> list[str]:
        """A token after the tokens that build it byte by byte, if it is one character and its bytes are tokens."""
        one = self.by_byte and len(self.read(token).decode(errors="replace")) == 1
        return [token[:end] for end in range(2, len(token))] * one + [token]

    def is_beyond_ascii(self, token: str) -> bool:
        """Whether a token may be a part of a new one: no ASCII in it but a space before it, or alone."""
        value = self.read(token)
        return bool(value) and all(b >= 0x80 for b in value.removeprefix(b" "))

    def is_new_script(self, token: str) -> bool:
        """Whether a token may be added: characters of another script, with a space before them at most.

        The last may be cut off after some of its bytes, if those begin no shared character. A token that starts within
        a character may not be added: its bytes may end a shared one, and text in Latin letters would change.
        """
        reader = codecs.getincrementaldecoder("utf-8")()
        try:
            text = reader.decode(self.read(token).removeprefix(b" "))
        except UnicodeDecodeError:
            return False
        cut = reader.getstate()[0]
        return bool(text or cut) and not any(map(is_shared, (*(c.encode() for c in text), cut)))


def expand_tokenizer(
    folder: Path, out: Path, *, size: int, texts: Iterable[str], second: Any | None = None
) -> dict[str, int]:
    """Writes the tokenizer in `folder` with up to `size` tokens to `out`, and what the new ones were before.

    Args:
        folder: a saved tokenizer, BPE (byte-level, or of characters with byte fallback) or Unigram.
        out: an existing folder; gets the tokenizer and `parts.json`: per new token the old ids that spelt it.
        size: tokens wanted in all.
        texts: what new tokens are learnt from, if `second` is not given; the result is checked on some of them.
        second: a tokenizer whose tokens are added, in its own order.

    Returns:
        How many tokens there were, and are.

    Raises:
        ConfigError: the tokenizer is of another kind or large enough already, or too few tokens were found.
        StageError: the expanded tokenizer would read old text otherwise.
    """
    old = load_tokenizer(folder)
    content = json.loads(old.backend_tokenizer.to_str())
    kind = content["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise ConfigError(f"expand.vocab: a {kind} tokenizer cannot be expanded. Allowed: BPE, Unigram.")
    first = max(old.get_vocab().values()) + 1
    if size <= first:
        raise ConfigError(f"expand.vocab={size}, but the tokenizer already has {first} tokens. Set it higher.")
    given = list(texts)
    if second is not None:
        found = from_second(content, second, size - first)
    else:
        found = (learn_pieces if kind == "Unigram" else learn_merges)(old, given, size - first)
    _check_found(len(found), first, size)
    old.save_pretrained(out)
    grown = with_tokens(content, found, first=first)
    (out / "tokenizer.json").write_text(json.dumps(grown, ensure_ascii=False), encoding="utf-8")
    model = old.backend_tokenizer.model
    write_json(out / PARTS, {"first": first, "parts": [[t.id for t in model.tokenize(a.token)] for a in found]})
    check_expanded(old, load_tokenizer(out), [a.token for a in found], given[:: max(1, len(given) // CHECKED)])
    return {"before": first, "after": first + len(found)}


def _check_found(found: int, first: int, size: int) -> None:
    """Refuses too few new tokens: rows that no token uses would count as parameters of teacher and student."""
    if not found:
        raise ConfigError(
            f"expand.vocab={size}: no token to add was found. The text, or the second tokenizer, holds only Latin "
            "script; add text of the second script in adapt.parts=."
        )
    if found < FILLED * (size - first):
        raise ConfigError(
            f"expand.vocab={size} asks for {size - first:,} tokens in addition to the old {first:,}, but only "
            f"{found:,} were found; the other rows would be unused parameters. Set expand.vocab={first + found}, or "
            "more text of the second script."
        )


def check_expanded(old: Any, new: Any, added: Sequence[str], texts: Sequence[str]) -> None:
    """Raises `StageError` unless every token has one id, old ones their own, and texts read as before.

    Text without another script, or without a new token, must have its old ids; all text must decode to what it did.
    """
    before, after = old.get_vocab(), new.get_vocab()
    first = max(before.values()) + 1
    if after != before | {token: first + i for i, token in enumerate(added)}:
        moved = sorted(token for token, i in before.items() if after.get(token) != i)[:5]
        raise StageError(f"{_CANNOT} tokens would not keep their ids, or not have one each, as {moved}.")
    # Also inside text, because an added token that strips spaces beside it shows it there only.
    marks = [token for token in old.get_added_vocab() for token in (token, f"to {token}be{token} {token}")]
    for text in (*marks, *texts):
        was, now = (t(text, add_special_tokens=False)["input_ids"] for t in (old, new))
        if was == now:
            continue
        same = max(now, default=0) >= first and OTHER_SCRIPT.search(text)
        if not same or _decoded(old, was) != _decoded(new, now):
            raise StageError(f"{_CANNOT} it would tokenise {text[:80]!r} differently than before.")


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def with_tokens(content: dict[str, Any], found: Sequence[Addition], *, first: int) -> dict[str, Any]:
    """A tokenizer.json with more tokens, which get the ids from `first`.

    Tokens that were added behind the model's vocabulary (Pythia's runs of spaces, Qwen's roles) become entries of it:
    others are numbered anew whenever a tokenizer is loaded, from the size of the vocabulary on, which has grown. No
    merge leads to them, so they are found in text as before, and only so.
    """
    model = dict(content["model"])
    if model["type"] == "Unigram":
        pieces = [piece for piece, _ in model["vocab"]]
        least = min(score for _, score in model["vocab"])  # it decides what an unknown character costs, so it stays
        added = [[token, least] for token, _ in _behind(content, pieces)]
        model["vocab"] = [*model["vocab"], *added, *([a.token, max(a.score, least)] for a in found)]
    else:
        joined = bool(model["merges"]) and isinstance(model["merges"][0], str)
        merges = [pair for a in found for pair in a.merges]
        behind = dict(_behind(content, model["vocab"]))
        model["vocab"] = model["vocab"] | behind | {a.token: first + i for i, a in enumerate(found)}
        model["merges"] = [*model["merges"], *(" ".join(p) if joined else list(p) for p in merges)]
    return {**content, "model": model}


def _behind(content: dict[str, Any], vocab: Iterable[str]) -> list[tuple[str, int]]:
    """The added tokens that the model's vocabulary lacks, and their ids, in order."""
    known = set(vocab)
    added = ((t["content"], t["id"]) for t in content["added_tokens"] if t["content"] not in known)
    return sorted(added, key=lambda entry: entry[1])


def learn_merges(tokenizer: Any, texts: Sequence[str], room: int) -> list[Addition]:
    """The `room` tokens that byte-pair encoding would learn next, were it trained on the new script alone.

    Where tokens are whole characters, the missing characters come first, in half of the room at most: a character
    saves all its byte tokens but one.
    """
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    spelling, found = Spelling.of(content), []
    if not spelling.by_byte:
        vocab = content["model"]["vocab"]
        counts = Counter(c for text in texts for c in text if c not in vocab and spelling.is_new_script(c))
        frequent = sorted((c for c, n in counts.items() if n >= LEAST), key=lambda c: (-counts[c], c))
        found = [Addition(c) for c in frequent[: room // 2]]
        first = max(tokenizer.get_vocab().values()) + 1
        backend = Tokenizer.from_str(json.dumps(with_tokens(content, found, first=first)))
    runs = _runs(backend, texts, spelling)
    known = set(backend.get_vocab())
    merges = _merge(runs, known, spelling, room - len(found))
    return [*found, *(Addition(a + b, ((a, b),)) for a, b in merges)]


def _runs(backend: Any, texts: Sequence[str], spelling: Spelling) -> Counter[tuple[str, ...]]:
    """Runs of tokens beyond ASCII, as the tokenizer splits them now, and how often each occurs."""
    found: Counter[tuple[str, ...]] = Counter()
    for encoding in backend.encode_batch(list(texts), add_special_tokens=False):
        run: list[str] = []
        word = None
        for token, own in zip(encoding.tokens, encoding.word_ids, strict=True):
            beyond = spelling.is_beyond_ascii(token)
            if own != word or not beyond:
                found[tuple(run)] += 1
                run, word = [], own
            if beyond:
                run.append(token)
        found[tuple(run)] += 1
    return Counter({run: n for run, n in found.items() if len(run) > 1})


def _merge(runs: Counter[tuple[str, ...]], known: set[str], spelling: Spelling, room: int) -> list[Pair]:
    """Byte-pair encoding: again and again the most frequent pair of neighbours becomes one token."""
    words = [list(run) for run in runs]
    counts = list(runs.values())
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)

    def tally(i: int, sign: int) -> set[Pair]:
        own = list(zip(words[i], words[i][1:], strict=False))
        for pair in own:
            pairs[pair] += sign * counts[i]
            places[pair].add(i)
        return set(own)

    for i in range(len(words)):
        tally(i, 1)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    found: list[Pair] = []
    while heap and len(found) < room:
        n, pair = heapq.heappop(heap)
        if -n != pairs[pair] or -n < LEAST:
            continue  # an old count: the pair is in the heap again with its new one
        if not spelling.is_new_script(pair[0] + pair[1]) or pair[0] + pair[1] in known:
            continue
        found.append(pair)
        known.add(pair[0] + pair[1])
        changed: set[Pair] = set()
        # A word may have lost the pair since it was noted: it is then tallied again unchanged.
        for i in sorted(places[pair]):
            changed |= tally(i, -1)
            words[i] = _joined(words[i], pair)
            changed |= tally(i, 1)
        for other in changed:
            heapq.heappush(heap, (-pairs[other], other))
    return found


def _joined(word: list[str], pair: Pair) -> list[str]:
    out: list[str] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def learn_pieces(tokenizer: Any, texts: Sequence[str], room: int) -> list[Addition]:
    """The likeliest pieces of a Unigram model of the new script alone, with their log-probabilities in it."""
    from tokenizers import Tokenizer, models, trainers

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    spelling, known = Spelling.of(content), {piece for piece, _ in content["model"]["vocab"]}
    runs = [run for text in texts for run in OTHER_SCRIPT.findall(text)]
    if not runs:
        return []
    fresh = Tokenizer(models.Unigram())
    fresh.normalizer, fresh.pre_tokenizer = (
        getattr(tokenizer.backend_tokenizer, part) for part in ("normalizer", "pre_tokenizer")
    )
    # More pieces than `room`, because those that the tokenizer already has are dropped below.
    trainer = trainers.UnigramTrainer(
        vocab_size=room + len(known), show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]
    )
    fresh.train_from_iterator(runs, trainer)
    pieces = json.loads(fresh.to_str())["model"]["vocab"]
    new = [Addition(p, score=s) for p, s in pieces if p not in known and spelling.is_new_script(p)]
    return sorted(new, key=lambda a: (-a.score, a.token))[:room]


def from_second(content: dict[str, Any], second: Any, room: int) -> list[Addition]:
    """The first `room` tokens of a second tokenizer that are new and of another script.

    A BPE tokenizer reaches a token through every pair of known tokens that spell it. A character made of bytes also
    gets the tokens that build it from its first byte on; any other token that no pair spells is left out.
    """
    other = json.loads(second.backend_tokenizer.to_str())
    unigram = content["model"]["type"] == "Unigram"
    if unigram and other["model"]["type"] != "Unigram":
        raise ConfigError(
            f"expand.tokenizer= names a {other['model']['type']} tokenizer: a Unigram tokenizer can take tokens only "
            "from another Unigram tokenizer, whose pieces have scores. Leave it out to learn tokens from text."
        )
    own, theirs = Spelling.of(content), Spelling.of(other)
    vocab = content["model"]["vocab"]
    known = {piece for piece, _ in vocab} if unigram else set(vocab)
    known |= {token for token, _ in _behind(content, known)}
    found: list[Addition] = []
    for piece, score in _in_order(other["model"]):
        token = own.write(theirs.read(piece))
        for step in own.steps(token) if token and not unigram else [token]:
            if not step or step in known or not own.is_new_script(step) or len(found) == room:
                continue
            splits = tuple((step[:i], step[i:]) for i in range(1, len(step)) if {step[:i], step[i:]} <= known)
            if unigram or splits or (len(step) == 1 and not own.by_byte):
                found.append(Addition(step, () if unigram else splits, score))
                known.add(step)
    return found


def _in_order(model: dict[str, Any]) -> list[tuple[str, float]]:
    if model["type"] == "Unigram":
        return sorted(((p, s) for p, s in model["vocab"]), key=lambda entry: -entry[1])
    return [(token, 0.0) for token, _ in sorted(model["vocab"].items(), key=lambda entry: entry[1])]


def text_per_token(tokenizer: Any, texts: Sequence[str]) -> dict[str, float | None]:
    """Bytes that a token stands for, in texts mostly of ASCII (`first`) and mostly not (`second`); None without any."""
    spent: dict[str, list[int]] = {"first": [0, 0], "second": [0, 0]}
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        size = len(text.encode())
        other = size - sum(c < "\x80" for c in text)
        mine = spent["second" if 2 * other > size else "first"]
        mine[0] += size
        mine[1] += len(ids)
    return {name: size / count if count else None for name, (size, count) in spent.items()}
