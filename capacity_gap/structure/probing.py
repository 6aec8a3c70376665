"""What an architecture does with its parameters, seen on a small model with random numbers that runs once.

It shows which modules add to the residual stream, which read it between two additions, whether embeddings are
multiplied by √hidden, and what the last norm adds to its weight. Needs torch.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
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
    return one_by_one(AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval())


def one_by_one(model: Any) -> Any:
    """The model with its experts, if any, run one after another, in any precision: fused kernels take no fp64."""
    if model.get_experts_implementation()[""] is not None:
        model.set_experts_implementation("eager")
    return model


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


def names_in_files(table: Architecture, probe: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What files call the parameters of layers, where that is not what the model calls them.

    A small model is saved as transformers saves any, and its tensors are found again by their numbers. Those of all
    experts may lie in a tensor for each expert, or in several: gates and inputs.

    Returns:
        Of each such parameter the names of its tensors, `{i}` for the layer and `{e}` for the expert.
    """
    from safetensors.torch import load_file

    model = randomised(probe)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
    found = {}
    for pattern, axes in table.parameters.items():
        name = pattern.replace("{i}", "1")
        if "{i}" not in pattern or (name in stored and axes[0] != "experts"):
            continue
        parameter = model.get_parameter(name).detach()
        if name not in stored:
            found[pattern] = _same_numbers(parameter, stored, pattern, by_expert=axes[0] == "experts" and len(axes) > 2)
    return found


def _same_numbers(parameter: Tensor, stored: Mapping[str, Tensor], name: str, *, by_expert: bool) -> tuple[str, ...]:
    """The names of the tensors that hold a parameter of layer 1, one after another; of experts those of expert 2."""
    if whole := [n for n, tensor in stored.items() if torch.equal(tensor, parameter)]:
        return (whole[0].replace(".1.", ".{i}.", 1),)
    names, rest = [], parameter[2] if by_expert else parameter[:0]
    while len(rest):
        part = next((n for n, t in stored.items() if t.ndim == 2 and torch.equal(t, rest[: len(t)])), None)
        if part is None or ".2." not in part:
            break
        names.append(re.sub(r"\.2\.", ".{e}.", part.replace(".1.", ".{i}.", 1)))
        rest = rest[len(stored[part]) :]
    if len(rest) or not names:
        raise Underivable(f"the names of {name} in files cannot be determined")
    return tuple(names)


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
        if sorted(set(axes) - {"experts"}) == sorted(("hidden", axis)) and name.startswith(layer)
    ]
    gives = [
        n for n in found if re.search(ATTENTION_OUTPUT if axis == "heads" else r"(down|fc2|c_proj|4h_to_h|out)", n)
    ]
    if len(gives) != 1:
        raise Underivable(
            f"the linear map of a layer that takes {axis} cannot be determined: {', '.join(found) or 'none does'}."
        )
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

    def ranked(out: str) -> Iterator[str]:
        # The outermost module around the map, else a norm after it.
        names = list(seen.after)
        around = [n for n in names if out == n or out.startswith(n + ".")]
        yield from sorted(around, key=lambda n: n.count("."))
        yield from (n for n in names if n not in around)

    for attention in ranked(outs["heads"]):
        for mlp in ranked(outs["neurons"]):
            shares = None if attention == mlp else _shares(seen, (attention, mlp))
            if shares is not None:
                return attention, mlp, shares[0]
    raise Underivable("no two modules of a layer add to the residual stream, and nothing else does.")


def sites_apart(table: Architecture, model: Any, tokens: Tensor) -> str:
    """Why the places where masks on the residual stream act are not those of the table; empty if they are.

    In each layer what the two sublayers give, times a factor each, must make the layer's output of its input; and what
    is read between the two must be the input and the first of them.
    """
    (stack,) = table.stacks
    for i in range(len(model.get_submodule(stack.layer.removesuffix(".{i}")))):
        with _Watching(model, stack.layer.replace("{i}", str(i))) as seen, torch.no_grad():
            model(tokens, use_cache=False)
        names = [*(sublayer.module for sublayer in stack.attentions), stack.mlp.module]
        if lacking := [n for n in (*names, *stack.stream) if n not in seen.after and n not in seen.inputs]:
            return f"layer {i} has no {lacking[0]} that reads or gives the stream"
        shares = _shares(seen, names)
        if shares is None:
            return f"{' and '.join(names)} do not make layer {i}'s output of its input"
        middle = seen.before + shares[0] * seen.after[names[0]]
        if wrong := [n for n in stack.stream if not _close(seen.inputs[n], middle)]:
            return f"{wrong[0]} of layer {i} does not read the stream between its sublayers"
        if not stack.stream and (found := [n for n, x in seen.inputs.items() if _close(x, middle)]):
            return f"{found[0]} of layer {i} reads the stream between its sublayers, and the table does not say so"
    return ""


def _shares(seen: _Seen, names: Sequence[str]) -> list[float] | None:
    """What each of some modules' outputs is multiplied by where they add up to what a layer changes."""
    change = (seen.behind - seen.before).flatten()
    given = torch.stack([seen.after[n].flatten() for n in names], 1).double()
    shares = torch.linalg.lstsq(given, change.double()).solution
    return shares.tolist() if _close((given @ shares).float(), change.float()) else None


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
            return "a token affects the predictions before it: the model is not causal"
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        output = model.get_output_embeddings()
        found = from_hidden(model.config, hidden, output.weight, getattr(output, "bias", None))
    return "" if _close(found, logits) else "its logits are not its last hidden states times its output matrix"
