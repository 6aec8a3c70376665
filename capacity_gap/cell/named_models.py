"""The models that a cell names: its ladder of teachers, and the trained model that its student is. Loads no torch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.lengths import check_positions
from capacity_gap.cell.teacher_config import FamilyConfig
from capacity_gap.models.axes import architecture, count_params, dims, padded
from capacity_gap.models.checkpoints import NOT_HERE, Checkpoint, checkpoint, is_checkpoint
from capacity_gap.models.folders import checkpoint_family, config_of, same_vocabulary
from capacity_gap.models.ladders import FOLDERS, Family, family
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import parse_scale

UNSAID = FamilyConfig.name  # the ladder, where none is named
Start = tuple[Checkpoint, Mapping[str, Any]] | tuple[None, None]  # a checkpoint and its config.json


def ladder_of(config: RunConfig) -> Family:
    """The family's ladder, or one made of the user's checkpoints."""
    name = config.family.name
    if name != FOLDERS and (not is_checkpoint(config.teacher) or config.teacher in family(name).published.values()):
        return family(name)
    if name not in (FOLDERS, UNSAID):
        raise ConfigError(
            f"family={name} with teacher={config.teacher}, which is not one of its rungs: "
            f"{' '.join(family(name).rungs)}. Leave out family=: checkpoints form a ladder of their own."
        )
    given = config.family.folders or ([config.teacher] if is_checkpoint(config.teacher) else [])
    if not given:
        raise ConfigError(
            "family=folders needs checkpoints: family.folders=[FOLDER,ORG/NAME,FILE.gguf,...], and teacher= one of "
            "them. Without family=folders, teacher=ORG/NAME alone is enough."
        )
    return checkpoint_family(given, planning=config.plan)


def expanded(ladder: Family, config: RunConfig) -> Family:
    """The ladder with the requested vocabulary in every shape: the same rungs, each slightly larger."""
    wanted = config.expand
    if not wanted.vocab:
        return ladder
    own = _rows_of(ladder)
    rows = padded(wanted.vocab, wanted.multiple)
    if wanted.vocab <= own:
        raise ConfigError(f"expand.vocab={wanted.vocab}, but {ladder.name} already has {own} tokens. Set it higher.")
    shapes = {n: {**shape, architecture(shape).keys["vocab"]: rows} for n, shape in ladder.rungs.items()}
    return replace(ladder, rungs=shapes)


def start_of(config: RunConfig, ladder: Family) -> Start:
    """The checkpoint that the student is: the one it names, or with init=pretrained a published rung of its scale.

    Raises:
        ConfigError: it cannot be one.
    """
    if not is_checkpoint(config.student):
        return _published_start(config, ladder) if config.prune.init == "pretrained" else (None, None)
    found = checkpoint(config.student)
    shape = config_of(found, planning=config.plan)
    if own := list(ladder.checkpoints.values()):
        same_vocabulary([own[0], found])
    elif config.family.name == UNSAID and (rows := dims(shape).vocab) != (theirs := _rows_of(ladder)):
        raise ConfigError(
            f"student={config.student} has {rows:,} tokens, and teacher={config.teacher} of family={ladder.name}, "
            f"which is trained here, has {theirs:,}. Name a teacher with the student's tokens: teacher=FOLDER or "
            f"teacher=ORG/NAME (teacher={RunConfig.teacher} is the default)."
        )
    shaped = config.prune.fixed or config.prune.depth or config.prune.experts
    if config.prune.init == "shared" or config.prune.init_data or shaped:
        raise ConfigError(
            f"student={config.student} is a trained model: it is not pruned and keeps its own shape. Leave "
            "out prune.init=shared, prune.init_data, prune.fixed, prune.depth and prune.experts."
        )
    return found, shape


def _rows_of(ladder: Family) -> int:
    return max(dims(shape).vocab for shape in ladder.rungs.values())


def _published_start(config: RunConfig, ladder: Family) -> Start:
    """The published rung whose scale the student has; None where the start is trained here."""
    rung = ladder.scales.get(parse_scale(config.student, key="student"))
    if not ladder.published and config.prune.init_data is None:
        raise ConfigError(
            f"prune.init=pretrained with family={ladder.name}, whose models are trained here: set prune.init_data="
            "TOKENS too, the tokens that the initial student is pre-trained on."
        )
    if not ladder.published:
        return None, None
    if config.prune.init_data is not None:
        raise ConfigError(
            f"prune.init_data={config.prune.init_data}: the models of {ladder.name} are published, none is trained "
            "here. Leave out this setting."
        )
    if rung is None:
        raise ConfigError(
            f"prune.init=pretrained with student={config.student}: {ladder.name} has no model of this size. Its rungs: "
            f"{' '.join(ladder.published)}. Any other checkpoint can be named: student=ORG/NAME."
        )
    name = ladder.published[rung]
    return ladder.checkpoints.get(rung, Checkpoint(name, name, NOT_HERE)), ladder.rungs[rung]


def check_start(config: RunConfig, ladder: Family, rung: str, shape: Mapping[str, Any]) -> None:
    """Raises if a student that is a checkpoint cannot learn from this teacher on this text."""
    check_positions(config, ladder, shape)
    if config.expand.vocab:
        raise ConfigError(
            f"expand.vocab={config.expand.vocab} with student={config.student}: a pre-trained student has "
            "no rows for new tokens. Cut the student from an expanded teacher, or leave expand.vocab out."
        )
    stacks = [len(architecture(one).stacks) for one in (shape, ladder.rungs[rung])]
    if stacks[0] != stacks[1]:
        raise ConfigError(
            f"student={config.student} and teacher={config.teacher}: one is an encoder-decoder and the other is not. "
            "Their losses cover different tokens; use two models of one kind."
        )


def with_init(config: RunConfig, start: Checkpoint | None) -> RunConfig:
    """The settings with what a checkpoint implies: the student is a trained model, unless its weights are drawn."""
    if start is None or config.prune.init == "random":
        return config
    return replace(config, prune=replace(config.prune, init="pretrained"))


def student_size(config: RunConfig, ladder: Family, shape: Mapping[str, Any] | None) -> tuple[int, int]:
    """The student's nominal scale, and the parameters that it means."""
    if shape is not None and is_checkpoint(config.student):
        return count_params(shape), count_params(shape)
    student = parse_scale(config.student, key="student")
    return student, ladder.student_params(student)


def called(config: RunConfig, start: Checkpoint | None) -> str:
    """The display name of a student that is a checkpoint; empty where it is a scale."""
    return start.name if start is not None and is_checkpoint(config.student) else ""


def unsaid_student(config: RunConfig, ladder: Family, why: ConfigError) -> ConfigError:
    """The error for an impossible student, with a hint if `student` was left at its default."""
    if config.student != RunConfig.student or not ladder.published:
        return why
    return ConfigError(f"{why} Set student=: {config.student} is only the default.")
