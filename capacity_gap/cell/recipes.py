"""Default training of students by size: batch, length, warm-up, precision, widths. Imports no torch.

From random weights the peak learning rate is 0.4 / width: GPT-3's rates times its widths are 0.31 to 0.46 from 125M to
2.7B parameters (Brown et al. 2020, table 2.1). From 10M parameters on, students that begin cut or trained have half of
it: 1e-4 at width 2048, with which Sheared-LLaMA trains models of widths 2048 and 2560 cut from 7B (Xia et al. 2023,
appendix A). Pico students keep 0.4 / width for every start, as it was measured for them (docs/decisions.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.data.corpus_config import AUTO as ANY_CORPUS
from capacity_gap.models.axes import dims
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import short_scale
from capacity_gap.training.train_config import AUTO

RATE = 0.4  # peak learning rate times width
LEAST_STEPS = 500  # a budget of few batches would be all warm-up
LEAST_BATCH = 8
LEAST_MULTIPLE = 8  # of widths: below it kernels fall back to slower ones
# Without their first token they are lost: Gemma 3 270M has 4.87 nats instead of 3.22 on four pages of Python's manual.
NEED_BOS = "gemma"
EMBEDDED = "embedded"  # the corpus, where none is named
EMBEDDED_FOR = 50e6  # parameters: at most


@dataclass(frozen=True)
class Recipe:
    """Settings of a student's training that were left open."""

    name: str
    below: float  # parameters
    batch_size: int  # sequences: the most, where it is by tokens
    batch_tokens: int | None  # one step's, where the budget is long enough for `LEAST_STEPS` of them
    sequence_length: int
    warmup: float  # share of all steps
    precision: str
    dtype: str  # in which checkpoints are held while they teach
    micro_batch_tokens: int | None  # on a device at once, which changes no result; None: the whole batch
    score_batch: int  # sequences of one batch that pruning scores are taken over
    rate_of_trained: float  # peak rate times width of students that begin cut or trained; 0.4 from random weights
    multiple: int | None  # of hidden size and neurons; None: the family's


RECIPES = (
    # Chosen on pico models (docs/decisions.md): at such budgets more steps are worth more than larger ones.
    Recipe("pico", 10e6, 4, None, 128, 0.1, "fp32", "fp32", None, 8, RATE, None),
    # Batches: 0.5M tokens below 1B and 1M above, sequences of 2,048 (Brown et al. 2020, table 2.1). Warm-up: 3 % of the
    # steps (Sheared-LLaMA). Widths: matrix units of an A100 want multiples of 64 at 16 bits (NVIDIA's guide "Matrix
    # Multiplication Background"); 128 from 1B on, so that halves split over two devices are such multiples too.
    Recipe("small", 1e9, 256, 2**19, 2048, 0.03, "bf16", "bf16", 2**14, 1, 0.2, 64),
    Recipe("large", float("inf"), 512, 2**20, 2048, 0.03, "bf16", "bf16", 2**13, 1, 0.2, 128),
)


def recipe_of(config: RunConfig, params: int) -> Recipe:
    """The recipe of that name, or the default for students of `params` parameters."""
    asked = config.train.recipe
    return next(r for r in RECIPES if (params < r.below if asked == AUTO else r.name == asked))


def with_recipe(
    config: RunConfig, params: int, data: int, *, family: str, shapes: tuple[Mapping[str, Any], ...]
) -> RunConfig:
    """The settings with every one that was left open as the recipe has it.

    Args:
        config: as given.
        params: of the student.
        data: tokens that it learns from.
        family: the name of the ladder.
        shapes: the config.json of the models that read the sequences; learned positions shorten them.
    """
    found, train, corpus = usual(config, params, family=family, shapes=shapes), config.train, config.corpus
    recipe, length = recipe_of(config, params), corpus.sequence_length or found["corpus.sequence_length"]
    return replace(
        config,
        train=replace(
            train,
            batch_size=train.batch_size or _batch(recipe, length, data),
            warmup=found["train.warmup"] if train.warmup is None else train.warmup,
            precision=train.precision or recipe.precision,
            micro_batch_size=train.micro_batch_size or _micro_batch(recipe, length),
            learning_rate_times_width=train.learning_rate_times_width or found["train.learning_rate_times_width"],
        ),
        prune=replace(config.prune, batch_size=config.prune.batch_size or found["prune.batch_size"]),
        corpus=replace(
            corpus,
            sequence_length=length,
            name=EMBEDDED if corpus.name == ANY_CORPUS else corpus.name,
            bos=found["corpus.bos"] if corpus.bos is None else corpus.bos,
        ),
        family=replace(config.family, dtype=config.family.dtype or found["family.dtype"]),
    )


