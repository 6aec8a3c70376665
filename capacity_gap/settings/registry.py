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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from capacity_gap.settings.errors import ConfigError, nearest, shown

T = TypeVar("T")
PACKAGE = __name__.split(".")[0]


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One entry: what its name stands for, and what it can do."""

    name: str
    value: T
    module: str  # that registered it
    version: int = 1
    traits: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # digest of a user's module when it was imported

    @property
    def meaning(self) -> str:
        """The first sentence of its documentation."""
        text = inspect.getdoc(self.value) or ""
        return " ".join(text.split("\n\n")[0].split())

    @property
    def is_ours(self) -> bool:
        """Whether the package itself registers it."""
        return not self.source

    @property
    def identity(self) -> dict[str, Any]:
        """What a stage that uses this entry hashes beside its name: nothing for the package's own first versions.

        An entry from outside adds its version and the digest of the source that was imported, so that an edited one
        makes another result.
        """
        if self.is_ours:
            return {} if self.version == 1 else {"version": self.version}
        return {"version": self.version, "source": self.source}

    def identity_as(self, name: str) -> dict[str, Any]:
        """The same under keys that begin with `name`, for a stage that has keys of its own."""
        return {f"{name}_{key}": value for key, value in self.identity.items()}


def source_digest(module: str) -> str:
    """SHA-256 over names and content of a user's module, or of all of the package that it is part of; else empty.

    Taken once, when an entry is registered: what is edited later is not what this process computes with.
    """
    top = module.split(".")[0]
    if top == PACKAGE:
        return ""
    loaded = sys.modules[top]
    if (known := getattr(loaded, "__file__", None)) and Path(known).name != "__init__.py":
        files = {Path(known).name: Path(known)}
    else:  # a package, or a folder that serves as one
        files = {str(f.relative_to(r)): f for r in getattr(loaded, "__path__", ()) for f in Path(r).rglob("*.py")}
    if not files:
        raise ConfigError(f"{module} registers an entry but is not a file. Put it into a module named by extend=.")
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes())
    return digest.hexdigest()[:20]


class Registry(Mapping[str, T]):
    """The entries of one choice, by name, in the order in which they were registered."""

    def __init__(
        self, kind: str, *, setting: str, traits: Mapping[str, Any] | None = None, reserved: Sequence[str] = ()
    ) -> None:
        """`kind` is what an entry is called, `setting` the key that chooses one, `traits` the properties of
        entries with their defaults, `reserved` names of choices that are no entries.
        """
        self.kind, self.setting, self.traits, self.reserved = kind, setting, dict(traits or {}), tuple(reserved)
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, *, version: int = 1, **traits: Any) -> Callable[[T], T]:
        """Decorates what `name` stands for; a name of the package cannot be taken again.

        Raises:
            ConfigError: the name is taken, or a trait is not one that entries of this kind have.
        """
        self._check(name, traits)
        module = sys._getframe(1).f_globals["__name__"]  # what it registers may be defined elsewhere

        def add(value: T) -> T:
            self._add(name, value, module, version, traits)
            return value

        return add

    def add(self, name: str, value: T, *, version: int = 1, module: str | None = None, **traits: Any) -> None:
        """What `register` does, for a value that is neither a function nor a class; `module`: that registers it."""
        self._check(name, traits)
        self._add(name, value, module or sys._getframe(1).f_globals["__name__"], version, traits)

    def _add(self, name: str, value: T, module: str, version: int, traits: Mapping[str, Any]) -> None:
        taken = self._entries.get(name)
        if taken and (taken.module != module or (not callable(value) and taken.value != value)):
            raise ConfigError(f"the {self.kind} {name!r} already exists, in {taken.module}. Choose another name.")
        self._entries[name] = Entry(name, value, module, version, self.traits | dict(traits), source_digest(module))

    def _check(self, name: str, traits: Mapping[str, Any]) -> None:
        if name in self.reserved:
            raise ConfigError(f"{self.setting}={name} is reserved. Choose another name for your {self.kind}.")
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
                f"{self.setting}={shown(name)!r} is not known{nearest(name, self._entries)}. "
                f"Allowed: {', '.join(self._entries)}. Your own entries need extend=[MODULE]."
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
