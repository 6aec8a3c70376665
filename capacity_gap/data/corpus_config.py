"""Settings of the corpus: which text, how it is split, how long its packed sequences are."""

from dataclasses import dataclass
from pathlib import Path

from capacity_gap.data.corpora import CORPORA, MIXTURE
from capacity_gap.settings.checks import need
from capacity_gap.settings.declare import declared, default_of, setting, validate
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import user_path

AUTO = "auto"


@dataclass
class SourceConfig:
    """One source of text: embedded prose, code or Cantonese speech, the user's files, or a dataset of the hub."""

    name: str = setting(
        "embedded",
        "The source, or `mixture` of several.",
        allowed=lambda: (*CORPORA, MIXTURE),
        column="corpus",
        computed=True,
    )
    path: str | None = setting(
        None,
        "corpus=text: a .txt or .jsonl file (also .gz), or a folder of them; hashed by content, not path.",
        decides=False,
        content=True,
    )
    dataset: str | None = setting(
        None, "corpus=hub: a dataset's name, or a local dataset folder.", column="corpus", computed=True
    )
    subset: str | None = setting(None, "corpus=hub: the dataset's configuration.", only_for="hub")
    dataset_split: str = setting("train", "corpus=hub: the dataset's split.", only_for="hub")
    column: str = setting("text", "corpus=hub: the column that holds the text.", only_for="hub")
    revision: str | None = setting(None, "corpus=hub: the commit of the dataset.", only_for="hub")
    documents: int | None = setting(
        None, "corpus=hub: stream this many documents.", only_for="hub", least=1, most=10**12
    )
    weight: float = setting(
        1.0,
        "Mixtures only: share of the bytes, relative to the other parts.",
        least=1e-6,
        most=1e6,
        column="corpus",
        computed=True,
    )

    def __post_init__(self) -> None:
        validate("corpus", self)
        if self.name != "text" and self.path is not None:
            raise ConfigError(
                f"corpus.path={self.path} is given, but corpus={self.name} reads no file. Add corpus=text to train "
                "on it."
            )
        if (self.name == "hub") != (self.dataset is not None):
            raise ConfigError(
                f"corpus={self.name} with corpus.dataset={self.dataset}: a dataset is required by corpus=hub and "
                "allowed only there, such as corpus=hub corpus.dataset=Skylion007/openwebtext."
            )
        if self.name == "text":
            _check_path(self.path)
        self._check_hub()

    def _check_hub(self) -> None:
        asked = (f for f, known in declared(SourceConfig) if known.only_for == "hub")
        given = [f"{f.name}={getattr(self, f.name)}" for f in asked if getattr(self, f.name) != default_of(f)]
        if given and self.name != "hub":
            raise ConfigError(
                f"a source with name={self.name} has {', '.join(given)}: these settings apply to hub datasets only: "
                "corpus=hub, or a part with name: hub."
            )


def _check_path(path: str | None) -> None:
    if not path:
        raise ConfigError("corpus=text needs corpus.path=FILE_OR_FOLDER (.txt, .jsonl with a `text` field).")
    if not user_path(path).exists():
        raise ConfigError(
            f"corpus.path={path} does not exist (working directory: {Path.cwd()}). Give a .txt or .jsonl file, or a "
            "folder of them."
        )


@dataclass
class CorpusConfig(SourceConfig):
    """Which text, how it is split, and how long the packed sequences are.

    corpus=mixture takes its documents from `parts`, as many bytes of each as their weights say.
    """

    name: str = setting(
        AUTO,
        "The source, or `mixture` of several; auto: the embedded prose, for students of at most 50M parameters.",
        allowed=lambda: (AUTO, *CORPORA, MIXTURE),
        column="corpus",
        computed=True,
    )
    parts: list[SourceConfig] = setting(
        [], "corpus=mixture: sources by weight, such as [{name:embedded,weight:3},{name:code,weight:1}]."
    )
    validation: float = setting(0.05, "Share of the bytes that is held out for validation.", least=1e-4, most=0.5)
    test: float = setting(0.05, "Share of the bytes held out for test losses.", least=1e-4, most=0.5)
    sequence_length: int | None = setting(
        None, "Tokens of one packed sequence; null: the recipe's for the student's size.", least=1, most=2**17
    )

    bos: bool | None = setting(
        None,
        "Begin every sequence with the token that begins a text; null: where a model of the ladder needs it (Gemma).",
        later=True,
    )

    def __post_init__(self) -> None:
        if (self.name == MIXTURE) != bool(self.parts):
            raise ConfigError(
                f"corpus={self.name} with {len(self.parts)} corpus.parts: parts are required by corpus=mixture and "
                "allowed only there, such as corpus=mixture "
                "'corpus.parts=[{name:embedded,weight:3},{name:code,weight:1}]'."
            )
        if self.name != MIXTURE:
            super().__post_init__()
        elif self.path is not None or self.dataset is not None:
            raise ConfigError("corpus=mixture reads its parts: give path or dataset inside corpus.parts.")
        else:
            self._check_hub()
            validate("corpus", self)
        need(self.validation + self.test < 0.9, "corpus.validation + corpus.test", self.validation + self.test, "< 0.9")
