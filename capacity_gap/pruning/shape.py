"""How large the student is along every axis. Needs no torch: a grid is planned with this.

A shape is found by one rule, `shrink`: among all hidden sizes and head counts, with neurons absorbing what is left so
that the total is exact, take the one that keeps the axes most nearly in proportion. Applied to one teacher this is the
paper's even split of sparsity over the width axes (docs/method.md §3, p' = 1 − √(1 − p) on each); applied to the
elementwise minimum of all larger rungs it gives the common student, which is the same for every teacher.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from capacity_gap.models.axes import architecture, count, dims
from capacity_gap.pruning.methods import LAYER_SCORES, SYMMETRIC
from capacity_gap.settings.errors import ConfigError, ImpossibleCell, choose
from capacity_gap.structure.architecture import NEURONS_PER_HIDDEN, Architecture, Config, Dims

if TYPE_CHECKING:
    from capacity_gap.pruning.scores import Scores

# 2 % of a pico student's parameters are worth 0.006 nats (docs/method.md §6), so 0.5 % about 0.0015.
TOLERANCE = 0.005  # how far a student's size may be from the requested one
POLICIES = ("local", "global", "fixed")
FIXED_TOLERANCE = 0.03  # of a shape that the user names against the scale that the user names


@dataclass(frozen=True)
class Shape:
    """The sizes of a student and its parameters. `heads` are query heads; a unit is a key-value head.

    An untied student can be cut from a tied teacher: both its matrices then start as the teacher's one.

    Under global priority layers differ: `layer_heads` and `layer_neurons` are the units of each of the teacher's layers
    (of an encoder–decoder each row, `models/axes.py`) that stay, 0 where the layer goes, and `kv_heads` and `neurons`
    what a layer has on average. Heads that are tied, to the hidden size or over layers, are as many in every layer.
    `layers` are those of one stack.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    layers: int
    params: int
    vocab: int | None = None  # rows of the embedding; None: as the teacher
    tied: bool | None = None  # whether the output matrix is the embedding; None: as the teacher's
    experts: int | None = None  # of each layer; None: as the teacher
    layer_heads: tuple[int, ...] | None = None
    layer_neurons: tuple[int, ...] | None = None

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads


def choose_shape(
    config: Config,
    target_params: int,
    policy: str = "local",
    *,
    scores: "Scores | None" = None,
    layers: str = "symmetric",
    depth: int | None = None,
    experts: int | None = None,
    multiple: int = 8,
    fixed: str | None = None,
) -> Shape:
    """The shape of `target_params` parameters for one teacher, its own proportions kept (docs/method.md §3).

    Args:
        config: the teacher's config.
        target_params: total parameters wanted; met within 0.5 %.
        policy: `local`: the same number of heads and neurons in every layer; `global`: the same totals, spread over the
            layers as the layer-normalised `scores` say; `fixed`: as named by `fixed`.
        scores: the teacher's, for `global`.
        layers: how layers are chosen where some go: `symmetric`, or by a score; `global` needs to know which stay.
        depth: layers of the student; the teacher's by default.
        experts: of each layer of the student; the teacher's by default.
        multiple: sizes are multiples of this; 1 at pico size.
        fixed: `layers x hidden x heads x neurons`, such as `24x3072x24x8192`.

    Raises:
        ConfigError: an unknown policy, or no legal shape of this size; the message names the nearest ones.
    """
    choose("policy", policy, POLICIES)
    choose("layers", layers, (SYMMETRIC, *LAYER_SCORES))
    if policy == "fixed":
        return fixed_shape(config, fixed or "", target_params, experts=experts)
    table, sizes = architecture(config), with_experts(dims(config), experts)
    check_room(table, sizes, target_params, experts)
    shape = shrink(table, sizes, target_params, multiple=multiple, depth=depth)
    return shape if policy == "local" else spread(shape, config, scores, layers=layers, multiple=multiple)


def with_experts(sizes: Dims, experts: int | None) -> Dims:
    """The same sizes with another number of experts, if one is given.

    Raises:
        ConfigError: there are not so many, or fewer than a token goes through.
    """
    if experts is None:
        return sizes
    if not sizes.experts:
        raise ConfigError(
            f"prune.experts={experts}: this teacher is not a mixture of experts. Leave out prune.experts."
        )
    if not sizes.active <= experts <= sizes.experts:
        raise ConfigError(
            f"prune.experts={experts}: the teacher has {sizes.experts} experts in each layer, and routes each token "
            f"to {sizes.active} of them. Set a number from {sizes.active} to {sizes.experts}."
        )
    return replace(sizes, experts=experts)