def usual(config: RunConfig, params: int, *, family: str, shapes: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """Values of settings without a column that were not given; the arguments are those of `with_recipe`."""
    recipe = recipe_of(config, params)
    limits = [longest for shape in shapes if (longest := dims(shape).longest)]
    return {
        "corpus.name": EMBEDDED,
        "corpus.bos": any(shape["model_type"].startswith(NEED_BOS) for shape in shapes),
        "corpus.sequence_length": min([recipe.sequence_length, *limits]),
        "train.warmup": recipe.warmup,
        "train.learning_rate_times_width": RATE if config.prune.init == "random" else recipe.rate_of_trained,
        "prune.batch_size": recipe.score_batch,
        "family.dtype": FAMILIES.entry(family).traits["dtype"] if family in FAMILIES else recipe.dtype,
    }


def multiples(config: RunConfig, params: int, usual: int) -> list[int]:
    """What widths may be multiples of, best first: the given multiple, else the recipe's and halves of it.

    Some ladders have no shape in large multiples: under groups of five query heads widths are multiples of five too.
    """
    if config.prune.multiple:
        return [config.prune.multiple]
    if config.prune.fixed:
        return [usual]
    most = recipe_of(config, params).multiple
    return [usual] if most is None else [most >> n for n in range(8) if most >> n >= LEAST_MULTIPLE]


def check_corpus(config: RunConfig, params: int) -> None:
    """Raises if no corpus was named for a student too large for the embedded prose."""
    if said := no_corpus(config, params):
        raise ConfigError(f"{said} Nothing was started.")


def no_corpus(config: RunConfig, params: int) -> str:
    """The error for a student that is too large for the embedded prose; else empty."""
    if config.corpus.name != ANY_CORPUS or params <= EMBEDDED_FOR or config.adapt.parts:
        return ""
    return (
        "no corpus is named, and the embedded prose (about 7M tokens of technical documentation) is unsuitable for a "
        f"student of {params:,} parameters. Set corpus=text corpus.path=FOLDER, corpus=fineweb_edu or another one; or "
        "corpus=embedded to use it anyway."
    )


def _batch(recipe: Recipe, length: int, data: int) -> int:
    """Sequences of one step: a power of two, so that it splits evenly over devices."""
    if recipe.batch_tokens is None:
        return recipe.batch_size
    wanted = min(recipe.batch_tokens, data / LEAST_STEPS) / length
    return max(LEAST_BATCH, 2 ** (max(1, int(wanted)).bit_length() - 1))


def _micro_batch(recipe: Recipe, length: int) -> int | None:
    """Sequences on a device at once. By tokens: eight short sequences leave a GPU waiting for its kernels' launches."""
    return None if recipe.micro_batch_tokens is None else max(1, recipe.micro_batch_tokens // length)


def recipe_line(config: RunConfig, params: int, multiple: int | None) -> str:
    """A plan's line on the recipe: its name, why it applies, and its values.

    `multiple`: what widths are multiples of, where some are chosen.
    """
    recipe, c = recipe_of(config, params), config
    sizes = {"pico": "below 10M", "small": "from 10M to 1B", "large": "from 1B on"}[recipe.name]
    why = f"students {sizes}" if c.train.recipe == AUTO else "asked for"
    tokens = short_scale((c.train.batch_size or 0) * (c.corpus.sequence_length or 0))
    rate = (
        f"{c.train.learning_rate or c.train.learning_rate_times_width:g}{'' if c.train.learning_rate else ' / width'}"
    )
    wide = f", widths in multiples of {multiple}" if multiple and multiple > 1 else ""
    return (
        f"recipe {recipe.name} ({why}): steps of {c.train.batch_size} x {c.corpus.sequence_length} = {tokens} tokens, "
        f"warm-up {c.train.warmup:.0%}, peak rate {rate}, "
        f"{c.train.precision}{wide}; train.recipe=NAME or single settings change it"
    )
