"""The axis tables: one function an architecture (`axes.py` defines the axes). Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.registry import Registry
from capacity_gap.structure.architecture import Architecture, Config, Stack, Sublayer, get

# `model_type` of a config.json → the function that gives its axis table.
ARCHITECTURES: Registry[Callable[[Config], Architecture]] = Registry("architecture", setting="model_type")

OPT_OFFSET = 2  # OPT's positions begin at row 2 of their table


def _one_stack(layer: str, attention: Sublayer, mlp: Sublayer, stream: tuple[str, ...]) -> tuple[Stack]:
    return (Stack(layer, (attention,), mlp, stream),)


@ARCHITECTURES.register("llama")
def _llama(config: Config) -> Architecture:
    every = bool(get(config, "attention_bias"))
    return _gated(qkv_bias=every, output_bias=every, mlp_bias=bool(get(config, "mlp_bias")))


def _gated(*, qkv_bias: bool = False, output_bias: bool = False, mlp_bias: bool = False) -> Architecture:
    """Llama and its relatives, which differ in where they have biases."""
    layer = "model.layers.{i}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    parameters: dict[str, tuple[str, ...]] = {
        "model.embed_tokens.weight": ("vocab", "hidden"),
        attention + "q_proj.weight": ("heads", "hidden"),
        attention + "k_proj.weight": ("kv_heads", "hidden"),
        attention + "v_proj.weight": ("kv_heads", "hidden"),
        attention + "o_proj.weight": ("hidden", "heads"),
        mlp + "gate_proj.weight": ("neurons", "hidden"),
        mlp + "up_proj.weight": ("neurons", "hidden"),
        mlp + "down_proj.weight": ("hidden", "neurons"),
        layer + "input_layernorm.weight": ("hidden",),
        layer + "post_attention_layernorm.weight": ("hidden",),
        "model.norm.weight": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    }
    if qkv_bias:
        parameters |= {attention + "q_proj.bias": ("heads",)}
        parameters |= {attention + f"{x}_proj.bias": ("kv_heads",) for x in "kv"}
    if output_bias:
        parameters[attention + "o_proj.bias"] = ("hidden",)
    if mlp_bias:
        parameters |= {mlp + f"{x}_proj.bias": ("neurons",) for x in ("gate", "up")}
        parameters[mlp + "down_proj.bias"] = ("hidden",)
    return Architecture(
        parameters=parameters,
        keys={
            "vocab": "vocab_size",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "neurons": "intermediate_size",
            "layers": "num_hidden_layers",
        },
        output="lm_head.weight",
        stacks=_one_stack(
            "model.layers.{i}",
            Sublayer("self_attn", "self_attn.o_proj"),
            Sublayer("mlp", "mlp.down_proj"),
            ("post_attention_layernorm",),
        ),
        leftovers=("rotary_emb.inv_freq",),
    )


@ARCHITECTURES.register("mistral")
def _mistral(config: Config) -> Architecture:
    """Llama without any bias, regardless of its config."""
    del config
    return _gated()


@ARCHITECTURES.register("qwen2")
def _qwen2(config: Config) -> Architecture:
    """Llama with biases of queries, keys and values, always."""
    del config
    return _gated(qkv_bias=True)


@ARCHITECTURES.register("qwen3")
def _qwen3(config: Config) -> Architecture:
    """Llama with a norm over each query and key head, shared by all heads of a layer."""
    every = bool(get(config, "attention_bias"))
    table = _gated(qkv_bias=every, output_bias=every)
    norms = {f"model.layers.{{i}}.self_attn.{x}_norm.weight": ("head_dim",) for x in "qk"}
    return replace(table, parameters={**table.parameters, **norms})


def _with_biases(parameters: dict[str, tuple[str, ...]], outputs: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Adds a bias over the given axis for each named module, and both halves of its layer norms' parameters."""
    return parameters | {f"{name}.bias": (axis,) for name, axis in outputs.items()}


