"""What decided a cell and no column of its record says: one text, of what is not as usual.

Rows of a table are averaged where their settings agree (`fit/frame.py`), so whatever may differ must be recorded.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from capacity_gap.config import RunConfig, SourceConfig
from capacity_gap.data.sources import identity, tokenizer_identity
from capacity_gap.fingerprint import identity_fields

SAID = {
    "family": ("name", "teacher_data"),
    "corpus": ("name", "dataset", "weight"),
    "expand": ("vocab", "revision"),
    "adapt": ("data",),
    "prune": ("method", "init", "reference", "shape", "fixed", "priority", "layers", "iterative"),
    "distill": ("loss", "kd_weight", "temperature", "signal", "signal_size", "skew", "hidden_weight"),
    "train": ("batch_size", "learning_rate", "learning_rate_times_width", "precision", "threads", "evaluate_every"),
    "instruct": ("count", "epochs", "batch_size", "learning_rate", "lora_rank", "replay"),
    "prefer": ("count", "epochs", "batch_size", "learning_rate", "lora_rank", "beta"),
}
# Where `conf/` sets another default than the dataclass.
USUAL = {"train.warmup": 0.1, "family.pretrain.batch_size": 4, "family.pretrain.warmup": 0.1}


def unsaid(config: RunConfig, *, pretrained: bool) -> str:
    """The settings that decide results, have no column of their own and are not as usual: `name=value`, sorted.

    Args:
        config: of the cell.
        pretrained: its teacher is trained here, and not a published one.
    """
    found = dict(_texts("corpus", config.corpus))
    apart = {"family": () if pretrained else ("teacher_epochs", "pretrain")}
    for section in _sections(config):
        names = (*SAID[section], *apart.get(section, ()))
        found |= dict(_unusual(section, getattr(config, section), names))
    if config.adapt.parts:  # the corpus of the record is then the mixture that the teachers were adapted to
        found["corpus.name"] = config.corpus.name
    if config.expand.tokenizer:
        second = tokenizer_identity(config.expand.tokenizer, config.expand.revision)
        found["expand.tokenizer"] = "@".join(str(v)[:40] for v in second.values())
    return " ".join(f"{name}={found[name]}" for name in sorted(found))


def _sections(config: RunConfig) -> Iterator[str]:
    """Those that this cell reads."""
    yield from ("family", "corpus", "train")
    if config.expand.vocab:
        yield "expand"
    if config.adapt.data != "0":
        yield "adapt"
    if config.prune.init != "random":
        yield "prune"
    if config.distill.kd_weight:
        yield "distill"
    yield from (name for name in ("instruct", "prefer") if getattr(config, name).wanted)


def _unusual(path: str, config: Any, said: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    fresh = type(config)
    usual = {f.name: _default(f) for f in dataclasses.fields(fresh)}
    for name, value in identity_fields(config).items():
        key = f"{path}.{name}"
        if name in said or key == "expand.tokenizer":
            continue
        if isinstance(value, list):
            for i, part in enumerate(value):
                yield from _texts(f"{key}.{i}", part)
                yield from _unusual(f"{key}.{i}", part, SAID["corpus"])
        elif dataclasses.is_dataclass(value):
            yield from _unusual(key, value, ())
        elif value != USUAL.get(key, usual[name]):
            yield key, value


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _texts(path: str, source: SourceConfig) -> Iterator[tuple[str, str]]:
    """The content of a corpus of the user's own files: they are all called `text`."""
    if source.name == "text":
        yield f"{path}.content", identity(source)["content"][:12]
