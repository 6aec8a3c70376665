"""What an architecture does with its parameters, seen on a small model with random numbers that runs once.

It shows which modules add to the residual stream, which read it between two additions, whether embeddings are
multiplied by √hidden, and what the last norm adds to its weight. Needs torch.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure.architecture import Architecture, Stack, Sublayer
from capacity_gap.structure.head import from_hidden
from capacity_gap.structure.type_facts import ATTENTION_OUTPUT

CLOSE = 1e-4  # of a sum in fp32 that should be exact
FEWEST_TOKENS = 100  # rows of the smallest vocabulary that is probed


class Underivable(ConfigError):
    """The structure is not one that can be cut along the known axes."""


def from_config(config: Mapping[str, Any]) -> Any:
    """The decoder of a config.json, in evaluation mode, with weights as its class draws them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(config)
    made = AutoConfig.for_model(given.pop("model_type"), **given)
    return AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()


def randomised(config: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of this config.json whose every parameter is random, norms and biases too: nothing cancels by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = from_config(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_sites(table: Architecture, probe: Mapping[str, Any]) -> Architecture:
    """The table with the places where the masks of docs/method.md §2 act, seen on a small model that runs."""
    layer = table.stacks[0].layer
    outs = {axis: _only_map(table, layer, axis) for axis in ("heads", "neurons")}
    model = randomised(probe)
    tokens = torch.randint(3, FEWEST_TOKENS, (2, 9), generator=torch.Generator().manual_seed(1))
    with _Watching(model, layer.replace("{i}", "1")) as seen, torch.no_grad():
        model(tokens, use_cache=False)
    attention, mlp, share = _sums(seen, outs)
    middle = seen.before + share * seen.after[attention]
    readers = [n for n, x in seen.inputs.items() if n and _close(x, middle)]
    stack = Stack(layer, (Sublayer(attention, outs["heads"]),), Sublayer(mlp, outs["neurons"]), tuple(readers[:1]))
    norm = _final_norm(model, tokens)
    return replace(
        table,
        stacks=(stack,),
        root_scaled=_root_scaled(model, layer),
        final_norm=norm,
        norm_offset=_offset(model.get_submodule(norm)) if norm else 0.0,
    )


def _final_norm(model: Any, tokens: Tensor) -> str:
    """The module whose output the output matrix reads, if it is a norm."""
    given: dict[str, Tensor] = {}
    output = model.get_output_embeddings()
    hooks = [output.register_forward_pre_hook(lambda _m, inputs: given.update(read=inputs[0].detach().clone()))]
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__:
            keep = lambda _m, _i, found, name=name: given.update({name: found.detach().clone()})  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return next((n for n in reversed(given) if n != "read" and _close(given[n], given["read"])), "")


def _offset(norm: Any) -> float:
    """What a norm adds to its weight before it multiplies: 1 in Gemma's, else 0."""
    if getattr(norm, "weight", None) is None:
        return 0.0
    width = len(norm.weight)
    x = torch.linspace(-1, 2, width)[None, None]
    with torch.no_grad():
        weight, bias = norm.weight.clone(), getattr(norm, "bias", None)
        shift = 0.0 if bias is None else bias
        norm.weight.zero_()
        zero = norm(x) - shift
        norm.weight.fill_(1.0)
        one = norm(x) - shift
        norm.weight.copy_(weight)
    step = (one - zero).flatten()
    return round(float(zero.flatten() @ step / (step @ step)), 3)


def _only_map(table: Architecture, layer: str, axis: str) -> str:
    """The linear map of a layer that takes units of `axis` and gives hidden dimensions."""
    found = [
        name.removeprefix(layer + ".").removesuffix(".weight")
        for name, axes in table.parameters.items()
        if sorted(axes) == sorted(("hidden", axis)) and name.startswith(layer)
    ]
    gives = [
        n for n in found if re.search(ATTENTION_OUTPUT if axis == "heads" else r"(down|fc2|c_proj|4h_to_h|out)", n)
    ]
    if len(gives) != 1:
        raise Underivable(f"which map of a layer takes {axis} cannot be told: {', '.join(found) or 'none does'}.")
    return gives[0]


class _Seen:
    """What one layer read and gave, and each of its modules: tensors [B, T, D]."""

    def __init__(self) -> None:
        self.before = self.behind = torch.empty(0)
        self.inputs: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}


class _Watching:
    """Notes what a layer and its modules read and give, the first time that each runs."""

    def __init__(self, model: Any, layer: str) -> None:
        self.layer = model.get_submodule(layer)
        self.hooks: list[Any] = []
        self.seen = _Seen()

    def __enter__(self) -> _Seen:
        seen = self.seen
        for name, module in self.layer.named_modules():

            def before(_module: Any, inputs: tuple, named: dict, name: str = name) -> None:
                given = inputs[0] if inputs else named.get("hidden_states")
                if isinstance(given, Tensor) and name not in seen.inputs:
                    seen.inputs[name] = given.detach().clone()

            def after(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
                found = output[0] if isinstance(output, tuple) else output
                if isinstance(found, Tensor) and name not in seen.after:
                    seen.after[name] = found.detach().clone()

            self.hooks += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
        return seen

    def __exit__(self, *_error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        seen = self.seen
        seen.before, seen.behind = seen.inputs[""], seen.after[""]
        shape = seen.before.shape
        for tensors in (seen.inputs, seen.after):
            kept = {n: x.reshape(shape) for n, x in tensors.items() if x.numel() == seen.before.numel() and n}
            tensors.clear()
            tensors.update(kept)


def _close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).norm() <= CLOSE * y.norm())


def _sums(seen: _Seen, outs: Mapping[str, str]) -> tuple[str, str, float]:
    """The modules whose outputs make a layer's output of its input, and what the first one's is multiplied by."""
    change = (seen.behind - seen.before).flatten()

    def ranked(out: str) -> Iterator[str]:
        # The outermost module around the map, else a norm after it.
        names = list(seen.after)
        around = [n for n in names if out == n or out.startswith(n + ".")]
        yield from sorted(around, key=lambda n: n.count("."))
        yield from (n for n in names if n not in around)

    for attention in ranked(outs["heads"]):
        for mlp in ranked(outs["neurons"]):
            pair = torch.stack([seen.after[n].flatten() for n in (attention, mlp)], 1)
            shares = torch.linalg.lstsq(pair.double(), change.double()).solution
            if attention != mlp and _close((pair.double() @ shares).float(), change):
                return attention, mlp, float(shares[0])
    raise Underivable("no two modules of a layer add to the residual stream, and nothing else does.")


def _root_scaled(model: Any, layer: str) -> bool:
    """Whether embeddings are multiplied by √hidden, which changes with the width."""
    embedding, hidden = model.get_input_embeddings().weight.detach(), model.config.hidden_size
    tokens = torch.tensor([[5], [7]])
    with _Watching(model, layer.replace("{i}", "0")) as seen, torch.no_grad():
        model(tokens, use_cache=False)
    one, two = seen.before[:, 0]
    difference = embedding[5] - embedding[7]
    if one.shape != difference.shape:
        return False
    factor = float((one - two) @ difference / (difference @ difference))
    return abs(factor / sqrt(hidden) - 1) < 1e-3 and _close(one - two, factor * difference)


def disagreement(probe: Mapping[str, Any]) -> str:
    """Why a small model's logits are not its last hidden states times its output matrix, of earlier tokens alone."""
    model = randomised(probe)
    tokens = torch.randint(3, FEWEST_TOKENS, (2, 9), generator=torch.Generator().manual_seed(1))
    changed = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % FEWEST_TOKENS], 1)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        other = model(changed, use_cache=False).logits
        if not _close(other[:, :-1], logits[:, :-1]):
            return "a token changes what is said of those before it: it is no causal model"
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        output = model.get_output_embeddings()
        found = from_hidden(model.config, hidden, output.weight, getattr(output, "bias", None))
    return "" if _close(found, logits) else "its logits are not its last hidden states times its output matrix"
