"""Sources of text, each a class in one registry: what it is, what identifies it, its documents, its licence.

The embedded ones are the text inside pinned wheels, the same everywhere and without a network. A source is given the
`SourceConfig` that named it (`corpus_config.py`). Importing this file imports nothing heavy.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capacity_gap.data.documents import (
    LEAST_CHARACTERS,
    Document,
    readable,
    strip_html,
    text_documents,
    text_files,
    text_size,
)
from capacity_gap.settings.errors import ConfigError, StageError, UserError, first_line
from capacity_gap.settings.hashing import files_digest
from capacity_gap.settings.places import user_path
from capacity_gap.settings.registry import Registry

MIXTURE = "mixture"  # of several sources
# `licence`: of the text, for the cards of exported students; None where it is the user's own.
CORPORA: Registry = Registry("corpus", setting="corpus", traits={"licence": None}, reserved=(MIXTURE,))
UTTERANCES = 20  # of a conversation make a document
GROUP = 100  # documents of a hub dataset that are kept together when the corpus is split
_BETWEEN_HAN = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")


class Wheel:
    """Text inside a wheel whose version is pinned, since its text is the corpus."""

    package: str
    version: str
    extra: str
    text_bytes: int  # of its documents, counted once: reading them all takes seconds

    def size(self, source: Any) -> float:
        """Bytes of its documents."""
        return self.text_bytes

    def identity(self, source: Any) -> dict[str, Any]:
        """The wheel and its version."""
        return {self.package: self.version}

    @property
    def root(self) -> Path:
        """The folder of the package.

        Raises:
            ConfigError: it is not installed, or in another version.
        """
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found != self.version:
            raise ConfigError(
                f"this embedded corpus is the text of the package {self.package} {self.version}, but "
                + (f"{self.package} {found} is installed" if found else f"{self.package} is not installed")
                + f". Install it with `pip install 'capacity_gap[{self.extra}]'`, or train on your own text: "
                "corpus=text corpus.path=FILE_OR_FOLDER."
            )
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).parent


@CORPORA.register("embedded", licence="Apache-2.0")
class ServiceDocumentation(Wheel):
    """The English prose of the `botocore` wheel (Apache-2.0): what each service, operation and shape is documented as.

    A document is all the prose of one operation or one shape. A string that occurs twice, in whatever services, is
    kept where it occurs first, so no exact copy crosses the split.
    """

    package, version, extra = "botocore", "1.43.11", "embedded"
    text_bytes = 22_018_034

    def documents(self, source: Any) -> Iterator[Document]:
        """The cleaned documents."""
        root = self.root / "data"
        seen: set[str] = set()
        for service in sorted(p for p in root.iterdir() if p.is_dir()):
            for parts in _service_prose(service):
                fresh = [p for p in parts if p not in seen]
                seen.update(fresh)
                if fresh:
                    yield Document("\n".join(fresh), service.name)


@CORPORA.register("code", licence="BSD-3-Clause")
class SymbolicCode(Wheel):
    """The Python source of the `sympy` wheel (BSD-3-Clause): another kind of text. A document is a file."""

    package, version, extra = "sympy", "1.14.0", "embedded"
    text_bytes = 26_166_730

    def documents(self, source: Any) -> Iterator[Document]:
        """The cleaned documents."""
        root = self.root
        for file in sorted(root.rglob("*.py")):
            text = file.read_text(encoding="utf-8").strip()
            if len(text) >= LEAST_CHARACTERS:
                yield Document(text, str(file.relative_to(root)))


@CORPORA.register("cantonese", licence="MIT; its Hong Kong Cantonese Corpus (Luke and Wong 2015): CC BY")
class CantoneseSpeech(Wheel):
    """The Hong Kong Cantonese Corpus in the `pycantonese` wheel (Luke and Wong 2015; CC BY): speech, transcribed.

    A document is `UTTERANCES` utterances of one conversation, a line each, without the spaces between words.
    """

    package, version, extra = "pycantonese", "5.0.0", "cantonese"
    text_bytes = 514_533

    def documents(self, source: Any) -> Iterator[Document]:
        """The cleaned documents."""
        for file in sorted((self.root / "data" / "hkcancor").glob("*.cha")):
            said = [_utterance(line) for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("*")]
            for start in range(0, len(said), UTTERANCES):
                yield Document("\n".join(said[start : start + UTTERANCES]), file.stem)


@CORPORA.register("text")
class OwnText:
    """Text of the user's own: a .txt or .jsonl file (also .gz), or a folder of them; its content identifies it."""

    def identity(self, source: Any) -> dict[str, Any]:
        """The content of the files."""
        return {"content": files_digest(text_files(user_path(str(source.path))))}

    def size(self, source: Any) -> float:
        """Bytes of text in the files, estimated without reading them all."""
        return text_size(user_path(str(source.path)))

    def documents(self, source: Any) -> Iterator[Document]:
        """The documents of the files, in their order."""
        return text_documents(user_path(str(source.path)))


@CORPORA.register("hub")
class HubDataset:
    """A dataset of the Hugging Face hub, or a local dataset folder (needs the extra [hub])."""

    def identity(self, source: Any) -> dict[str, Any]:
        """Its name and revision, or the content of its folder, and what is taken of it."""
        names = ("dataset", "subset", "dataset_split", "column", "revision", "documents")
        found = {name: getattr(source, name) for name in names}
        if (folder := user_path(str(source.dataset))).is_dir():
            files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
            found |= {"dataset": folder.absolute().name, "content": files_digest(files)}  # where it lies says nothing
        return found

    def documents(self, source: Any) -> Iterator[Document]:
        """The rows, streamed.

        Raises:
            StageError: the extra is not installed, or the dataset cannot be read.
            ConfigError: a row is no text.
        """
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise StageError("corpus=hub needs the extra: pip install 'capacity_gap[hub]'.") from error
        try:
            rows = load_dataset(
                str(source.dataset),
                source.subset,
                split=source.dataset_split,
                revision=source.revision,
                streaming=True,
            )
            for i, row in enumerate(rows if source.documents is None else rows.take(source.documents)):
                if source.column not in row:
                    raise StageError(
                        f"corpus.dataset={source.dataset} has no column {source.column!r}. It has: {', '.join(row)}. "
                        "Name one with corpus.column=."
                    )
                text = readable(row[source.column], f"corpus.dataset={source.dataset}, row {i + 1}, {source.column}")
                yield Document(text.strip(), f"{i // GROUP}")
        except UserError:
            raise
        except Exception as error:  # `datasets` and what it reads with raise errors of many libraries
            said = first_line(error)
            raise StageError(
                f"corpus.dataset={source.dataset} cannot be read: {said} Check its name, corpus.subset, "
                "corpus.dataset_split and the network; a folder of .jsonl or .parquet files does."
            ) from error


def _utterance(line: str) -> str:
    """What was said: words joined as Chinese is written, Latin words kept apart."""
    words = line.partition("\t")[2].split()
    return _BETWEEN_HAN.sub("", " ".join(words))


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
