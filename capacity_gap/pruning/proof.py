"""Whether an axis table is right: a small model of the same structure is cut, and computes what it should.

A table says which axis each dimension of each parameter is. That claim is tested on the model itself, along each axis
alone: the dense model in which whatever goes is zero gives the same logits as the model cut out of it. Norms of the
dense model take their statistics over what stays, since an absent unit has no part in a mean.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from capacity_gap.distill.losses import cap
from capacity_gap.models.axes import architecture, check_head, count_params, cuttable, dims, is_written, pattern_of
from capacity_gap.models.loading import hidden_states, output_weight
from capacity_gap.pruning.kept_units import UNITS, Kept, by_expert, choose_units
from capacity_gap.pruning.methods import random_scores
from capacity_gap.pruning.shape import Shape, shape_of
from capacity_gap.pruning.surgery import prune, selected
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure import derived
from capacity_gap.structure.architecture import Architecture, Config, Dims, place
from capacity_gap.structure.derive import probe_of
from capacity_gap.structure.head import logit_cap
from capacity_gap.structure.probing import from_config, one_by_one, randomised, sites_apart

CLOSE = 1e-5  # relative to the largest logit
SEED = 0


@dataclass(frozen=True)
class Check:
    """One thing that was tried: what, whether it held, and by how much it failed or why."""

    name: str
    held: bool
    said: str = ""


def prove(config: Mapping[str, Any]) -> list[Check]:
    """Tries every claim of the table of `config`, on a small model of its type and flags; downloads nothing.

    Args:
        config: the content of a config.json.

    Returns:
        `count`: the parameters of `config` itself are as many as transformers makes. `hidden`, `heads`, `neurons`,
        `layers`, and of mixtures `experts`: cut = masked. `sites`: what the table says adds to the residual stream
        does, and nothing else. `permuted`: the order of units does not matter. `head`: hidden states times the output
        matrix are the logits. `reload`: plain transformers gives the same logits. `generation`: with a cache and
        without it gives the same tokens.

    Raises:
        ConfigError: there is no table, or models of this kind cannot be cut.
    """
    cuttable(config)
    checks = [_tried("count", lambda: _count(config))]
    small = probe_of(config)
    model = randomised(small, seed=SEED).double()
    tokens = torch.randint(3, dims(small).vocab, (3, 11), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        before = _logits(model, tokens)
        for axis, shape in shapes(small).items():
            checks.append(_tried(axis, partial(_cut, model, small, shape, tokens, before)))
        checks.append(_tried("sites", lambda: sites_apart(architecture(small), model, tokens)))
        checks.append(_tried("permuted", lambda: _permuted(model, small, tokens, before)))
        checks.append(_tried("head", lambda: _head(model, tokens, before)))
        checks.append(_tried("reload", lambda: _reload(_student(model, small), tokens)))
        checks.append(_tried("generation", lambda: _generation(_student(model, small), tokens)))
    return checks


def _head(model: Any, tokens: Tensor, before: Tensor) -> str:
    check_head(model.config)
    logits = hidden_states(model, tokens) @ output_weight(model).T
    cap(logits, logit_cap(model.config))
    return _apart(logits, before)


def _student(model: Any, config: Mapping[str, Any]) -> Any:
    """A student that is cut along every axis."""
    return prune(model, random_scores(model, (), seed=SEED), smallest(config))


def check_proved(config: Mapping[str, Any]) -> None:
    """Proves a table that was derived on this machine, before anything is scored or cut by it.

    Those that the package holds, written or derived, are proved by its tests.

    Raises:
        ConfigError: something does not hold; the message says what.
    """
    if not is_written(config) and not derived.is_committed(config):
        _check_proved(json.dumps(dict(config), default=str))


@lru_cache(maxsize=64)
def _check_proved(config: str) -> None:
    given = json.loads(config)
    if failed := [f"{one.name} ({one.said})" for one in prove(given) if not one.held]:
        raise ConfigError(
            f"models like this {given['model_type']} cannot be scored or cut: its derived axis table fails the checks "
            f"{', '.join(failed)}. Use a separate model as the student: student=ORG/NAME."
        )


def _tried(name: str, run: Callable[[], str]) -> Check:
    try:
        said = run()
    except Exception as error:  # whatever a class raises over a model that is cut wrongly
        first = str(error).splitlines()[0] if str(error) else ""
        return Check(name, False, f"{type(error).__name__}: {first}"[:200])
    return Check(name, not said, said)


def _count(config: Mapping[str, Any]) -> str:
    with torch.device("meta"):
        found = sum(p.numel() for p in from_config(config).parameters())
    counted = count_params(config)
    return "" if found == counted else f"{counted:,} counted, transformers has {found:,}"


def shapes(config: Config) -> dict[str, Shape]:
    """A shape for each axis of a small model that cuts it alone; tied axes go together."""
    own, sizes, table = shape_of(config), dims(config), architecture(config)
    square = table.square
    keys, queries = _fewer_heads(sizes, square)
    heads = {"kv_heads": keys, "heads": queries}
    both = lcm(sizes.heads, queries)  # some classes want a hidden size that the heads divide
    hidden = {"hidden": max(both, sizes.hidden // 2 // both * both)}
    if square:
        heads = hidden = heads | {"hidden": queries * sizes.head_dim}
    cut: dict[str, dict[str, Any]] = {"hidden": hidden, "heads": heads}
    if "neurons" not in table.keys:  # as many for each hidden unit as ever
        hidden |= {"neurons": table.neurons_of(hidden["hidden"], 0)}
        cut |= {"hidden": hidden, "heads": hidden}
    cut |= {"neurons": {"neurons": sizes.neurons // 2 - 3} if "neurons" in table.keys else hidden}
    cut |= {"layers": {"layers": 2}}
    cut |= {"experts": {"experts": (sizes.experts + sizes.active) // 2}} if sizes.experts else {}
    return {axis: replace(own, **sizes) for axis, sizes in cut.items()}


def _fewer_heads(sizes: Dims, square: bool) -> tuple[int, int]:
    """Key-value heads and query heads of a student with fewer of them; fused maps may need a multiple of four."""
    if sizes.kv_heads == 1:
        return 1, sizes.heads // 3 * 2
    fewer = (k for k in range(sizes.kv_heads // 3 * 2, 0, -1) if square or sizes.hidden % (k * sizes.group) == 0)
    keys = next(fewer)
    return keys, keys * sizes.group


def smallest(config: Config) -> Shape:
    """A shape that cuts every axis."""
    one = shapes(config)
    found = (
        one["heads"]
        if architecture(config).square
        else replace(one["hidden"], heads=one["heads"].heads, kv_heads=one["heads"].kv_heads)
    )
    experts = one["experts"].experts if "experts" in one else None
    return replace(found, neurons=one["neurons"].neurons, layers=2, experts=experts)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def _apart(found: Tensor, expected: Tensor) -> str:
    """How far two tensors are from each other, if that is too far."""
    far = float((found - expected).abs().max() / expected.abs().max())
    return "" if far <= CLOSE else f"off by {far:.1e} of the largest logit"


def _cut(model: Any, config: Mapping[str, Any], shape: Shape, tokens: Tensor, before: Tensor) -> str:
    scores = random_scores(model, (), seed=SEED)
    student = prune(model, scores, shape)
    kept = choose_units(scores, shape, config)
    dense = masked(model, student, kept, config)
    with RoutingAmong(kept, dense, config):
        expected = _logits(dense, tokens)
    if not _apart(expected, before):
        return "nothing was cut"
    return _apart(_logits(student, tokens), expected)


def masked(model: Any, student: Any, kept: Kept, config: Mapping[str, Any]) -> Any:
    """A copy of the dense model in which whatever does not stay is zero, with norms over what stays.

    A layer that goes adds nothing: all its parameters are zero.
    """
    table, sizes, found = architecture(config), dims(config), copy.deepcopy(model)
    for name, parameter in found.named_parameters():
        pattern, layer = pattern_of(table, name)
        if "{i}" in pattern and layer not in kept.layers[table.stack_of(pattern)]:
            parameter.zero_()
            continue
        axes = table.parameters[pattern]
        parts = enumerate(parameter) if by_expert(axes) else [(0, parameter)]
        for expert, part in parts:
            for dimension, axis in enumerate(axes[1:] if by_expert(axes) else axes):
                rows = kept.rows(axis, layer, sizes, expert) if place(axis)[0] in UNITS else None
                if rows is not None:
                    gone = torch.ones(part.shape[dimension], dtype=torch.bool).index_fill(0, rows, False)
                    part.movedim(dimension, 0)[gone] = 0
    _norms_of_kept(found, student, table, kept)
    return found


def _norms_of_kept(model: Any, student: Any, table: Architecture, kept: Kept) -> None:
    """Lets every norm of a dense model take its statistics over what is not zero, with its own weights."""
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and not any(True for _ in module.children()):
            _norm_of_kept(module, _partner(student, name, table, kept))


class RoutingAmong(TorchFunctionMode):
    """Lets routers choose among the experts that stay: the logits of the others are as low as can be.

    A weight of zero would not do: its logit is zero, which is larger than many.
    """

    def __init__(self, kept: Kept, model: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        table, sizes = architecture(config), dims(config)
        self.gone: dict[int, Tensor] = {}
        for layer in range(sizes.layers) if table.router else ():
            weight = model.get_parameter(table.router.replace("{i}", str(layer)))
            self.gone[id(weight)] = torch.ones(sizes.experts, dtype=torch.bool).index_fill(
                0, kept.experts[layer], False
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        gone = self.gone.get(id(args[1])) if func is F.linear else None
        return found if gone is None else found.masked_fill(gone, torch.finfo(found.dtype).min)


def _partner(student: Any, name: str, table: Architecture, kept: Kept) -> nn.Module | None:
    """The student's module that a module of the dense model became; None where its layer goes."""
    prefix = table.stacks[0].layer.replace("{i}", "")
    if not name.startswith(prefix):
        return student.get_submodule(name)
    number, _, rest = name.removeprefix(prefix).partition(".")
    if int(number) not in kept.layers[0]:
        return None
    return student.get_submodule(f"{prefix}{kept.layers[0].index(int(number))}.{rest}")