@ARCHITECTURES.register("gpt2")
def _gpt2(config: Config) -> Architecture:
    if get(config, "add_cross_attention"):
        raise ConfigError(
            "this GPT-2 has cross-attention (add_cross_attention: true): it is the decoder of another model, not a "
            "language model by itself. Use a GPT-2 without it."
        )
    layer = "transformer.h.{i}."
    norms = (layer + "ln_1", layer + "ln_2", "transformer.ln_f")
    parameters: dict[str, tuple[str, ...]] = {
        "transformer.wte.weight": ("vocab", "hidden"),
        "transformer.wpe.weight": ("positions", "hidden"),
        # GPT-2 stores its maps transposed (Conv1D): inputs first.
        layer + "attn.c_attn.weight": ("hidden", "qkv"),
        layer + "attn.c_proj.weight": ("heads", "hidden"),
        layer + "mlp.c_fc.weight": ("hidden", "neurons"),
        layer + "mlp.c_proj.weight": ("neurons", "hidden"),
        "lm_head.weight": ("vocab", "hidden"),
        **{f"{n}.weight": ("hidden",) for n in norms},
    }
    biased = {layer + "attn.c_attn": "qkv", layer + "attn.c_proj": "hidden"}
    biased |= {layer + "mlp.c_fc": "neurons", layer + "mlp.c_proj": "hidden", **dict.fromkeys(norms, "hidden")}
    keys = {"vocab": "vocab_size", "hidden": "n_embd", "heads": "n_head", "neurons": "n_inner", "layers": "n_layer"}
    attention, mlp = Sublayer("attn", "attn.c_proj"), Sublayer("mlp", "mlp.c_proj")
    stacks = _one_stack("transformer.h.{i}", attention, mlp, ("ln_2",))
    keys["positions"] = "n_positions"
    return Architecture(
        _with_biases(parameters, biased),
        keys,
        "lm_head.weight",
        stacks,
        square=True,
        queries_by_layer=tuple(layer + f"attn.c_attn.{x}" for x in ("weight", "bias"))
        if get(config, "scale_attn_by_inverse_layer_idx")
        else (),
        leftovers=("attn.bias", "attn.masked_bias"),
    )


@ARCHITECTURES.register("gpt_neox")
def _gpt_neox(config: Config) -> Architecture:
    layer = "gpt_neox.layers.{i}."
    norms = (layer + "input_layernorm", layer + "post_attention_layernorm", "gpt_neox.final_layer_norm")
    parameters: dict[str, tuple[str, ...]] = {
        "gpt_neox.embed_in.weight": ("vocab", "hidden"),
        layer + "attention.query_key_value.weight": ("qkv_by_head", "hidden"),
        layer + "attention.dense.weight": ("hidden", "heads"),
        layer + "mlp.dense_h_to_4h.weight": ("neurons", "hidden"),
        layer + "mlp.dense_4h_to_h.weight": ("hidden", "neurons"),
        "lm_head.weight": ("vocab", "hidden"),
        **{f"{n}.weight": ("hidden",) for n in norms},
    }
    biased: dict[str, str] = {}
    if get(config, "attention_bias", True):
        biased |= {layer + "attention.query_key_value": "qkv_by_head", layer + "attention.dense": "hidden"}
    biased |= {layer + "mlp.dense_h_to_4h": "neurons", layer + "mlp.dense_4h_to_h": "hidden"}
    keys = {"vocab": "vocab_size", "hidden": "hidden_size", "heads": "num_attention_heads"}
    keys |= {"neurons": "intermediate_size", "layers": "num_hidden_layers"}
    biased |= dict.fromkeys(norms, "hidden")
    # With a parallel residual both sublayers read the layer's input: nothing is added between them.
    between = () if get(config, "use_parallel_residual", True) else ("post_attention_layernorm",)
    attention, mlp = Sublayer("attention", "attention.dense"), Sublayer("mlp", "mlp.dense_4h_to_h")
    stacks = _one_stack("gpt_neox.layers.{i}", attention, mlp, between)
    return Architecture(
        _with_biases(parameters, biased),
        keys,
        "lm_head.weight",
        stacks,
        square=True,
        in_checkpoints={"lm_head.weight": "embed_out.weight"},
        leftovers=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    )


@ARCHITECTURES.register("opt")
def _opt(config: Config) -> Architecture:
    decoder = "model.decoder."
    layer = decoder + "layers.{i}."
    norms = [layer + "self_attn_layer_norm", layer + "final_layer_norm"]
    before = bool(get(config, "do_layer_norm_before", True))
    if before and not get(config, "_remove_final_layer_norm"):
        norms.append(decoder + "final_layer_norm")
    if not get(config, "layer_norm_elementwise_affine", True):
        norms = []
    parameters: dict[str, tuple[str, ...]] = {
        decoder + "embed_tokens.weight": ("vocab", "embed"),
        decoder + "embed_positions.weight": ("positions", "hidden"),
        **{layer + f"self_attn.{x}_proj.weight": ("heads", "hidden") for x in "qkv"},
        layer + "self_attn.out_proj.weight": ("hidden", "heads"),
        layer + "fc1.weight": ("neurons", "hidden"),
        layer + "fc2.weight": ("hidden", "neurons"),
        "lm_head.weight": ("vocab", "embed"),
        **{f"{n}.weight": ("hidden",) for n in norms},
    }
    if (get(config, "word_embed_proj_dim") or get(config, "hidden_size")) != get(config, "hidden_size"):
        parameters[decoder + "project_in.weight"] = ("hidden", "embed")
        parameters[decoder + "project_out.weight"] = ("embed", "hidden")
    biased: dict[str, str] = dict.fromkeys(norms, "hidden")
    if get(config, "enable_bias", True):
        biased |= {layer + f"self_attn.{x}_proj": "heads" for x in "qkv"} | {layer + "self_attn.out_proj": "hidden"}
        biased |= {layer + "fc1": "neurons", layer + "fc2": "hidden"}
    keys = {"vocab": "vocab_size", "hidden": "hidden_size", "heads": "num_attention_heads", "neurons": "ffn_dim"}
    keys |= {"layers": "num_hidden_layers", "positions": "max_position_embeddings", "embed": "word_embed_proj_dim"}
    # Norms before the sublayers (all but 350m): the second reads the middle stream. After them: each reads a sum.
    sums = ("final_layer_norm",) if before else ("self_attn_layer_norm", "final_layer_norm")
    attention, mlp = Sublayer("self_attn", "self_attn.out_proj"), Sublayer("fc2", "fc2")
    stacks = _one_stack("model.decoder.layers.{i}", attention, mlp, sums)
    return Architecture(
        _with_biases(parameters, biased), keys, "lm_head.weight", stacks, square=True, position_offset=OPT_OFFSET
    )


