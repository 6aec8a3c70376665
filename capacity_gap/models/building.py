"""Models as transformers makes them from a config.json: of which class, and whether it can at all."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from capacity_gap.models.axes import count_params
from capacity_gap.models.config_files import AGAIN
from capacity_gap.settings.errors import ConfigError, shown


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a language model of this config."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def attention_of(config: Any) -> str:
    """The attention that a config's class computes with: torch's own where it can, the plain one in others (BLOOM)."""
    made = auto_class(config)._model_mapping[type(config)]
    return "sdpa" if made._supports_sdpa else "eager"


def check_builds(folder: Path | str, config: Mapping[str, Any]) -> None:
    """Checks that transformers makes of a config.json the model that its table here describes, without its weights.

    Raises:
        ConfigError: it cannot be made, or has other parameters.
    """
    if problem := _building_problem(json.dumps(config, sort_keys=True)):
        raise ConfigError(f"{folder}: transformers cannot build the model of this config.json ({problem}). {AGAIN}")


@lru_cache(maxsize=256)
def _building_problem(config_text: str) -> str | None:
    """What goes wrong when the model of a config.json is made on the meta device, which holds no numbers."""
    import torch
    from transformers import AutoConfig

    given = json.loads(config_text)
    try:
        with torch.device("meta"):
            kind = given.pop("model_type")
            config = AutoConfig.for_model(kind, **given)
            made = auto_class(config).from_config(config, attn_implementation=attention_of(config))
        found = sum(p.numel() for p in made.parameters())
    except Exception as error:  # whatever transformers and torch raise over a config
        return f"{type(error).__name__}: {shown(str(error).splitlines()[0] if str(error) else '')}"
    expected = count_params(json.loads(config_text))
    return None if found == expected else f"it has {found:,} parameters where {expected:,} were expected"
