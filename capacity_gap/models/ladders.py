"""Ladders of teachers: each family's rungs with their exact shapes, so that planning a grid downloads nothing.

A rung is the content of a `config.json`; those on the hub are written down in `published_ladders.py`. This file imports
no torch: parameters are counted from the axis tables.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.models.axes import count_params
from capacity_gap.models.checkpoints import Checkpoint
from capacity_gap.models.published_ladders import PUBLISHED
from capacity_gap.settings.errors import ConfigError, ImpossibleCell, nearest, shown
from capacity_gap.settings.places import user_path
from capacity_gap.settings.registry import Registry
from capacity_gap.settings.scales import format_scale, parse_scale

Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A ladder of teachers of one architecture, smallest first; sizes of students are multiples of `multiple`.

    `published` names the checkpoint of each rung on the Hugging Face hub; without it teachers are trained on the spot.
    """

    name: str
    rungs: Mapping[str, Shape]
    multiple: int
    published: Mapping[str, str] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)  # beginning of a repository's name → licence; first wins
    left_out: Mapping[str, str] = field(default_factory=dict)  # name of a rung or checkpoint that cannot be used → why
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of rungs
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)  # the rungs of a ladder of the user's own
    added: frozenset[str] = frozenset()  # rungs that teach the common students and do not decide their shape

    @cached_property
    def common_rungs(self) -> Mapping[str, Shape]:
        """The rungs that decide the common student's shape: a rung added later changes no student."""
        return {rung: shape for rung, shape in self.rungs.items() if rung not in self.added}

    @cached_property
    def params(self) -> dict[str, int]:
        """Total parameters of each rung."""
        return {rung: count_params(shape) for rung, shape in self.rungs.items()}

    @cached_property
    def scales(self) -> dict[int, str]:
        """Rungs by the scale that their name says; a rung named by its folder goes by its exact count."""
        found = {}
        for rung in self.rungs:
            try:
                found[parse_scale(rung, key="rung")] = rung
            except ConfigError:
                found[self.params[rung]] = rung
        return found

    def student_params(self, scale: int) -> int:
        """Parameters that a student's scale means: exactly those of the rung that it names, unless that was added."""
        rung = self.scales.get(scale)
        return scale if rung is None or rung in self.added else self.params[rung]

    def size(self, given: str, *, key: str) -> int:
        """Parameters of the teacher that a scale names, else the scale: `1b` of Llama 3 has 1.24 billion.

        Raises:
            ConfigError: it is no scale.
        """
        if given in self.params:
            return self.params[given]
        wanted = parse_scale(given, key=key)
        return self.params[self.scales[wanted]] if wanted in self.scales else wanted

    def rung(self, given: str) -> str:
        """The rung that `given` names, in any spelling of its scale; an unknown one raises and lists what there is."""
        by_folder = {path: rung for rung, path in self.published.items()} | {rung: rung for rung in self.rungs}
        by_folder |= self.aliases
        for name in (given, str(user_path(given).absolute())):
            if name in by_folder:
                return by_folder[name]
            if name in self.left_out:
                raise ImpossibleCell(self.left_out[name])
        try:
            wanted = parse_scale(given, key="teacher")
        except ConfigError as error:
            if not self.checkpoints:
                raise ConfigError(
                    f"{error} A checkpoint is an existing folder (working directory: {Path.cwd()}), a hub name "
                    "ORG/NAME, or a .gguf file."
                ) from error
            wanted = 0
        if wanted in self.scales:
            return self.scales[wanted]
        if self.checkpoints:
            close = nearest(given, self.rungs)
            raise ConfigError(f"teacher={shown(given)} is none of these{close}: {', '.join(self.rungs)}.")
        elsewhere = [f.name for f in FAMILIES.values() if wanted in f.scales]
        known = ", ".join(f"family={name}" for name in elsewhere)
        scale = format_scale(wanted)
        hint = f" {scale} is a rung of {known}." if elsewhere else f" No family has {scale}."
        raise ConfigError(
            f"teacher={given}: family {self.name} has no such rung. Its rungs: {' '.join(self.rungs)}.{hint}"
        )


# Pico families: four layers (T5: two and two), heads of 8, a vocabulary of 1024, trained on the spot. Hidden sizes are
# chosen, neurons make each name true within 0.5 %, and every axis grows along the ladder: each rung can hold every
# smaller student.
PICO_VOCABULARY = 1024
PICO_HEAD = 8
PICO_LAYERS = 4
PICO_HIDDEN = {
    "pico": {
        "55k": 24,
        "80k": 32,
        "120k": 40,
        "180k": 48,
        "270k": 64,
        "400k": 80,
        "600k": 104,
        "900k": 128,
        "1.3m": 152,
        "2m": 192,
    },
    "pico_gpt2": {"55k": 24, "80k": 32, "120k": 40, "180k": 48, "270k": 64, "400k": 80, "600k": 104, "900k": 128},
    "pico_neox": {"80k": 24, "120k": 32, "180k": 40, "270k": 56, "400k": 72, "600k": 88, "900k": 112},
    "pico_t5": {"80k": 32, "120k": 40, "180k": 48, "270k": 64, "400k": 80, "600k": 96, "900k": 120},
    "pico_mistral": {"80k": 32, "130k": 48, "180k": 48, "270k": 64, "400k": 80, "600k": 96, "900k": 128},
    "small": {"5m": 192, "7m": 224, "10m": 288, "14m": 352, "20m": 416, "28m": 512, "40m": 608, "50m": 672},
}
# The small family, for one GPU: eight layers, heads of 32, neurons about 2.6 times the hidden size.
SMALL_VOCABULARY = 8192
SMALL_HEAD = 32
SMALL_LAYERS = 8
# Rungs added for study two. They lie between the others, so a curve has more points where its optimum may be.
PICO_ADDED = {
    "pico": {"220k": 56, "330k": 72, "460k": 88, "530k": 96, "700k": 112, "800k": 120, "1m": 136},
}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def _pico_llama(hidden: int, neurons: int) -> Shape:
    """Tied embeddings, because untied ones would be two thirds of the smallest rungs."""
    heads = hidden // PICO_HEAD
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": PICO_VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": PICO_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": PICO_HEAD,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        **_ENDS,
    }