T5_KEYS = {
    "vocab": "vocab_size",
    "hidden": "d_model",
    "heads": "num_heads",
    "head_dim": "d_kv",
    "neurons": "d_ff",
    "layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "buckets": "relative_attention_num_buckets",
}


@ARCHITECTURES.register("t5")
def _t5(config: Config) -> Architecture:
    """Encoder and decoder on one embedding, so on one hidden axis; a head's relative bias belongs to all layers.

    Each stack's biases are in its first layer and apply to every layer, so the heads that stay are the same in all of
    them; the decoder's heads on the encoder have no bias and are free.
    """
    _check_t5(config)
    encoder, decoder = "encoder.block.{i}.", "decoder.block.{i}."
    parameters: dict[str, tuple[str, ...]] = {
        "shared.weight": ("vocab", "hidden"),
        **_t5_attention(encoder + "layer.0.", "SelfAttention", "heads"),
        **_t5_mlp(config, encoder + "layer.1.", "neurons"),
        "encoder.final_layer_norm.weight": ("hidden",),
        **_t5_attention(decoder + "layer.0.", "SelfAttention", "heads.1"),
        **_t5_attention(decoder + "layer.1.", "EncDecAttention", "heads.2"),
        **_t5_mlp(config, decoder + "layer.2.", "neurons.1"),
        "decoder.final_layer_norm.weight": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    }
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    parameters |= {"encoder." + bias: ("buckets", "per_head"), "decoder." + bias: ("buckets", "per_head.1")}
    itself = Sublayer("layer.0.SelfAttention", "layer.0.SelfAttention.o")
    on_encoder = Sublayer("layer.1.EncDecAttention", "layer.1.EncDecAttention.o")
    mlps = [Sublayer(f"layer.{n}.DenseReluDense", f"layer.{n}.DenseReluDense.wo") for n in (1, 2)]
    stacks = (
        Stack("encoder.block.{i}", (itself,), mlps[0], ("layer.1",)),
        Stack("decoder.block.{i}", (itself, on_encoder), mlps[1], ("layer.1", "layer.2")),
    )
    scaled = "decoder.final_layer_norm.weight" if get(config, "scale_decoder_outputs", True) else ""
    repeated = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    unused = (f"{decoder}layer.1.EncDecAttention.relative_attention_bias.weight".replace("{i}", "0"),)
    return Architecture(
        parameters,
        T5_KEYS,
        "lm_head.weight",
        stacks,
        one_set=(0, 1),
        scaled=scaled,
        copies=repeated,
        leftovers=unused,
    )


def _t5_attention(layer: str, name: str, heads: str) -> dict[str, tuple[str, ...]]:
    maps: dict[str, tuple[str, ...]] = {f"{layer}{name}.{x}.weight": (heads, "hidden") for x in "qkv"}
    return maps | {f"{layer}{name}.o.weight": ("hidden", heads), layer + "layer_norm.weight": ("hidden",)}


def _t5_mlp(config: Config, layer: str, neurons: str) -> dict[str, tuple[str, ...]]:
    gated = get(config, "feed_forward_proj", "relu").startswith("gated")
    maps: dict[str, tuple[str, ...]] = {
        f"{layer}DenseReluDense.{x}.weight": (neurons, "hidden") for x in (("wi_0", "wi_1") if gated else ("wi",))
    }
    return maps | {
        layer + "DenseReluDense.wo.weight": ("hidden", neurons),
        layer + "layer_norm.weight": ("hidden",),
    }


def _check_t5(config: Config) -> None:
    layers, decoder = get(config, "num_layers"), get(config, "num_decoder_layers")
    if decoder not in (None, layers):
        raise ConfigError(
            f"this T5 has {layers} encoder and {decoder} decoder layers. Only stacks of equal depth can be counted and "
            "pruned."
        )
    if get(config, "tie_word_embeddings") is False:
        raise ConfigError(
            "this T5 has an output matrix of its own (tie_word_embeddings: false, as in T5 v1.1), and the T5Config of "
            "transformers 5 cannot represent this: it ties every T5. Use one with shared embeddings, such as T5 v1.0."
        )
