"""A choice: names, what each stands for, what it can do. Users add entries from modules of their own (`extension.py`).

    LOSSES = Registry("loss", setting="distill.loss")

    @LOSSES.register("forward_kl", samples=True)
    def forward_kl(...): ...

A registry is filled by importing the file that defines it; that file imports torch in its functions only, so that
planning, help and fits stay light. Whatever is registered from outside the package takes part in the identity of the
stages that use it, by its version and by the source of its module.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from capacity_gap.settings.errors import ConfigError, nearest

T = TypeVar("T")
PACKAGE = __name__.split(".")[0]


def _caller() -> str:
    """The module that registers: what it registers may be defined elsewhere, as a partial function is."""
    return str(sys._getframe(2).f_globals["__name__"])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One entry: what its name stands for, and what it can do."""

    name: str
    value: T
    module: str
    version: int = 1
    traits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def meaning(self) -> str:
        """The first sentence of its documentation."""
        text = inspect.getdoc(self.value) or ""
        return " ".join(text.split("\n\n")[0].split())

    @property
    def is_ours(self) -> bool:
        """Whether the package itself registers it."""
        return self.module.split(".")[0] == PACKAGE

    @property
    def identity(self) -> dict[str, Any]:
        """What a stage that uses this entry hashes beside its name: nothing for the package's own first versions.

        An entry from outside adds its version and the SHA-256 of its module's source, so that an edited one makes
        another result.
        """
        if self.is_ours:
            return {} if self.version == 1 else {"version": self.version}
        files = {f for name in (self.module, getattr(self.value, "__module__", PACKAGE)) for f in source_files(name)}
        digest = hashlib.sha256()
        for file in sorted(files):
            digest.update(file.read_bytes())
        return {"version": self.version, "source": digest.hexdigest()[:20]}


def source_files(module: str) -> list[Path]:
    """The file of a user's module, or all of its package; none of the standard library's or of ours."""
    top = module.split(".")[0]
    if top == PACKAGE or top in sys.stdlib_module_names:
        return []
    known = getattr(sys.modules[top], "__file__", None) or getattr(sys.modules[module], "__file__", None)
    if known is None:
        raise ConfigError(f"{module} registers an entry but is no file. Put it into a module that extend= names.")
    file = Path(known)
    return sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]


class Registry(Mapping[str, T]):
    """The entries of one choice, by name, in the order in which they were registered."""

    def __init__(self, kind: str, *, setting: str, traits: Mapping[str, Any] | None = None) -> None:
        """`kind` is what an entry is called, `setting` the key that chooses one, `traits` what may be said of each,
        with the default of each.
        """
        self.kind, self.setting, self.traits = kind, setting, dict(traits or {})
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, version: int = 1, **traits: Any) -> Callable[[T], T]:
        """Decorates what `name` stands for; a name of the package cannot be taken again.

        Raises:
            ConfigError: the name is taken, or a trait is not one that entries of this kind have.
        """
        self._check(name, traits)
        caller = _caller()

        def add(value: T) -> T:
            self._add(name, value, caller, version, traits)
            return value

        return add

    def add(self, name: str, value: T, *, version: int = 1, **traits: Any) -> None:
        """What `register` does, for a value that is neither a function nor a class."""
        self._add(name, value, _caller(), version, traits)

    def _add(self, name: str, value: T, module: str, version: int, traits: Mapping[str, Any]) -> None:
        self._check(name, traits)
        taken = self._entries.get(name)
        if taken and (taken.module != module or (not callable(value) and taken.value != value)):
            raise ConfigError(f"there is a {self.kind} {name!r} already, of {taken.module}. Name yours otherwise.")
        self._entries[name] = Entry(name, value, module, version, self.traits | dict(traits))

    def _check(self, name: str, traits: Mapping[str, Any]) -> None:
        if unknown := traits.keys() - self.traits.keys():
            raise ConfigError(
                f"the {self.kind} {name!r} is registered with {', '.join(sorted(unknown))}. "
                f"Allowed: {', '.join(self.traits) or 'nothing but a version'}."
            )

    def entry(self, name: str) -> Entry[T]:
        """The whole entry.

        Raises:
            ConfigError: there is none of that name; the message lists those there are.
        """
        if name not in self._entries:
            raise ConfigError(
                f"{self.setting}={name!r} is not known{nearest(name, self._entries)}. "
                f"Allowed: {', '.join(self._entries)}. One of your own needs extend=[MODULE]."
            )
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self.entry(name).value

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def that(self, **traits: Any) -> list[str]:
        """The names of entries with these traits."""
        return [n for n, e in self._entries.items() if all(e.traits[k] == v for k, v in traits.items())]
