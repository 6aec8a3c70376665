"""Models that a user names: a model folder, a repository of the Hugging Face hub, or a GGUF file. Imports no torch.

Planning reads their config.json and tokenizer only. Weights are fetched by the stage that needs them.
"""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from capacity_gap.models.gguf_files import GGUF, PIP, described, packaged
from capacity_gap.models.hub import NotHad, planning_files
from capacity_gap.settings.errors import ConfigError, shown
from capacity_gap.settings.hashing import files_digest
from capacity_gap.settings.places import ON_HUB, user_path
from capacity_gap.settings.scales import is_scale

SHORT = 8  # digits of a commit in a name
NOT_HERE = Path()  # the folder of a rung that is published: its shape is known, and nothing was fetched
DESCRIBES = ("config.json", "tokenizer.json")  # what a checkpoint's identity holds beside its weights


@dataclass(frozen=True)
class Checkpoint:
    """A model that is there already."""

    name: str  # as records call it
    source: str  # what transformers is given: a folder, a repository, or the path of a .gguf file
    folder: Path  # where its config.json and tokenizer.json can be read now
    revision: str | None = None  # of a repository: the commit
    aliases: tuple[str, ...] = ()  # other ways to name it

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer is read: its folder, or the hub where nothing was fetched yet."""
        return self.source if self.folder == NOT_HERE else str(self.folder)

    @property
    def pinned(self) -> str:
        """Its name with the whole commit, by which every process finds the same."""
        return f"{self.source}@{self.revision}" if self.revision else self.source

    @property
    def is_gguf(self) -> bool:
        """Whether it is one file, of quantised weights, which are turned into numbers once."""
        return self.source.endswith(GGUF)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a stage that reads its weights hashes: content, independent of its path, or a commit of the hub."""
        if self.revision:
            return {"repository": self.source, "revision": self.revision}
        if self.folder == NOT_HERE:
            return {"repository": self.source}
        if self.is_gguf:
            return {"gguf": files_digest([Path(self.source)])}
        return {"content": content_digest(self.folder)}


def is_checkpoint(given: str) -> bool:
    """Whether `given` names a checkpoint rather than a scale or a rung; a folder called `60k` is written `./60k`."""
    return "/" in given or given.endswith(GGUF) or (not is_scale(given) and user_path(given).is_dir())


def checkpoint(given: str) -> Checkpoint:
    """The checkpoint that a user names: FOLDER, FILE.gguf, pip:PACKAGE/FILE.gguf or ORG/NAME[@REVISION].

    Raises:
        ConfigError: there is no such folder, file or package, or a repository cannot be had.
    """
    path = packaged(given) if given.startswith(PIP) else user_path(given).absolute()
    if given.endswith(GGUF):
        if not path.is_file():
            raise ConfigError(f"{shown(given)}: no such file (working directory: {Path.cwd()}).")
        folder = _described(path, path.stat().st_size, path.stat().st_mtime_ns)
        return Checkpoint(path.name, str(path), folder, aliases=(given,))
    repository, _, revision = given.partition("@")
    if path.is_dir() or not ON_HUB.fullmatch(repository) or (revision and not re.fullmatch(r"[\w./-]+", revision)):
        return Checkpoint(path.name, str(path), path)
    try:
        folder = planning_files(repository, revision or None)
    except NotHad as error:
        raise NotHad(f"{error} There is also no folder {shown(given)} (working directory: {Path.cwd()}).") from error
    commit = folder.name
    aliases = (given, f"{repository}@{commit}")
    return Checkpoint(f"{repository}@{commit[:SHORT]}", repository, folder, commit, aliases)


@lru_cache(maxsize=64)
def _described(file: Path, size: int, changed: int) -> Path:
    del size, changed
    return described(file, files_digest([file]))


def content_digest(path: Path) -> str:
    """SHA-256 over a model folder's config, tokenizer and weights: its identity, independent of its path."""
    described_by = [path / name for name in DESCRIBES if (path / name).is_file()]
    return files_digest([*described_by, *sorted(p for p in path.glob("*.safetensors") if p.is_file())])
