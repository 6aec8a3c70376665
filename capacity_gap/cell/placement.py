"""Placement of teachers: on one device, spread over the devices of a process, or sharded over ranks. No torch."""

from capacity_gap.cell.config import RunConfig
from capacity_gap.pruning.methods import LAYER_SCORES, SCORES
from capacity_gap.settings.errors import ConfigError


def placement_of(config: RunConfig) -> str:
    """`one`, `devices` or `ranks`: as configured, else ranks if the student is sharded and nothing excludes it."""
    asked = config.family.placement
    if asked != "auto":
        return asked
    return "ranks" if config.train.sharding == "fsdp" and not _must_be_whole(config, "ranks") else "one"


def check_placement(config: RunConfig) -> None:
    """Raises `ConfigError` if a teacher is to be spread and another setting needs it whole."""
    asked = config.family.placement
    whole = _must_be_whole(config, asked)
    if whole and asked in ("devices", "ranks"):
        raise ConfigError(
            f"family.placement={asked} with {whole}: this combination needs the whole teacher on one device. Leave "
            "out family.placement, or change the other setting."
        )


def check_quantization(config: RunConfig, ladder: str, *, pretrained: bool) -> None:
    """Raises `ConfigError` if teachers are to be held as they cannot be. `pretrained`: they are trained here."""
    dtype, quantization = config.family.dtype, config.family.quantization
    if pretrained and (dtype, quantization) != ("fp32", "none"):
        raise ConfigError(
            f"family.dtype={dtype} family.quantization={quantization}: these settings apply to published teachers, "
            f"and those of {ladder} are trained here, in fp32. Leave out both; train.precision=bf16 sets the "
            "precision of training."
        )
    if quantization != "none" and config.prune.cuts:
        raise ConfigError(
            f"family.quantization={quantization} with prune.init={config.prune.init}: a quantised teacher cannot be "
            "pruned. Use family.quantization=none, or prune.init=random."
        )


def check_trunk(config: RunConfig, tokens: int, *, by_recipe: bool) -> None:
    """Raises `ConfigError` if a student is to branch off a trunk and another setting does not go with that.

    `by_recipe`: its batch is the recipe's and grows with its budget.
    """
    train = config.train
    if not train.trunk:
        return
    wrong = [
        said
        for said, is_wrong in (
            (f"train.schedule={train.schedule} (it takes wsd)", train.schedule != "wsd"),
            (f"train.decay={train.decay:g} (it takes more than 0 and less than 1)", not 0 < train.decay < 1),
            (f"epochs={config.epochs} (it takes 1)", config.epochs != 1),
            ("data=0", tokens == 0),
            ("no train.batch_size: the recipe's grows with the budget, so budgets would share no steps", by_recipe),
        )
        if is_wrong
    ]
    if wrong:
        raise ConfigError(
            f"train.trunk=true cannot be combined with {', '.join(wrong)}. Change these settings, or leave out "
            "train.trunk."
        )


def _must_be_whole(c: RunConfig, placement: str) -> str | None:
    """The setting that keeps the teacher from being spread like this; None where nothing does."""
    if placement != "devices" and c.family.quantization != "none":
        return f"family.quantization={c.family.quantization}"
    if not c.prune.cuts:
        return None
    if not SCORES.entry(c.prune.method).traits["spread"]:
        return f"prune.method={c.prune.method}"
    if c.prune.by_layer_score and not LAYER_SCORES.entry(str(c.prune.layers)).traits["spread"]:
        return f"prune.layers={c.prune.layers}"
    return None
