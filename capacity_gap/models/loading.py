"""Models from folders, from shapes and from seeds; and the two parts of one that training needs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def new_model(shape: Mapping[str, Any], seed: int) -> Any:
    """A model with random weights: `shape` is the content of a config.json, `seed` decides every weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def load_model(folder: Path, *, device: str = "cpu") -> Any:
    """The model saved in `folder`, in fp32, evaluation mode, from safetensors, without remote code."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.to(device).eval()


def save_model(model: Any, folder: Path) -> None:
    """Saves weights and config as plain transformers loads them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)


def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """Last hidden states [B, T, D] of tokens [B, T]: what the output matrix is applied to."""
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def output_weight(model: Any) -> Tensor:
    """The output matrix [V, D]; the embedding itself where the two are tied."""
    return model.get_output_embeddings().weight


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters by name, tied ones once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
