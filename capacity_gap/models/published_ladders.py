"""The ladders on the Hugging Face hub, as their repositories' config.json files have them. Imports no torch.

A rung says all that decides the function of its model and that the class of transformers would assume otherwise: a
student with random weights is made from the rung alone. A student that is cut takes the rest from its checkpoint.
`initializer_range` is left out everywhere: random students of one family start alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """A ladder as it is written down: `ladders.published_family` takes these."""

    shared: Shape
    rungs: Mapping[str, tuple[str, Shape]]  # rung → repository, what differs from `shared`
    licences: Mapping[str, str]  # beginning of a repository's name → licence; first wins
    left_out: Mapping[str, str] = field(default_factory=dict)  # a rung that one may ask for → why it is none


def _gpt2(layers: int, hidden: int, heads: int, **more: Any) -> Shape:
    return {"n_layer": layers, "n_embd": hidden, "n_head": heads, **more}


def _plain(layers: int, hidden: int, heads: int, neurons: int, **more: Any) -> Shape:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": neurons, **more}


def _grouped(layers: int, hidden: int, heads: int, neurons: int, kv_heads: int, **more: Any) -> Shape:
    return _plain(layers, hidden, heads, neurons, num_key_value_heads=kv_heads, **more)


def _opt(layers: int, hidden: int, heads: int, **more: Any) -> Shape:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    return {**sizes, "word_embed_proj_dim": hidden, **more}


def _rope(theta: float, **scaling: Any) -> Shape:
    """Rotary positions in the form of transformers 5. All keys are said, so that its classes add none to the shape."""
    return {"rope_theta": theta, "rope_type": "default", **scaling}


_PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA2 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}
_QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(1_000_000.0),
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
# From 7b on Qwen2.5's vocabulary is padded further, and its positions reach further.
_WIDE = {"vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "tie_word_embeddings": True}
_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "tie_word_embeddings": True}

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,  # more heads than the hidden size would give
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(1_000_000.0),
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _llama3_rope(factor: float) -> dict[str, Shape]:
    """Llama 3's stretched positions: 32-fold in 3.2, 8-fold in 3.1."""
    kept = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_parameters": _rope(500_000.0, rope_type="llama3", factor=factor, **kept)}


_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    # Every sixth layer attends to all: `layer_types` as the class assumes them, for students of any depth too.
    "sliding_window": 512,
    "rope_parameters": {"full_attention": _rope(1_000_000.0), "sliding_attention": _rope(10_000.0)},
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(100_000.0),
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(500_000.0),
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 100257,
    "pad_token_id": 100277,
}
_CEREBRAS = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 2048,
    "activation_function": "gelu",  # exact; GPT-2's own is an approximation
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


def _cerebras(layers: int, hidden: int, heads: int) -> Shape:
    return _gpt2(layers, hidden, heads, n_inner=4 * hidden)


def _sees(rung: str) -> str:
    return (
        f"Gemma 3 {rung} is multimodal, and only language models can be distilled. Use 1b or 270m, or save its "
        "language model to a separate folder and use family=folders."
    )


