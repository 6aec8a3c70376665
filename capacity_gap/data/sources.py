"""Which documents a corpus is made of: one source, or a mixture of several by weight; and what identifies them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.data.corpus_config import CorpusConfig, SourceConfig
from capacity_gap.data.documents import (
    PINNED,
    Document,
    cantonese_documents,
    code_documents,
    embedded_documents,
    text_documents,
    text_files,
)
from capacity_gap.settings.errors import ConfigError, StageError
from capacity_gap.settings.hashing import files_digest

GROUP = 100  # documents of a hub dataset that are kept together when the corpus is split


def documents(source: SourceConfig) -> Iterator[Document]:
    """The cleaned documents of a source or a mixture."""
    if isinstance(source, CorpusConfig) and source.name == "mixture":
        return mixed([list(documents(part)) for part in source.parts], [part.weight for part in source.parts])
    if source.name == "embedded":
        return embedded_documents()
    if source.name == "code":
        return code_documents()
    if source.name == "cantonese":
        return cantonese_documents()
    if source.name == "hub":
        return hub_documents(source)
    return text_documents(Path(str(source.path)).expanduser())


def identity(source: SourceConfig) -> dict[str, Any]:
    """What decides a source's text: a pinned wheel, the content of files, or a dataset's name and revision."""
    if isinstance(source, CorpusConfig) and source.name == "mixture":
        return {"parts": [{"name": p.name, "weight": p.weight, **identity(p)} for p in source.parts]}
    if source.name == "text":
        return {"content": files_digest(text_files(Path(str(source.path)).expanduser()))}
    if source.name == "hub":
        names = ("dataset", "subset", "dataset_split", "column", "revision", "documents")
        return {name: getattr(source, name) for name in names}
    package = {"embedded": "botocore", "code": "sympy", "cantonese": "pycantonese"}[source.name]
    return {package: PINNED[package]}


def tokenizer_identity(tokenizer: str, revision: str | None) -> dict[str, Any]:
    """What identifies a second tokenizer: a local one's content, or a name on the hub and a commit."""
    folder = Path(tokenizer).expanduser()
    if not folder.is_dir():
        if revision is None:
            raise ConfigError(
                f"expand.tokenizer={tokenizer} is no folder here; as a name on the hub it needs expand.revision=COMMIT "
                "(40 hexadecimal digits, in the history of its files): what the name stands for may change."
            )
        return {"repository": tokenizer, "revision": revision}
    if revision is not None:
        raise ConfigError(f"expand.tokenizer={tokenizer} is a folder: expand.revision={revision} is for the hub only.")
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"expand.tokenizer={tokenizer} has no tokenizer.json: save its fast tokenizer there.")
    return {"content": files_digest([folder / "tokenizer.json"])}


def corpus_name(corpus: CorpusConfig) -> str:
    """What records call the corpus: a hub dataset and a mixture by what is in them."""
    if corpus.name == "mixture":
        return "+".join(f"{part.weight:g}*{part.dataset or part.name}" for part in corpus.parts)
    return corpus.dataset or corpus.name


def hub_documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a Hugging Face dataset, streamed; also a local folder of .jsonl or .parquet files.

    Raises:
        StageError: the extra is not installed, or the dataset cannot be read.
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
            yield Document(row[source.column].strip(), f"{i // GROUP}")
    except (OSError, ValueError) as error:
        raise StageError(
            f"corpus.dataset={source.dataset} cannot be read: {str(error).splitlines()[0]} Check its name, "
            "corpus.subset, corpus.dataset_split and the network; a local folder of .jsonl or .parquet files will do."
        ) from error


def mixed(parts: Sequence[Sequence[Document]], weights: Sequence[float]) -> Iterator[Document]:
    """Documents of each part in proportion of bytes to its weight, as much as the scarcest part allows.

    Groups keep their part's number, so that two parts never share one. Each part is taken from its beginning.
    """
    sizes = [sum(len(d.text.encode()) for d in part) for part in parts]
    unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        left = unit * weight
        for document in part:
            left -= len(document.text.encode())
            if left < -1e-6:
                break
            yield Document(document.text, f"{number}/{document.group}")
