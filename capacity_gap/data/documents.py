"""Where text comes from: the embedded prose, and files of the user's own. A source yields documents, cleaned."""

import gzip
import html
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import ConfigError

# The pinned wheels whose text is embedded: prose, code, and speech in another script; and the extras that bring them.
PINNED = {"botocore": "1.43.11", "sympy": "1.14.0", "pycantonese": "5.0.0"}
EXTRAS = {"botocore": "embedded", "sympy": "embedded", "pycantonese": "cantonese"}
UTTERANCES = 20  # of a conversation make a document
LEAST_CHARACTERS = 80  # shorter strings are labels, not prose

_BLOCK = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|h\d|br|div|table|tr|pre|note|important|section)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>|<!--.*?-->", re.DOTALL)
_BETWEEN_HAN = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
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


def embedded_documents() -> Iterator[Document]:
    """The English prose of the `botocore` wheel (Apache-2.0): what each service, operation and shape is documented as.

    A document is all the prose of one operation or one shape. A string that occurs twice, in whatever services, is
    kept where it occurs first, so no exact copy crosses the split.
    """
    root = _pinned("botocore") / "data"
    seen: set[str] = set()
    for service in sorted(p for p in root.iterdir() if p.is_dir()):
        for parts in _service_prose(service):
            fresh = [p for p in parts if p not in seen]
            seen.update(fresh)
            if fresh:
                yield Document("\n".join(fresh), service.name)


def code_documents() -> Iterator[Document]:
    """The Python source of the `sympy` wheel (BSD-3-Clause): another kind of text. A document is a file."""
    root = _pinned("sympy")
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8").strip()
        if len(text) >= LEAST_CHARACTERS:
            yield Document(text, str(file.relative_to(root)))


def cantonese_documents() -> Iterator[Document]:
    """The Hong Kong Cantonese Corpus in the `pycantonese` wheel (Luke and Wong 2015; CC BY): speech, transcribed.

    A document is `UTTERANCES` utterances of one conversation, a line each, without the spaces between words.
    """
    for file in sorted((_pinned("pycantonese") / "data" / "hkcancor").glob("*.cha")):
        said = [_utterance(line) for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("*")]
        for start in range(0, len(said), UTTERANCES):
            yield Document("\n".join(said[start : start + UTTERANCES]), file.stem)


def _utterance(line: str) -> str:
    """What was said: words joined as Chinese is written, Latin words kept apart."""
    words = line.partition("\t")[2].split()
    return _BETWEEN_HAN.sub("", " ".join(words))


def _pinned(package: str) -> Path:
    """The folder of a package whose version is pinned, since its text is the corpus."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != PINNED[package]:
        raise ConfigError(
            f"this embedded corpus is the text inside {package} {PINNED[package]}, but "
            + (f"{package} {found} is installed" if found else f"{package} is not installed")
            + f". Install it with `pip install 'capacity_gap[{EXTRAS[package]}]'`, or train on your own text: "
            "corpus=text corpus.path=FILE_OR_FOLDER."
        )
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _service_prose(service: Path) -> Iterator[list[str]]:
    """The prose of each entry of the latest model of one service, entries in their own order."""
    models = sorted(service.glob("*/service-2.json.gz"))
    if not models:
        return
    with gzip.open(models[-1]) as file:
        model = json.load(file)
    for entry in (model.get("documentation", ""), *model["operations"].values(), *model["shapes"].values()):
        texts = (strip_html(markup) for markup in _documentation(entry))
        kept = list(dict.fromkeys(t for t in texts if len(t) >= LEAST_CHARACTERS))
        if kept:
            yield kept


def _documentation(node: Any) -> Iterator[str]:
    """Every string under a key `documentation`, depth first; a bare string is one itself."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            elif not isinstance(value, str):
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            if not isinstance(value, str):
                yield from _documentation(value)


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
