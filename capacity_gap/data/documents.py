"""Documents, and how they are read from files of the user's own; sources of text are in `corpora.py`."""

import gzip
import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from capacity_gap.settings.errors import ConfigError

LEAST_CHARACTERS = 80  # shorter strings are labels, not prose

_BLOCK = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|h\d|br|div|table|tr|pre|note|important|section)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>|<!--.*?-->", re.DOTALL)
_SPACE = re.compile(r"[^\S\n]+")
_LINES = re.compile(r"\s*\n\s*")


@dataclass(frozen=True)
class Document:
    """One text; `group` (a service, a file) is kept whole when the corpus is split."""

    text: str
    group: str


def strip_html(markup: str) -> str:
    """Plain text: block tags become line breaks, inline tags vanish, entities are decoded, white space is squeezed."""
    text = html.unescape(_TAG.sub("", _BLOCK.sub("\n", markup)))
    return _LINES.sub("\n", _SPACE.sub(" ", text)).strip()


def ood_documents() -> Iterator[Document]:
    """Out-of-domain prose that every Python carries: the language reference behind `help()`.

    It differs a little between Python versions, so it takes no part in the corpus's identity; records name the Python.
    """
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(topics[topic].strip(), topic)


def text_documents(path: Path) -> Iterator[Document]:
    """The user's own text: `.txt` (paragraphs between blank lines) and `.jsonl` (the field `text`), also gzipped.

    The group of a document is its file; within a single file, each block of 100 documents.
    """
    files = text_files(path)
    for file in files:
        for i, text in enumerate(_texts(file)):
            group = file.name if len(files) > 20 else f"{file.name}#{i // 100}"
            yield Document(text, group)


def text_files(path: Path) -> list[Path]:
    """The files that `corpus.path` means, sorted; none is an error."""
    suffixes = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in inside if p.name.endswith(suffixes)]
    if not files:
        raise ConfigError(f"corpus.path={path} holds no text. Allowed: {', '.join(suffixes)}, or a folder of them.")
    return files


def _texts(file: Path) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        if ".jsonl" in file.name:
            yield from (_json_text(line, file, i) for i, line in enumerate(lines, 1) if line.strip())
        else:
            yield from (p.strip() for p in re.split(r"\n\s*\n", lines.read()) if p.strip())


def _json_text(line: str, file: Path, number: int) -> str:
    try:
        return json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}, line {number}: not a JSON object with a field `text`. "
            'Each line of a .jsonl corpus looks like {"text": "..."}.'
        ) from error
