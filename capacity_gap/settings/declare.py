"""The declaration of a setting: one field, beside its owner, with all its metadata.

    kd_weight: float = setting(0.5, "Weight w of distillation.", least=0, most=1, column="kd_weight", parts=11)

From it come the field of the config dataclass and its checks, the hash of a stage (`hashing.py`), the columns of a
record (`records/record.py`), the text of settings that have no column (`cell/nondefault.py`), what the fit parts
curves by, the help of the command line and the reference page. A choice among entries of a registry gives the registry
as `allowed`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from capacity_gap.settings.checks import check_text
from capacity_gap.settings.errors import ConfigError, choose, shown
from capacity_gap.settings.registry import Registry

KEY = "setting"
NOTHING = object()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The metadata of a setting beside its name, type and default."""

    meaning: str  # one sentence
    allowed: Iterable[str] | Callable[[], Iterable[str]] | None = None  # names, a registry, or what gives them
    above: float | None = None  # more than this
    least: float | None = None  # this or more
    below: float | None = None
    most: float | None = None
    decides: bool = True  # the result; else it says how, where or whether something is run
    later: bool = False  # added after the first release: left out of the hash at its default
    column: str | None = None  # of the record, which tells the value
    computed: bool = False  # the column is computed, from this and other settings
    if_set: bool = False  # the column is given only where the value is not the default
    null_at: Any = NOTHING  # the value that the column gives as null
    parts: int | None = None  # the column parts curves, which are listed in the order of these numbers
    parts_repeats: int | None = None  # it parts only cells that agree in all else, their seeds too; in this order
    untold: str | None = None  # why neither a column nor the text of settings tells it
    content: bool = False  # a path: the text of settings tells the content of what is there
    only_for: str | None = None  # the one choice of its section's name that reads it

    @property
    def names(self) -> list[str] | None:
        """The names that are allowed now, or None where it is no choice."""
        if self.allowed is None:
            return None
        return list(self.allowed() if callable(self.allowed) else self.allowed)


def setting(default: Any, meaning: str, **known: Any) -> Any:
    """A field of a config dataclass, with its declaration; a list or a config class as default is made anew."""
    metadata = {KEY: Setting(meaning=meaning, **known)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(owner: Any) -> Iterator[tuple[Field, Setting]]:
    """The fields of a config dataclass, or of an instance, with their declarations."""
    for f in fields(owner):
        if KEY in f.metadata:
            yield f, f.metadata[KEY]


def default_of(field: Field) -> Any:
    """What a field of a dataclass is unless it is given."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def type_name(field: Field) -> str:
    """The type of a field as it is written: `int`, `float | None`."""
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


@dataclass(frozen=True)
class Declared:
    """A setting with its place among all others."""

    key: str  # with dots
    field: Field
    setting: Setting

    @property
    def default(self) -> Any:
        """Its value unless given."""
        return default_of(self.field)

    @property
    def section(self) -> type | None:
        """The config class of a setting that is a section of its own, else None."""
        kind = self.field.type
        return kind if isinstance(kind, type) and is_dataclass(kind) else None


def walk(owner: type, prefix: str = "") -> Iterator[Declared]:
    """Every setting of a config class and of its sections, in the order of declaration; sections themselves too."""
    for f, known in declared(owner):
        here = Declared(prefix + f.name, f, known)
        yield here
        if here.section:
            yield from walk(here.section, f"{here.key}.")


def validate(section: str, config: Any) -> None:
    """Checks every setting of a config dataclass against its declaration.

    Raises:
        ConfigError: a value is not allowed or out of range; the message says what is.
    """
    for f, known in declared(config):
        value = getattr(config, f.name)
        key = f"{section}.{f.name}" if section else f.name
        if value is None and f.default is None:
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(key, text)
        if isinstance(known.allowed, Registry):
            known.allowed.entry(value)  # whose message says what to do about an entry of one's own
        elif (names := known.names) is not None:
            choose(key, value, names)
        elif isinstance(value, int | float) and not isinstance(value, bool) and not _within(value, known):
            null = ", or null" if f.default is None else ""
            raise ConfigError(f"{key}={shown(value)} is out of range. Allowed: {_range(known)}{null}.")


def _within(value: float, known: Setting) -> bool:
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (known.above is None or value > known.above)
        and (known.least is None or value >= known.least)
        and (known.below is None or value < known.below)
        and (known.most is None or value <= known.most)
    )


def _range(known: Setting) -> str:
    """The allowed range in words."""
    low = known.least if known.above is None else known.above
    high = known.most if known.below is None else known.below
    if low is None and high is None:
        return "a finite number"
    if low is None or high is None:
        name = "zero" if not low and not high else _number(high if low is None else low)
        if low is None:
            return f"less than {name}" if known.below is not None else f"{name} or less"
        return f"more than {name}" if known.above is not None else f"{name} or more"
    if known.above is not None and known.below is not None:
        return f"between {_number(low)} and {_number(high)}"
    more = "more than " if known.above is not None else ""
    return f"{more}{_number(low)} to {'less than ' if known.below is not None else ''}{_number(high)}"


def _number(value: float | None) -> str:
    """A bound as it is read: whole numbers in full, others short."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def allowed_text(known: Setting) -> str:
    """What a setting may be, in words; empty where its type says it all."""
    if (names := known.names) is not None:
        return ", ".join(names)
    bounded = any(v is not None for v in (known.above, known.least, known.below, known.most))
    return _range(known) if bounded else ""
