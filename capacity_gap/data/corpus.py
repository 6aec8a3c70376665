"""From documents to a corpus: split by group, held-out near-duplicates taken out, written as JSON lines."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.data.documents import BLOCK, Document
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.files import write_json

SPLITS = ("train", "validation", "test")
SHINGLE = 8  # words
NEAR = 0.5  # a held-out document with this share of its shingles in the training text is a near-duplicate
SMALLER = (30, 10, 3, 1)  # documents of one part of a group, where whole groups are too large to be dealt
OVERSHOOT = 1.25  # a held-out part may be this much larger than asked, since groups stay whole


def build_corpus(
    documents: Iterable[Document], out: Path, *, ood: Iterable[Document] = (), validation: float, test: float
) -> dict[str, Any]:
    """Writes `train.jsonl`, `validation.jsonl`, `test.jsonl`, `ood.jsonl` and the manifest `corpus.json` to `out`.

    Args:
        documents: cleaned texts with their groups; groups are never divided between splits.
        out: an existing folder.
        ood: out-of-domain texts, kept apart.
        validation: share of the bytes held out for tuning.
        test: share of the bytes held out for the records.

    Returns:
        The manifest: digest of the three splits, documents and bytes in each, and the share of held-out documents
        that were near-duplicates of training text, before they were taken out.
    """
    splits = _split(list(documents), validation=validation, test=test)
    known = shingle_hashes(splits["train"])
    near: dict[str, dict[str, float]] = {}
    for name in ("validation", "test"):
        shares = [containment(d.text, known) for d in splits[name]]
        splits[name] = [d for d, share in zip(splits[name], shares, strict=True) if share < NEAR]
        kept = [share for share in shares if share < NEAR]
        near[name] = {
            "near_duplicate_rate_before": _rate(shares),
            "near_duplicate_rate": _rate(kept),
            "mean_containment": sum(kept) / max(1, len(kept)),
        }
    if not all(splits.values()):
        raise ConfigError(
            "the corpus is too small or too uniform to be split: "
            + ", ".join(f"{name} has {len(part)} documents" for name, part in splits.items())
            + ". Provide more text in more documents: documents end at an empty line, or at each line of .jsonl."
        )
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(_write(splits[name], out / f"{name}.jsonl"))
    _write(list(ood), out / "ood.jsonl")
    manifest = {"digest": digest.hexdigest(), "splits": {n: _counts(splits[n]) for n in SPLITS}, "overlap": near}
    write_json(out / "corpus.json", manifest)
    return manifest


def _split(documents: Sequence[Document], *, validation: float, test: float) -> dict[str, list[Document]]:
    """Deals whole groups; if that leaves a split empty, as of a small text of one file, ever smaller blocks of it.

    Files and services stay whole: their documents belong together.
    """
    splits, numbered = split_by_group(documents, validation=validation, test=test), list(enumerate(documents))
    for size in SMALLER:
        if all(splits.values()):
            break
        parts = [Document(d.text, f"{d.group}/{i // size}" if BLOCK in d.group else d.group) for i, d in numbered]
        splits = split_by_group(parts, validation=validation, test=test)
    return splits


def split_by_group(documents: Sequence[Document], *, validation: float, test: float) -> dict[str, list[Document]]:
    """Deals whole groups, in the order of a hash of their names, to test, then validation, the rest to train."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.text.encode())
    total = sum(sizes.values())
    wanted = {"test": test * total, "validation": validation * total}
    held: dict[str, int] = {"test": 0, "validation": 0}
    place: dict[str, str] = {}
    for group in sorted(sizes, key=lambda g: hashlib.sha256(g.encode()).digest()):
        place[group] = "train"
        for name in ("test", "validation"):
            if held[name] < wanted[name] and held[name] + sizes[group] <= OVERSHOOT * wanted[name]:
                place[group] = name
                held[name] += sizes[group]
                break
    return {name: [d for d in documents if place[d.group] == name] for name in SPLITS}


def shingle_hashes(documents: Iterable[Document]) -> set[int]:
    """Hashes of all runs of `SHINGLE` words in the documents."""
    found: set[int] = set()
    for document in documents:
        found.update(_shingles(document.text))
    return found


def containment(text: str, known: set[int]) -> float:
    """Share of the text's distinct runs of `SHINGLE` words that are in `known`; 0 for a text of fewer words."""
    own = _shingles(text)
    return len(own & known) / len(own) if own else 0.0


def _shingles(text: str) -> set[int]:
    words = text.lower().split()
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def _rate(shares: Sequence[float]) -> float:
    return sum(share >= NEAR for share in shares) / max(1, len(shares))


def _write(documents: Iterable[Document], file: Path) -> bytes:
    """Writes one JSON object a line; returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for document in documents:
            line = json.dumps({"text": document.text, "group": document.group}, ensure_ascii=False).encode() + b"\n"
            stream.write(line)
            digest.update(line)
    return digest.digest()


def _counts(documents: Sequence[Document]) -> dict[str, int]:
    return {
        "documents": len(documents),
        "groups": len({d.group for d in documents}),
        "bytes": sum(len(d.text.encode()) for d in documents),
    }


def read_texts(folder: Path, split: str) -> Iterator[str]:
    """The texts of one split of a corpus that `build_corpus` wrote."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
