"""One small model of every architecture with an axis table, in double precision, and masks as in docs/method.md §2."""

import contextlib
from types import MethodType

import torch
from torch.nn import functional as F

from capacity_gap.models.axes import architecture, dims
from capacity_gap.models.building import attention_of, auto_class
from capacity_gap.pruning.hooks import layers_of
from capacity_gap.structure.probing import one_by_one

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
NEOX = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")} | {"rotary_pct": 0.5}
OPT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "ffn_dim": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "word_embed_proj_dim": 16,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_inner": 12, "n_layer": 3, "n_head": 4, "n_positions": 64}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 12,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 1,
}
GATED = {"feed_forward_proj": "gated-gelu"}
SMALL = {
    "llama": ("llama", LLAMA),
    "llama with biases": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "gpt2": ("gpt2", {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox in sequence": ("gpt_neox", {**NEOX, "use_parallel_residual": False}),
    "opt": ("opt", OPT),
    "opt with norms after": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 10}),
    "t5": ("t5", T5),
    "t5 gated": ("t5", {**T5, **GATED}),
    "t5 gated, unscaled": ("t5", {**T5, **GATED, "scale_decoder_outputs": False}),
}
DERIVED = {  # of which no table is written: norms after sublayers, scaled embeddings, layers of several kinds
    "olmo2": ("olmo2", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "gemma3": ("gemma3_text", {**LLAMA, "sliding_window": 4, "sliding_window_pattern": 3, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bloom": ("bloom", {"vocab_size": 40, "hidden_size": 24, "n_layer": 3, "n_head": 4}),
    "mpt": ("mpt", {"vocab_size": 40, "d_model": 24, "n_layers": 3, "n_heads": 4, "max_seq_len": 32}),
}
EVERY = SMALL | DERIVED
UNCUT = {  # what can be counted and taught by, but not cut yet
    "qwen2_moe": ("qwen2_moe", {**LLAMA, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "falcon": ("falcon", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}),
}
TOKENS = torch.randint(3, 40, (3, 4, 10), generator=torch.Generator().manual_seed(1))


def small_model(name="llama", **changes):
    """A model whose every parameter is random, norms and biases too, so that nothing cancels by chance."""
    from transformers import AutoConfig

    kind, settings = (EVERY | UNCUT)[name]
    config = AutoConfig.for_model(kind, **{**settings, "pad_token_id": 1, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class(config).from_config(config, attn_implementation=attention_of(config)).double().eval()
        model = one_by_one(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    if name in SMALL:
        exact_norms(model)
    return model


def exact_norms(model, kept=None):
    """Norms in double precision (transformers computes some in fp32), over the kept hidden units only if asked."""
    hidden = dims(model.config).hidden
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("Norm"):
            of = kept if kept is not None and module.weight.shape[0] == hidden and "_norm." not in name[-8:] else None
            forward = _rms if hasattr(module, "variance_epsilon") else _layer_norm
            module.forward = MethodType(_of_kept(forward, of), module)  # a method, so that copies norm by their own


def _of_kept(forward, kept):
    if kept is None:
        return lambda module, x: forward(x, x, module)
    # A layer norm gives even a removed unit something: its mean and bias. What is not there gives nothing.
    return lambda module, x: forward(x, x[..., kept], module) * torch.zeros_like(module.weight).index_fill(0, kept, 1.0)


def _rms(x, over, module):
    return module.weight * x * torch.rsqrt(over.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def _layer_norm(x, over, module):
    mean = over.mean(-1, keepdim=True)
    variance = (over - mean).pow(2).mean(-1, keepdim=True)
    return module.weight * (x - mean) * torch.rsqrt(variance + module.eps) + module.bias


@contextlib.contextmanager
def masked(model, queries=None, neurons=None, hidden=None):
    """Multiplies by masks (docs/method.md §2): `queries` [R, H], `neurons` [R, F], `hidden` [D]; R places.

    Masks [R, B, 1, H], and so on, are one for each sequence of a batch.
    """
    table, sizes = architecture(model.config), dims(model.config)
    hooks = []

    def times(mask):
        return lambda _m, inputs: (_times(inputs[0], mask), *inputs[1:])

    spread = None if queries is None else queries.repeat_interleave(sizes.head_dim, dim=-1)
    for axis, masks in (("heads", spread), ("neurons", neurons)):
        for row, name in enumerate(table.unit_maps(axis, sizes.layers) if masks is not None else ()):
            module = model.get_submodule(name.removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(times(masks[row])))
    for number, stack in enumerate(table.stacks if hidden is not None else ()):
        layers = layers_of(model, table, sizes)[number * sizes.layers : (number + 1) * sizes.layers]
        hooks += _stream_masks(model, layers, stack, hidden)
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _times(x, mask):
    """`x` times the mask of its last axis; OPT flattens batch and time."""
    return x * mask if mask.ndim == 1 else (x.view(len(mask), -1, x.shape[-1]) * mask).view_as(x)


def _stream_masks(model, layers, stack, hidden):
    def scale(_m, _i, output):
        return (_times(output[0], hidden), *output[1:]) if isinstance(output, tuple) else _times(output, hidden)

    def first(_m, inputs, named):
        if inputs:
            return (_times(inputs[0], hidden), *inputs[1:]), named
        return inputs, {**named, "hidden_states": _times(named["hidden_states"], hidden)}

    hooks = []
    for layer in layers:
        sublayers = [s.module for s in (*stack.attentions, stack.mlp)]
        hooks += [layer.get_submodule(m).register_forward_hook(scale) for m in sublayers]
        hooks += _mid_streams(model, layer, stack.stream, hidden)
        hooks.append(layer.register_forward_hook(scale))
    return [*hooks, layers[0].register_forward_pre_hook(first, with_kwargs=True)]


def _mid_streams(model, layer, readers, hidden):
    """The stream after an addition inside a layer: a norm reads it and, where norms come first, the next sum too.

    T5's readers hold both, norm and sum.
    """
    sums, hooks = [], []

    def scale(_m, inputs):
        sums.append(inputs[0])
        return (_times(inputs[0], hidden), *inputs[1:])

    def scale_the_other_reader(_m, _i, output):
        stream = output[0] if isinstance(output, tuple) else output
        stream = stream + _times(sums.pop(), hidden - 1).view_as(stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    for reader in readers:
        hooks.append(layer.get_submodule(reader).register_forward_pre_hook(scale))
    both = model.config.is_encoder_decoder or not getattr(model.config, "do_layer_norm_before", True)
    if readers and not both:
        hooks.append(layer.register_forward_hook(scale_the_other_reader))
    return hooks


def logits_of(model, tokens):
    """The model's own logits [B, T, V] for tokens [B, T + 1]; T5's for the second half of the labels."""
    if model.config.is_encoder_decoder:
        prefix = (tokens.shape[1] - 1) // 2 + 1
        return model(input_ids=tokens[:, :prefix], labels=tokens[:, prefix:].contiguous()).logits
    return model(tokens[:, :-1]).logits


def losses_of(model, tokens, *, copies):
    """Mean cross-entropy, through the model's own logits, of each of some copies of the same batch."""
    logits = logits_of(model, tokens.repeat(copies, 1))
    labels = tokens[:, -logits.shape[1] :].repeat(copies, 1)
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.view(copies, -1).mean(1)
