"""Ladders of teachers: each family's rungs with their exact shapes, so that planning a grid downloads nothing.

A rung is the content of a `config.json`. This file imports no torch: parameters are counted from the axis tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from capacity_gap.errors import ConfigError, nearest
from capacity_gap.models.axes import count_params
from capacity_gap.scales import format_scale, parse_scale

Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A ladder of teachers of one architecture, smallest first, and the ratio by which shapes are rounded."""

    name: str
    rungs: Mapping[str, Shape]
    multiple: int

    @cached_property
    def params(self) -> dict[str, int]:
        """Total parameters of each rung."""
        return {rung: count_params(shape) for rung, shape in self.rungs.items()}

    def rung(self, given: str) -> str:
        """The rung that `given` names, in any spelling of its scale; an unknown one raises and lists what there is."""
        wanted = parse_scale(given, key="teacher")
        for rung in self.rungs:
            if parse_scale(rung, key="rung") == wanted:
                return rung
        elsewhere = [f.name for f in FAMILIES.values() if wanted in (parse_scale(r, key="rung") for r in f.rungs)]
        known = ", ".join(f"family={name}" for name in elsewhere)
        hint = (
            f" {format_scale(wanted)} is a rung of {known}." if elsewhere else f" No family has {format_scale(wanted)}."
        )
        raise ConfigError(
            f"teacher={given}: family {self.name} has no such rung. Its rungs: {' '.join(self.rungs)}.{hint}"
        )


# Hidden size and neurons per rung. Four layers and heads of 8 throughout; neurons ≈ 8/3 hidden, chosen so that each
# name is true within 0.5 %, and so that every axis grows along the ladder: each rung can hold every smaller student.
PICO_WIDTHS = {
    "55k": (24, 73),
    "80k": (32, 80),
    "120k": (40, 111),
    "180k": (48, 162),
    "270k": (64, 180),
    "400k": (80, 224),
    "600k": (104, 256),
    "900k": (128, 329),
    "1.3m": (152, 424),
    "2m": (192, 526),
}
PICO_VOCABULARY = 1024
PICO_HEAD = 8


def pico_shape(hidden: int, neurons: int) -> Shape:
    """A Llama of pico size: tied embeddings, because untied ones would be two thirds of the smallest rungs."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": PICO_VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": 4,
        "num_attention_heads": hidden // PICO_HEAD,
        "num_key_value_heads": hidden // PICO_HEAD,
        "head_dim": PICO_HEAD,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


FAMILIES = {
    "pico": Family("pico", {rung: pico_shape(*widths) for rung, widths in PICO_WIDTHS.items()}, multiple=1),
}


def family(name: str) -> Family:
    """The family of that name; an unknown one raises and lists those there are."""
    if name not in FAMILIES:
        raise ConfigError(f"family={name!r} is not known{nearest(name, FAMILIES)}. Allowed: {', '.join(FAMILIES)}.")
    return FAMILIES[name]