PUBLISHED: dict[str, Published] = {
    "pythia": Published(
        _PYTHIA,
        {
            "70m": ("EleutherAI/pythia-70m", _plain(6, 512, 8, 2048)),
            "160m": ("EleutherAI/pythia-160m", _plain(12, 768, 12, 3072)),
            "410m": ("EleutherAI/pythia-410m", _plain(24, 1024, 16, 4096)),
            "1b": ("EleutherAI/pythia-1b", _plain(16, 2048, 8, 8192)),
            "1.4b": ("EleutherAI/pythia-1.4b", _plain(24, 2048, 16, 8192)),
            "2.8b": ("EleutherAI/pythia-2.8b", _plain(32, 2560, 32, 10240)),
            "6.9b": ("EleutherAI/pythia-6.9b", _plain(32, 4096, 32, 16384, vocab_size=50432)),
            "12b": ("EleutherAI/pythia-12b", _plain(36, 5120, 40, 20480, vocab_size=50688)),
        },
        {"EleutherAI/pythia": "Apache-2.0"},
    ),
    "gpt2": Published(
        _GPT2,
        {
            "124m": ("openai-community/gpt2", _gpt2(12, 768, 12)),
            "355m": ("openai-community/gpt2-medium", _gpt2(24, 1024, 16)),
            "774m": ("openai-community/gpt2-large", _gpt2(36, 1280, 20)),
            "1.5b": ("openai-community/gpt2-xl", _gpt2(48, 1600, 25)),
        },
        {"openai-community/gpt2": "MIT"},
    ),
    "opt": Published(
        _OPT,
        {
            "125m": ("facebook/opt-125m", _opt(12, 768, 12)),
            "350m": (
                "facebook/opt-350m",
                _opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
            ),
            "1.3b": ("facebook/opt-1.3b", _opt(24, 2048, 32)),
            "2.7b": ("facebook/opt-2.7b", _opt(32, 2560, 32)),
            "6.7b": ("facebook/opt-6.7b", _opt(32, 4096, 32)),
            "13b": ("facebook/opt-13b", _opt(40, 5120, 40)),
            "30b": ("facebook/opt-30b", _opt(48, 7168, 56)),
        },
        {"facebook/opt": "OPT-175B licence (non-commercial)"},
    ),
    "llama2": Published(
        _LLAMA2,
        {
            "7b": ("meta-llama/Llama-2-7b-hf", _plain(32, 4096, 32, 11008, num_key_value_heads=32)),
            "13b": ("meta-llama/Llama-2-13b-hf", _plain(40, 5120, 40, 13824, num_key_value_heads=40)),
            "70b": ("meta-llama/Llama-2-70b-hf", _plain(80, 8192, 64, 28672, num_key_value_heads=8)),
        },
        {"meta-llama/Llama-2": "Llama 2 Community License"},
    ),
    "mistral": Published(
        _MISTRAL,
        {"7b": ("mistralai/Mistral-7B-v0.1", _plain(32, 4096, 32, 14336, num_key_value_heads=8))},
        {"mistralai/Mistral-7B": "Apache-2.0"},
    ),
    "qwen2_5": Published(
        _QWEN,
        {
            "0.5b": ("Qwen/Qwen2.5-0.5B", _plain(24, 896, 14, 4864, num_key_value_heads=2)),
            "1.5b": ("Qwen/Qwen2.5-1.5B", _plain(28, 1536, 12, 8960, num_key_value_heads=2)),
            "3b": ("Qwen/Qwen2.5-3B", _plain(36, 2048, 16, 11008, num_key_value_heads=2)),
            "7b": ("Qwen/Qwen2.5-7B", _plain(28, 3584, 28, 18944, num_key_value_heads=4, **_WIDE)),
            "14b": ("Qwen/Qwen2.5-14B", _plain(48, 5120, 40, 13824, num_key_value_heads=8, **_WIDE, rms_norm_eps=1e-5)),
            "32b": ("Qwen/Qwen2.5-32B", _plain(64, 5120, 40, 27648, num_key_value_heads=8, **_WIDE, rms_norm_eps=1e-5)),
            "72b": ("Qwen/Qwen2.5-72B", _plain(80, 8192, 64, 29568, num_key_value_heads=8, **_WIDE, rms_norm_eps=1e-5)),
        },
        {
            "Qwen/Qwen2.5-3B": "Qwen Research License",
            "Qwen/Qwen2.5-72B": "Qwen License",
            "Qwen/Qwen2.5": "Apache-2.0",
        },
    ),
    "qwen3": Published(
        _QWEN3,
        {
            "0.6b": ("Qwen/Qwen3-0.6B-Base", _grouped(28, 1024, 16, 3072, 8)),
            "1.7b": ("Qwen/Qwen3-1.7B-Base", _grouped(28, 2048, 16, 6144, 8)),
            "4b": ("Qwen/Qwen3-4B-Base", _grouped(36, 2560, 32, 9728, 8)),
            "8b": ("Qwen/Qwen3-8B-Base", _grouped(36, 4096, 32, 12288, 8, tie_word_embeddings=False)),
            "14b": ("Qwen/Qwen3-14B-Base", _grouped(40, 5120, 40, 17408, 8, tie_word_embeddings=False)),
        },
        {"Qwen/Qwen3": "Apache-2.0"},
        # A ladder compares sizes. Post-training costs loss on plain text, so a post-trained top rung would look like a
        # capacity gap: an optimum below it that has nothing to do with size.
        {
            "32b": "Qwen3 32b has no base model: only a post-trained one is published, and a ladder compares base "
            "models. Use 14b, or download Qwen/Qwen3-32B and use family=folders."
        },
    ),
    "llama3": Published(
        _LLAMA3,
        {
            "1b": (
                "meta-llama/Llama-3.2-1B",
                _grouped(16, 2048, 32, 8192, 8, head_dim=64, tie_word_embeddings=True, **_llama3_rope(32.0)),
            ),
            "3b": (
                "meta-llama/Llama-3.2-3B",
                _grouped(28, 3072, 24, 8192, 8, tie_word_embeddings=True, **_llama3_rope(32.0)),
            ),
            "8b": ("meta-llama/Llama-3.1-8B", _grouped(32, 4096, 32, 14336, 8, **_llama3_rope(8.0))),
            "70b": ("meta-llama/Llama-3.1-70B", _grouped(80, 8192, 64, 28672, 8, **_llama3_rope(8.0))),
        },
        {
            "meta-llama/Llama-3.2": "Llama 3.2 Community License",
            "meta-llama/Llama-3.1": "Llama 3.1 Community License",
        },
    ),
    # 4b, 12b and 27b are Gemma3ForConditionalGeneration, with a vision tower: they are left out. The tokenizers of the
    # two rungs know one token more, <image_soft_token>, than their models have rows (huggingface/transformers#37011).
    # Cells are refused for it before anything is trained.
    "gemma3": Published(
        _GEMMA3,
        {
            "270m": ("google/gemma-3-270m", _grouped(18, 640, 4, 2048, 1)),
            "1b": ("google/gemma-3-1b-pt", _grouped(26, 1152, 4, 6912, 1)),
        },
        {"google/gemma-3": "Gemma Terms of Use"},
        {rung: _sees(rung) for rung in ("4b", "12b", "27b")},
    ),
    "smollm2": Published(
        _SMOLLM2,
        {
            "135m": ("HuggingFaceTB/SmolLM2-135M", _grouped(30, 576, 9, 1536, 3)),
            "360m": ("HuggingFaceTB/SmolLM2-360M", _grouped(32, 960, 15, 2560, 5)),
            "1.7b": (
                "HuggingFaceTB/SmolLM2-1.7B",
                _grouped(24, 2048, 32, 8192, 32, rope_parameters=_rope(130_000.0)),
            ),
        },
        {"HuggingFaceTB/SmolLM2": "Apache-2.0"},
    ),
    "olmo2": Published(
        _OLMO2,
        {
            "1b": ("allenai/OLMo-2-0425-1B", _grouped(16, 2048, 16, 8192, 16)),
            "7b": ("allenai/OLMo-2-1124-7B", _grouped(32, 4096, 32, 11008, 32)),
            "13b": ("allenai/OLMo-2-1124-13B", _grouped(40, 5120, 40, 13824, 40)),
            "32b": ("allenai/OLMo-2-0325-32B", _grouped(64, 5120, 40, 27648, 8)),
        },
        {"allenai/OLMo-2": "Apache-2.0"},
    ),
    # The hub lists pickles (pytorch_model.bin) and no safetensors for these, and pickles are never read here. The
    # ladder can be planned and counted. To run it, convert the checkpoints elsewhere and take family=folders.
    "cerebras_gpt": Published(
        _CEREBRAS,
        {
            "111m": ("cerebras/Cerebras-GPT-111M", _cerebras(10, 768, 12)),
            "256m": ("cerebras/Cerebras-GPT-256M", _cerebras(14, 1088, 17)),
            "590m": ("cerebras/Cerebras-GPT-590M", _cerebras(18, 1536, 12)),
            "1.3b": ("cerebras/Cerebras-GPT-1.3B", _cerebras(24, 2048, 16)),
            "2.7b": ("cerebras/Cerebras-GPT-2.7B", _cerebras(32, 2560, 32)),
            "6.7b": ("cerebras/Cerebras-GPT-6.7B", _cerebras(32, 4096, 32)),
            "13b": ("cerebras/Cerebras-GPT-13B", _cerebras(40, 5120, 40)),
        },
        {"cerebras/Cerebras-GPT": "Apache-2.0"},
    ),
}
