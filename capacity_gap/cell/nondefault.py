"""What decided a cell and no column of its record says: one text, of what is not as usual.

Rows of a table are averaged where their settings agree (`fit/frame.py`), so whatever may differ must be recorded. What
is left out on purpose: the content of a ladder of folders (its rungs are told apart by name), `train.threads` and
`evaluate.ood_tokens` (the same quantities, rounded or sampled otherwise), what only adds to a student's history.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.data.corpus_config import SourceConfig
from capacity_gap.data.sources import identity, tokenizer_identity
from capacity_gap.settings.hashing import default_of, files_digest, identity_fields

SOURCE = ("name", "dataset", "weight")  # what the record's name of the corpus says
SAID = {
    "family": ("name", "teacher_data"),
    "corpus": SOURCE,
    "expand": ("tokenizer", "revision"),  # said below, by what they stand for
    "adapt": ("data",),
    "prune": ("method", "init", "reference", "shape", "fixed", "priority", "layers", "iterative"),
    "distill": ("loss", "kd_weight", "temperature", "signal", "signal_size", "skew", "hidden_weight"),
    "train": ("batch_size", "precision", "threads", "evaluate_every"),
    "evaluate": ("tokens", "ood_tokens", "tasks", "code_tasks"),
    "instruct": ("count", "epochs", "batch_size", "learning_rate", "lora_rank", "replay"),
    "prefer": ("count", "epochs", "batch_size", "learning_rate", "lora_rank", "beta"),
}
# Where `conf/` sets another default than the dataclass.
USUAL = {"train.warmup": 0.1, "family.pretrain.batch_size": 4, "family.pretrain.warmup": 0.1}
PUBLISHED = {"family.dtype": "bf16"}


def unsaid(config: RunConfig, *, ladder: str, pretrained: bool) -> str:
    """The settings that decide a distilled student, have no column and are not as usual: `name=value`, sorted.

    Args:
        config: of the cell.
        ladder: the name of its family.
        pretrained: its teacher is trained here, and not a published one.
    """
    usual = USUAL if pretrained or ladder == "folders" else USUAL | PUBLISHED
    said: dict[str, Sequence[str]] = dict(SAID)
    if not pretrained:
        said["family"] = (*SAID["family"], "teacher_epochs", "pretrain")
    if config.adapt.parts:  # the record's corpus is then the mixture that the teachers were adapted to
        said["corpus"] = ()
    found: dict[str, Any] = dict(_texts("corpus", config.corpus))
    for section in _sections(config):
        found |= dict(_unusual(section, getattr(config, section), said[section], usual))
    if config.prune.init == "random" and config.prune.depth is not None:
        found["prune.depth"] = config.prune.depth
    if config.expand.tokenizer:
        second = tokenizer_identity(config.expand.tokenizer, config.expand.revision)
        found["expand.tokenizer"] = "@".join(str(v)[:40] for v in second.values())
    return _text(found)


def unsaid_of_tuning(config: RunConfig) -> str:
    """The same of what became of the distilled student afterwards."""
    found: dict[str, Any] = {}
    for section in ("instruct", "prefer"):
        given = getattr(config, section)
        if given.wanted:
            found |= dict(_unusual(section, given, SAID[section], {}))
            if given.path:
                found[f"{section}.content"] = files_digest([Path(given.path).expanduser()])[:12]
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
    if config.prune.init != "random":
        yield "prune"
    if config.distill.kd_weight:
        yield "distill"


def _unusual(path: str, config: Any, said: Sequence[str], usual: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a section, and of those inside it, that are not as usual."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name, value in identity_fields(config).items():
        key = f"{path}.{name}"
        if name in said:
            continue
        if isinstance(value, list):
            for i, part in enumerate(value):
                yield from _texts(f"{key}.{i}", part)
                yield from _unusual(f"{key}.{i}", part, SOURCE if path == "adapt" or said else (), usual)
        elif dataclasses.is_dataclass(value):
            yield from _unusual(key, value, (), usual)
        elif value != usual.get(key, default_of(fields[name])):
            yield key, value


def _texts(path: str, source: SourceConfig) -> Iterator[tuple[str, str]]:
    """The content of a corpus of the user's own files: they are all called `text`."""
    if source.name == "text":
        yield f"{path}.content", identity(source)["content"][:12]
