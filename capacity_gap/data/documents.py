"""Documents, and how they are read from files of the user's own; sources of text are in `corpora.py`."""

import codecs
import contextlib
import gzip
import html
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from capacity_gap.settings.errors import ConfigError

LEAST_CHARACTERS = 80  # shorter strings are labels, not prose
GZIP_RATIO = 3  # of English text, where a file does not say it
SAMPLE = 100  # lines of a .jsonl file that tell how much of it is text

BLOCK = "#"  # in the name of a group that is a block of documents, and no whole file or service
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
            group = file.name if len(files) > 20 else f"{file.name}{BLOCK}{i // 100}"
            yield Document(text, group)


def text_files(path: Path) -> list[Path]:
    """The files that `corpus.path` means, sorted.

    Raises:
        ConfigError: there is none, or what is there is a pipe, a device or the like.
    """
    suffixes = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ConfigError(
            f"corpus.path={path} is a pipe, a socket or a device, which cannot be read twice. Write its text to a "
            "file first."
        )
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in inside if p.name.endswith(suffixes)]
    if not files:
        raise ConfigError(f"corpus.path={path} contains no text. Allowed: {', '.join(suffixes)}, or a folder of them.")
    return files


def text_size(path: Path) -> float:
    """Bytes of text in the files that `corpus.path` means, estimated: sizes on disk, and the beginning of each kind.

    A .gz file says at its end how long it was, modulo 4 GiB; of .jsonl the share that is text is that of the first
    lines of the first file.
    """
    share: dict[bool, float] = {}
    total = 0.0
    for file in text_files(path):
        is_json = ".jsonl" in file.name
        if is_json not in share:
            share[is_json] = _text_share(file) if is_json else 1.0
        total += _unpacked_size(file) * share[is_json]
    return total


def _unpacked_size(file: Path) -> float:
    size = file.stat().st_size
    if file.suffix != ".gz" or size < 4:
        return size
    with file.open("rb") as stream:
        stream.seek(-4, 2)
        said = int.from_bytes(stream.read(), "little")
    return said if said >= size else GZIP_RATIO * size


def _text_share(file: Path) -> float:
    """How much of the first lines of a .jsonl file is text; 1 where they cannot be read, which packing will report."""
    opener = gzip.open if file.suffix == ".gz" else open
    with contextlib.suppress(OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError):
        with opener(file, "rb") as lines:
            first = list(itertools.islice(lines, SAMPLE))
        texts = sum(len(str(json.loads(line)["text"]).encode()) for line in first if line.strip())
        return texts / max(1, sum(map(len, first)))
    return 1.0


def _texts(file: Path) -> Iterator[str]:
    """The texts of one file.

    Raises:
        ConfigError: it cannot be read; the message says where and why.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            if ".jsonl" in file.name:
                yield from (_json_text(line, file, i) for i, line in enumerate(lines, 1) if line.strip())
            else:
                yield from (p.strip() for p in re.split(r"\n\s*\n", lines.read()) if p.strip())
    except UnicodeDecodeError as error:
        raise ConfigError(_not_utf8(file)) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(
            f"{file} is not a complete .gz file ({str(error).rstrip('.')}). Copy or download it again; `gzip --test` "
            "checks whether it is complete."
        ) from error


def _not_utf8(file: Path) -> str:
    """Where a file stops being UTF-8, and what to do."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                wide = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                new = file.with_name(f"utf8-{file.name}")
                byte, encoding = line[error.start], "UTF-16" if wide else "WINDOWS-1252"
                return (
                    f"{file}, line {number}: not UTF-8 text (byte 0x{byte:02x} after {error.start} others). If it is "
                    f"{encoding}, `iconv -f {encoding} -t UTF-8 {file} > {new}` converts it."
                )
    return f"{file}: it ends in the middle of a character. Copy or download it again."


def _json_text(line: str, file: Path, number: int) -> str:
    if number == 1 and line.startswith("\ufeff"):
        raise ConfigError(
            f"{file}, line 1: it begins with a byte order mark, which JSON does not allow. Save the file as UTF-8 "
            f"without it, such as by `sed -i '1s/^\\xEF\\xBB\\xBF//' {file.name}`."
        )
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{file}, line {number}: not a JSON object with a field `text`. "
            'Each line of a .jsonl corpus looks like {"text": "..."}.'
        ) from error
    return readable(text, f"{file}, line {number}")


def readable(text: object, where: str) -> str:
    """A document's text as it was given.

    Raises:
        ConfigError: it is no text, or holds half a character; the message begins with `where`.
    """
    if not isinstance(text, str):
        kind = {"NoneType": "null", "dict": "an object", "list": "a list", "bool": "a truth value"}
        said = kind.get(type(text).__name__, "a number")
        raise ConfigError(f"{where}: the text is {said}. Remove such documents, or add their text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: half of a surrogate pair ({text[error.start]!a}), not a character. The text was cut inside a "
            "character: cut it elsewhere, or remove the document."
        ) from error
    return text
