"""Settings of the corpus: which text, how it is split, how long its packed sequences are."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from capacity_gap.settings.checks import need, positive, runtime
from capacity_gap.settings.errors import ConfigError, choose

SOURCES = ("embedded", "code", "cantonese", "text", "hub", "mixture")


OF_HUB = ("subset", "dataset_split", "column", "revision", "documents")  # settings of a source that is a dataset there


@dataclass
class SourceConfig:
    """One source of text: embedded prose, code or Cantonese speech, the user's files, or a dataset of the hub."""

    name: str = "embedded"
    path: str | None = runtime(None)  # text: a file or folder; its content is what is hashed
    dataset: str | None = None  # hub: a dataset's name there, or a local dataset folder
    subset: str | None = None
    dataset_split: str = "train"
    column: str = "text"
    revision: str | None = None
    documents: int | None = None  # hub: take this many, streaming
    weight: float = 1.0  # in a mixture: share of the bytes, relative to the other parts

    def __post_init__(self) -> None:
        choose("corpus.name", self.name, SOURCES)
        positive("corpus", self, "weight")
        if self.name != "text" and self.path is not None:
            raise ConfigError(
                f"corpus.path={self.path} is given, but corpus={self.name} reads no file. Add corpus=text to train "
                "on it."
            )
        if (self.name == "hub") != (self.dataset is not None):
            raise ConfigError(
                f"corpus={self.name} with corpus.dataset={self.dataset}: a dataset is named for corpus=hub, and only "
                "for it, such as corpus=hub corpus.dataset=Skylion007/openwebtext."
            )
        if self.name == "text":
            _check_path(self.path)
        self._check_hub()

    def _check_hub(self) -> None:
        asked = (f for f in fields(SourceConfig) if f.name in OF_HUB and getattr(self, f.name) != f.default)
        given = [f"{f.name}={getattr(self, f.name)}" for f in asked]
        if given and self.name != "hub":
            raise ConfigError(
                f"a source with name={self.name} has {', '.join(given)}: that is for a dataset of the hub, so for "
                "corpus=hub, or a part with name: hub."
            )


def _check_path(path: str | None) -> None:
    if path is None:
        raise ConfigError("corpus=text needs corpus.path=FILE_OR_FOLDER (.txt, .jsonl with a `text` field).")
    if not Path(path).expanduser().exists():
        raise ConfigError(
            f"corpus.path={path} does not exist (seen from {Path.cwd()}). "
            "Give a .txt or .jsonl file, or a folder of them."
        )


@dataclass
class CorpusConfig(SourceConfig):
    """Which text, how it is split, and how long the packed sequences are.

    corpus=mixture takes its documents from `parts`, as many bytes of each as their weights say.
    """

    parts: list[SourceConfig] = field(default_factory=list)
    validation: float = 0.05
    test: float = 0.05
    sequence_length: int = 128

    def __post_init__(self) -> None:
        if (self.name == "mixture") != bool(self.parts):
            raise ConfigError(
                f"corpus={self.name} with {len(self.parts)} corpus.parts: parts are for corpus=mixture, and only for "
                "it, such as corpus=mixture 'corpus.parts=[{name:embedded,weight:3},{name:code,weight:1}]'."
            )
        if self.name != "mixture":
            super().__post_init__()
        elif self.path is not None or self.dataset is not None:
            raise ConfigError("corpus=mixture reads its parts: give path or dataset inside corpus.parts.")
        else:
            self._check_hub()
        positive("corpus", self, "sequence_length", "validation", "test")
        need(self.validation + self.test < 0.9, "corpus.validation + corpus.test", self.validation + self.test, "< 0.9")
