"""How a record holds its settings: in columns where they have one, else in one text of non-default settings.

Rows of a table are averaged where their settings agree (`fit/frame.py`), so whatever may differ must be recorded: a
setting that decides the result and declares no column is in the text, unless its declaration says why it need not be.
The content of a ladder of folders is left out: its rungs are told apart by name.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from capacity_gap.cell.config import TUNING, RunConfig
from capacity_gap.data.corpora import CORPORA
from capacity_gap.data.corpus_config import SourceConfig
from capacity_gap.data.sources import identity, tokenizer_identity
from capacity_gap.distill.divergences import LOSSES
from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.pruning.methods import LAYER_SCORES, SCORES
from capacity_gap.settings.declare import NOTHING, declared, default_of
from capacity_gap.settings.hashing import files_digest, fingerprint, identity_fields
from capacity_gap.settings.places import user_path
from capacity_gap.settings.scales import format_scale


def setting_columns(config: RunConfig) -> dict[str, Any]:
    """The columns that hold a setting's own value; computed ones come from `ResolvedCell.description`."""
    found = _columns(config) | _columns(config.train) | _columns(config.distill)
    pruned = _columns(config.prune)
    if not config.prune.cuts:
        pruned = {"init": pruned["init"], "prune_method": None}
    for name in TUNING:
        if getattr(config, name).wanted:
            found |= _columns(getattr(config, name))
    return found | pruned


def _columns(section: Any) -> dict[str, Any]:
    found = {}
    for f, known in declared(section):
        value = getattr(section, f.name)
        if known.column is None or known.computed or (known.if_set and value in (default_of(f), known.null_at)):
            continue
        found[known.column] = None if known.null_at is not NOTHING and value == known.null_at else value
    return found


def settings_text(
    config: RunConfig,
    *,
    usual: Mapping[str, Any],
    pretrained: bool,
    architecture: Mapping[str, Any] | None = None,
    offset: int = 0,
) -> str:
    """The settings that decide a distilled student, have no column and are not the default: `name=value`, sorted.

    Args:
        config: of the cell.
        usual: values of settings that were not given, where that is not their default.
        pretrained: its teacher is trained here, and not a published one.
        architecture: what identifies its axis table, where that is the user's.
        offset: tokens that its budget begins behind.
    """
    found: dict[str, Any] = dict(_texts("corpus", config.corpus))
    if offset:
        found["data_offset"] = format_scale(offset)
    for section in _sections(config):
        # The record's corpus is the mixture that teachers were adapted to, if they were.
        told = section != "corpus" or not config.adapt.parts
        found |= dict(_nondefault(section, getattr(config, section), usual, told=told))
    if not pretrained:
        found = {k: v for k, v in found.items() if not k.startswith(("family.pretrain", "family.teacher_epochs"))}
    if not config.prune.cuts:
        told_anyway = {"prune.depth": config.prune.depth, "prune.experts": config.prune.experts}
        found |= {key: value for key, value in told_anyway.items() if value is not None}
    found |= {**dict(_entries(config)), **(architecture or {})}
    if config.expand.tokenizer:
        second = tokenizer_identity(config.expand.tokenizer, config.expand.revision)
        found["expand.tokenizer"] = "@".join(str(v)[:40] for v in second.values())
    return _text(found)


def _entries(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Version and source of the registered entries that this cell uses, where they are not the package's first ones."""
    parts = {f"corpus.parts.{i}": part for i, part in enumerate(config.text.parts)} or {"corpus": config.text}
    used = [(path, CORPORA, part.name) for path, part in parts.items()]
    if config.prune.cuts:
        chosen = ((SCORES, config.prune.method), (LAYER_SCORES, config.prune.layers or ""))
        used += [(r.setting, r, n) for r, n in chosen]
    if config.distill.kd_weight:
        used += [(r.setting, r, n) for r, n in ((LOSSES, config.distill.loss), (SIGNALS, config.distill.signal))]
    for path, registry, name in used:
        if name in registry:
            yield from ((f"{path}.{key}", str(value)[:12]) for key, value in registry.entry(name).identity.items())
    for path, part in parts.items():
        if part.name in CORPORA and not CORPORA.entry(part.name).is_ours:
            yield f"{path}.content", fingerprint(identity(part))[:12]


def tuning_text(config: RunConfig) -> str:
    """The same of what became of the distilled student afterwards."""
    found: dict[str, Any] = {}
    for section in TUNING:
        given = getattr(config, section)
        if given.wanted:
            found |= dict(_nondefault(section, given, {}))
            if given.path:
                found[f"{section}.content"] = files_digest([user_path(given.path)])[:12]
    return _text(found)


def _text(found: dict[str, Any]) -> str:
    return " ".join(f"{name}={found[name]}" for name in sorted(found))


def _sections(config: RunConfig) -> Iterator[str]:
    """Those that this cell reads."""
    yield from ("family", "corpus", "train", "evaluate")
    if config.expand.vocab:
        yield "expand"
    if config.adapt.parts or config.adapt.data != "0":
        yield "adapt"
    if config.prune.cuts:
        yield "prune"
    if config.distill.kd_weight:
        yield "distill"


def _nondefault(path: str, config: Any, usual: Mapping[str, Any], *, told: bool = True) -> Iterator[tuple[str, Any]]:
    """The settings of a section, and of those inside it, that are not the default.

    `told`: leave out those with a column.
    """
    known = {f.name: (f, setting) for f, setting in declared(config)}
    for name, value in identity_fields(config).items():
        f, setting = known[name]
        key = f"{path}.{name}"
        if setting.untold or (told and setting.column):
            continue
        if isinstance(value, list):
            for i, part in enumerate(value):
                yield from _texts(f"{key}.{i}", part)
                yield from _nondefault(f"{key}.{i}", part, usual, told=told)
        elif dataclasses.is_dataclass(value):
            yield from _nondefault(key, value, usual, told=False)
        elif value != usual.get(key, default_of(f)):
            yield key, value


def _texts(path: str, source: SourceConfig) -> Iterator[tuple[str, str]]:
    """The content of a corpus of the user's own files: they are all called `text`."""
    if source.name == "text":
        yield f"{path}.content", identity(source)["content"][:12]
