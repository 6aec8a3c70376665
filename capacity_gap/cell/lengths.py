"""Whether sequences and budgets of tokens go together with each other and with the models. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.models.axes import dims
from capacity_gap.models.ladders import Family
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import parse_scale, parse_tokens


def check_lengths(config: RunConfig, data: int, teacher: int | None, target: int) -> None:
    """Training sees whole sequences: a budget below one sequence a pass would train on nothing."""
    c, length = config, config.corpus.sequence_length or 0
    adapt = parse_scale(c.adapt.data, key="adapt.data", allow_zero=True)
    step = 0 if c.prune.step_data == "0" else parse_tokens(c.prune.step_data, params=target, key="prune.step_data")
    budgets = [
        ("data", c.data, data, "epochs", c.epochs),
        ("adapt.data", c.adapt.data, adapt, "adapt.epochs", c.adapt.epochs),
        ("family.teacher_data", c.family.teacher_data, teacher or 0, "family.teacher_epochs", c.family.teacher_epochs),
        ("prune.step_data", c.prune.step_data, step, "epochs", c.epochs),
    ]
    for key, given, tokens, passes, epochs in budgets:
        if 0 < tokens < length * epochs:
            raise ConfigError(
                f"{key}={given} with {passes}={epochs} and corpus.sequence_length={length} is less than one sequence "
                f"per epoch: nothing would be trained. Give {key}={length * epochs} or more."
            )


def check_positions(config: RunConfig, ladder: Family, shape: Mapping[str, Any]) -> None:
    """Learned positions end; a longer sequence would fail deep inside a forward pass."""
    limit = dims(shape).longest
    if limit and (config.corpus.sequence_length or 0) > limit:
        raise ConfigError(
            f"corpus.sequence_length={config.corpus.sequence_length}, but models of {ladder.name} have learned "
            f"positions for {limit} tokens. Give a shorter sequence_length."
        )