def _small_llama(hidden: int, neurons: int) -> Shape:
    """The same at sizes for a GPU."""
    heads = hidden // SMALL_HEAD
    return {
        **_pico_llama(hidden, neurons),
        "vocab_size": SMALL_VOCABULARY,
        "num_hidden_layers": SMALL_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": SMALL_HEAD,
    }


def _pico_mistral(hidden: int, neurons: int) -> Shape:
    """Grouped queries, two to a key-value head; tied."""
    llama = _pico_llama(hidden, neurons)
    own = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    kept = {k: v for k, v in llama.items() if not k.endswith("_bias")}
    return {**kept, **own, "num_key_value_heads": hidden // PICO_HEAD // 2}


def _pico_gpt2(hidden: int, neurons: int) -> Shape:
    """Learned positions: 128 of them, no more, since each costs a hidden size."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": PICO_VOCABULARY,
        "n_embd": hidden,
        "n_inner": neurons,
        "n_layer": PICO_LAYERS,
        "n_head": hidden // PICO_HEAD,
        "n_positions": 128,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **_ENDS,
    }


def _pico_neox(hidden: int, neurons: int) -> Shape:
    """Parallel residual, partial rotary and untied embeddings, as in Pythia."""
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": PICO_VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": PICO_LAYERS,
        "num_attention_heads": hidden // PICO_HEAD,
        "rotary_pct": 0.25,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        **_ENDS,
    }


def _pico_t5(hidden: int, neurons: int) -> Shape:
    """Two layers in each stack, gated neurons, one embedding for encoder, decoder and output."""
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": PICO_VOCABULARY,
        "d_model": hidden,
        "d_kv": PICO_HEAD,
        "d_ff": neurons,
        "num_layers": PICO_LAYERS // 2,
        "num_decoder_layers": PICO_LAYERS // 2,
        "num_heads": hidden // PICO_HEAD,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "scale_decoder_outputs": True,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }


def _pico(name: str, make: Callable[[int, int], Shape], multiple: int = 1) -> Family:
    """The ladder of one pico architecture: for each rung, as many neurons as make its name true."""
    added, rungs = PICO_ADDED.get(name, {}), {}
    for rung, hidden in sorted({**PICO_HIDDEN[name], **added}.items(), key=lambda named: named[1]):
        bare, one = (count_params(make(hidden, neurons)) for neurons in (1, 2))
        rungs[rung] = make(hidden, 1 + round((parse_scale(rung, key="rung") - bare) / (one - bare)))
    return Family(name, rungs, multiple, added=frozenset(added))


def published_family(
    name: str,
    shared: Shape,
    rungs: Mapping[str, tuple[str, Shape]],
    *,
    multiple: int = 8,
    licences: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Family:
    """A ladder of checkpoints on the hub: rung → (repository, what differs from the family's shape)."""
    shapes = {rung: {**shared, **own} for rung, (_, own) in rungs.items()}
    repositories = {rung: repository for rung, (repository, _) in rungs.items()}
    return Family(name, shapes, multiple, repositories, licences or {}, left_out or {})


FOLDERS = "folders"  # the family that is made of the user's own model folders
CHECKPOINTS = "checkpoints"  # the same with repositories of the hub or GGUF files among them
# `dtype`: in which the family's teachers are held while they teach, unless said.
FAMILIES: Registry[Family] = Registry(
    "family", setting="family", traits={"dtype": "fp32"}, reserved=(FOLDERS, CHECKPOINTS)
)


def add_family(family: Family, *, dtype: str = "fp32") -> None:
    """Registers a ladder under its own name. Its shapes are hashed whole, so it needs no version."""
    FAMILIES.add(family.name, family, dtype=dtype, module=sys._getframe(1).f_globals["__name__"])


add_family(_pico("pico", _pico_llama))
add_family(_pico("pico_gpt2", _pico_gpt2))
add_family(_pico("pico_neox", _pico_neox))
add_family(_pico("pico_mistral", _pico_mistral))
add_family(_pico("pico_t5", _pico_t5))
add_family(_pico("small", _small_llama, multiple=8))
for _name, _ladder in PUBLISHED.items():
    add_family(published_family(_name, **vars(_ladder)), dtype="bf16")


def family(name: str) -> Family:
    """The family of that name; an unknown one raises and lists those there are."""
    return FAMILIES[name]


def licence_of(repository: str) -> str | None:
    """The licence of a published checkpoint, by the beginning of its name; None if it is not known."""
    known = (pair for ladder in FAMILIES.values() for pair in ladder.licences.items())
    return next((licence for start, licence in known if repository.startswith(start)), None)