def check_room(table: Architecture, sizes: Dims, target: int, experts: int | None) -> None:
    """Raises `ConfigError` where a model with so few experts is smaller than the student."""
    if experts and (most := count(table, sizes)) < target * (1 - TOLERANCE):
        raise ConfigError(
            f"prune.experts={experts} leaves at most {most:,} parameters, but the student needs "
            f"{target:,}. Keep more experts, or use a smaller student."
        )


def fixed_shape(config: Config, given: str, target_params: int | None = None, *, experts: int | None = None) -> Shape:
    """The shape that `given` names, `layers x hidden x heads x neurons`, optionally `x key-value heads`.

    Without them the teacher's groups of query heads stay, where the heads divide into such groups. In a mixture
    `neurons` are those of one expert.

    Raises:
        ConfigError: it cannot be read, is not legal for the architecture, or has another size than `target_params`.
    """
    sizes, table = with_experts(dims(config), experts), architecture(config)
    numbers = [int(n) for n in re.findall(r"\d+", given)]
    if not re.fullmatch(r"\s*\d+(\s*[x×]\s*\d+){3,4}\s*", given):
        raise ConfigError(f"fixed={given!r} cannot be read. Write layers x hidden x heads x neurons: 24x3072x24x8192.")
    layers, hidden, heads, neurons = numbers[:4]
    kept = 1 if sizes.group == 1 or heads % sizes.group else sizes.group
    kv_heads = numbers[4] if len(numbers) > 4 else heads // kept
    if kv_heads == 0 or heads % kv_heads:
        raise ConfigError(f"fixed={given}: {heads} query heads do not divide among {kv_heads} key-value heads.")
    group = heads // kv_heads
    if table.square and hidden != heads * sizes.head_dim:
        raise ConfigError(
            f"fixed={given}: this architecture ties hidden = heads × {sizes.head_dim}, but {hidden} ≠ {heads} × "
            f"{sizes.head_dim}. Use hidden {heads * sizes.head_dim}, or {hidden // sizes.head_dim} heads."
        )
    if neurons != (tied := table.neurons_of(hidden, neurons)):
        raise ConfigError(
            f"fixed={given}: this architecture has {NEURONS_PER_HIDDEN} neurons for each hidden unit. "
            f"Use {tied} neurons."
        )
    if hidden % heads:
        raise ConfigError(f"fixed={given}: transformers needs a hidden size divisible by the number of heads.")
    found = sizes.with_units(hidden=hidden, kv_heads=kv_heads, neurons=neurons, layers=layers, group=group)
    params = count(table, found)
    if target_params and abs(params / target_params - 1) > FIXED_TOLERANCE:
        raise ConfigError(
            f"fixed={given} has {params:,} parameters, but the student should have {target_params:,}. "
            f"Set student={params}, or another shape."
        )
    return _shape(table, found)


def spread(shape: Shape, config: Config, scores: "Scores | None", *, layers: str, multiple: int) -> Shape:
    """The units of a local shape, spread over the layers by *global priority* (docs/method.md §3): ranked across
    all layers by their layer-normalised scores, so that layers end up with different counts. Parameters stay the same.
    """
    if scores is None:
        raise ConfigError("policy=global ranks units across layers, so it needs scores.")
    from capacity_gap.pruning.kept_layers import kept_experts, kept_layers, kept_rows

    table, full = architecture(config), dims(config)
    stay = kept_layers(scores, config, shape.layers, layers)
    experts = kept_experts(scores, full, shape.experts) if full.experts else None

    def spread_over(axis: str, found: Any, mean: int, step: int) -> tuple[int, ...]:
        rows = kept_rows(table, axis, full, stay, experts)
        counts = dict(zip(rows, _counts(found[rows], mean, step), strict=True))
        return tuple(counts.get(row, 0) for row in range(table.rows(axis, full)))

    local = table.square or table.one_set
    heads, neurons = (
        (n,) * table.rows(axis, full) for axis, n in (("heads", shape.kv_heads), ("neurons", shape.neurons))
    )
    return replace(
        shape,
        layer_heads=heads if local else spread_over("heads", scores.heads, shape.kv_heads, 1),
        layer_neurons=spread_over("neurons", scores.neurons, shape.neurons, multiple)
        if "neurons" in table.keys
        else neurons,
    )