def _norm_of_kept(module: nn.Module, partner: nn.Module | None) -> None:
    """The same for one norm; the student's norm gives its width, none means that its layer is removed."""
    whole, narrow = module.forward, copy.deepcopy(partner)

    def forward(x: Tensor, *others: Any, **named: Any) -> Tensor:
        if narrow is None:
            return torch.zeros_like(x)
        stays = x.flatten(0, -2).abs().sum(0).nonzero().flatten()
        if len(stays) == x.shape[-1]:
            return whole(x, *others, **named)
        for name, parameter in module.named_parameters():
            setattr(narrow, name, nn.Parameter(parameter[stays]))
        return torch.zeros_like(x).index_copy(-1, stays, narrow(x[..., stays]).to(x.dtype))

    module.forward = forward


def _permuted(model: Any, config: Mapping[str, Any], tokens: Tensor, before: Tensor) -> str:
    """Whether the model computes the same with its units in another order."""
    table, sizes, found = architecture(config), dims(config), copy.deepcopy(model)
    order = torch.Generator().manual_seed(SEED + 1)
    # Heads with slopes of their own stay in their places.
    units = torch.arange(sizes.kv_heads)
    groups = [units if table.alibi else torch.randperm(len(units), generator=order) for _ in range(sizes.layers)]
    queries = [(g[:, None] * sizes.group + torch.arange(sizes.group)).flatten() for g in groups]
    rows_of_neurons = table.rows("neurons", sizes)
    neurons = [torch.randperm(sizes.neurons, generator=order) for _ in range(rows_of_neurons)]
    hidden = torch.randperm(sizes.hidden, generator=order)
    experts = [torch.randperm(sizes.experts, generator=order) for _ in range(sizes.layers)]
    kept = Kept(sizes.layers, [list(range(sizes.layers))], hidden, queries, groups, neurons, experts)
    source = dict(found.named_parameters())
    for name, parameter in source.items():
        pattern, layer = pattern_of(table, name)
        parameter.copy_(kept.taken(table.parameters[pattern], layer, sizes, partial(selected, source, name)))
    return _apart(_logits(found, tokens), before)


def _reload(student: Any, tokens: Tensor) -> str:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    one_by_one(loaded)
    return _apart(_logits(loaded, tokens), _logits(student, tokens))


def _generation(student: Any, tokens: Tensor) -> str:
    """Whether greedy generation gives the same tokens with a cache and without, and as many as requested."""
    ends = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 1, "eos_token_id": None}
    fast, slow = (student.generate(tokens[:, :5], use_cache=cached, **ends) for cached in (True, False))
    return (
        "" if fast.shape[1] == 9 and torch.equal(fast, slow) else "generates different tokens with and without a cache"
    )