def _counts(scores: Any, mean: int, multiple: int) -> list[int]:
    """Units per layer, `mean` of them on average, in multiples and at least one multiple each: the top of one ranking.

    Scores [L, U] are taken in blocks of `multiple`, the best of a layer first; each block counts by its mean score.
    """
    layers, units = scores.shape
    ordered = scores.sort(dim=-1, descending=True).values[:, : units // multiple * multiple]
    blocks = ordered.reshape(layers, -1, multiple).mean(-1)
    # The first block of each layer is given, so that none is left without neurons or heads.
    counts = [1] * layers
    ranked = sorted(((float(blocks[i, j]), i) for i in range(layers) for j in range(1, blocks.shape[1])), reverse=True)
    for _, layer in ranked[: layers * (mean // multiple) - layers]:
        counts[layer] += 1
    return [c * multiple for c in counts]


def shrink(table: Architecture, full: Dims, target: int, *, multiple: int, depth: int | None = None) -> Shape:
    """The shape of `target` parameters inside `full` whose hidden, heads and neurons are most nearly in proportion."""
    if table.literal:
        raise ConfigError(
            f"students cannot be cut from such teachers: {table.uncut}. Use a separate model as the student: "
            "student=ORG/NAME or student=FOLDER."
        )
    layers = depth or full.layers
    if not 1 <= layers <= full.layers:
        raise ConfigError(f"depth={layers} is not between 1 and the teacher's {full.layers} layers.")
    if layers == full.layers and abs(count(table, full) / target - 1) <= TOLERANCE:
        return _shape(table, full)
    found = list(_candidates(table, full, target, layers, multiple))
    if not found and count(table, full) < target:
        # A teacher smaller than its student is a cell that a grid skips, not an error of its settings.
        raise ImpossibleCell(_no_shape(table, full, target, layers, multiple))
    if not found:
        raise ConfigError(_no_shape(table, full, target, layers, multiple))
    return _shape(table, min(found, key=lambda s: (_distortion(s, full), s.hidden)))


def _candidates(table: Architecture, full: Dims, target: int, layers: int, multiple: int) -> Iterator[Dims]:
    for hidden in range(multiple, full.hidden + 1, multiple):
        for kv_heads, group in _head_counts(table, hidden, full):
            bare = full.with_units(hidden=hidden, kv_heads=kv_heads, neurons=0, layers=layers, group=group)
            # Parameters are linear in the neurons, so the cost of one gives their number by a division.
            each = count(table, replace(bare, neurons=1))
            each -= count(table, bare)
            neurons = table.neurons_of(hidden, multiple * round((target - count(table, bare)) / each / multiple))
            if multiple <= neurons <= full.neurons:
                sizes = replace(bare, neurons=neurons)
                if abs(count(table, sizes) / target - 1) <= TOLERANCE:
                    yield sizes


def _head_counts(table: Architecture, hidden: int, full: Dims) -> list[tuple[int, int]]:
    """Legal numbers of key-value heads, each with its query heads: the heads must divide hidden sizes.

    Where hidden = heads × head_dim, only that number will do; with one key-value head for all it is that of queries.
    """
    counts = range(table.head_step, full.kv_heads + 1, table.head_step)
    if table.square and table.kv_heads == 1:
        return [(1, g) for g in range(1, full.group + 1) if hidden == g * full.head_dim]
    if table.square:
        return [(k, full.group) for k in counts if hidden == k * full.group * full.head_dim]
    return [(k, full.group) for k in counts if hidden % (k * full.group) == 0]


def _distortion(sizes: Dims, full: Dims) -> float:
    """Spread of the log shares that are kept on the three width axes: 0 when all keep the same share."""
    shares = [math.log(getattr(sizes, a) / getattr(full, a)) for a in ("hidden", "kv_heads", "neurons")]
    mean = sum(shares) / 3
    return sum((s - mean) ** 2 for s in shares)


def _shape(table: Architecture, sizes: Dims) -> Shape:
    return Shape(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.neurons,
        sizes.layers,
        count(table, sizes),
        sizes.vocab,
        sizes.tied,
        sizes.experts or None,
    )


def _no_shape(table: Architecture, full: Dims, target: int, layers: int, multiple: int) -> str:
    """Names the legal sizes nearest to the one that cannot be."""
    sizes = sorted(
        count(table, full.with_units(hidden=h, kv_heads=k, neurons=n, layers=layers, group=g))
        for h in range(multiple, full.hidden + 1, multiple)
        for k, g in _head_counts(table, h, full)
        for n in {table.neurons_of(h, n) for n in (multiple, max(multiple, full.neurons // multiple * multiple))}
    )
    below, above = [s for s in sizes if s < target], [s for s in sizes if s > target]
    near = [f"{s:,}" for s in (*below[-1:], *above[:1])]
    return (
        f"no student of {target:,} parameters can be cut from {full.layers} layers of hidden {full.hidden}, "
        f"{full.kv_heads} key-value heads, {full.neurons} neurons ({count(table, full):,} parameters) keeping {layers} "
        f"layers and multiples of {multiple}. The nearest possible sizes: {' and '.join(near)}."
    )


def unfit(shape: Shape, teacher: Dims) -> list[str]:
    """Why a student of this shape cannot be cut from this teacher; empty if it can."""
    reasons = []
    for axis in ("hidden", "heads", "neurons", "layers", "experts"):
        if (getattr(shape, axis) or 0) > getattr(teacher, axis):
            reasons.append(f"{axis} {getattr(shape, axis)} > {getattr(teacher, axis)}")
    if shape.head_dim != teacher.head_dim:
        reasons.append(f"head_dim {shape.head_dim} of the student ≠ {teacher.head_dim} of the teacher")
    if shape.experts and shape.experts < teacher.active:
        reasons.append(f"{shape.experts} experts, a token of the teacher goes through {teacher.active}")
    if (shape.vocab or 0) > teacher.vocab:
        reasons.append(f"vocabulary of {shape.vocab} rows > {teacher.vocab}")
    if shape.tied and not teacher.tied:
        reasons.append("one matrix for embedding and output, teacher two")
    if shape.group > 1 and (shape.kv_heads > teacher.kv_heads or shape.group > teacher.group):
        groups = f"{shape.kv_heads} key-value heads with {shape.group} queries each"
        reasons.append(f"{groups}, teacher {teacher.kv_heads} with {teacher.group}")
    return reasons


def shape_of(config: Config) -> Shape:
    """The shape of a model that is there."""
    return _shape(architecture(config), dims(config))


def sized(teacher: Dims, shape: Shape) -> Dims:
    """The teacher's dims with a student's sizes."""
    cut = teacher.with_units(
        hidden=shape.hidden,
        kv_heads=shape.kv_heads,
        neurons=shape.neurons,
        layers=shape.layers,
        group=shape.group,
        experts=shape.experts,
    )
    return with_rows(cut, shape)


def with_rows(sizes: Dims, shape: Shape) -> Dims:
    """`sizes` with the embedding of `shape`: its rows, and whether the output matrix is the same."""
    vocab, tied = (getattr(sizes if getattr(shape, a) is None else shape, a) for a in ("vocab", "tied"))
    return replace(sizes, vocab=vocab, tied=tied)


def between(teacher: Dims, final: Shape, share: float, table: Architecture) -> Shape:
    """A legal shape on the way from a teacher to a student: each axis `share` of the way, in logarithms.

    Pruning in steps (`prune.iterative`) goes through these. Every axis lies between the two, so the rest of the way
    stays open.
    """

    def part(axis: str) -> int:
        ends = getattr(teacher, axis), getattr(final, axis)
        return round(math.exp((1 - share) * math.log(ends[0]) + share * math.log(ends[1])))

    group = final.group
    kv_heads = part("kv_heads") if final.group == teacher.group else final.kv_heads
    hidden = part("hidden")
    legal = [
        (h, k)
        for k in range(min(kv_heads, final.kv_heads), max(kv_heads, final.kv_heads) + 1)
        for h in range(final.hidden, teacher.hidden + 1)
        if (h == k * group * final.head_dim if table.square else h % (k * group) == 0)
    ]
    hidden, kv_heads = min(legal, key=lambda c: (abs(math.log(c[0] / hidden)) + abs(math.log(c[1] / kv_heads)), c))
    middle = teacher.with_units(
        hidden=hidden,
        kv_heads=kv_heads,
        neurons=table.neurons_of(hidden, part("neurons")),
        layers=part("layers"),
        group=group,
        experts=part("experts") if final.experts else None,
    )
    return _shape(table, middle)
