"""Models from folders, from shapes and from seeds; and the two parts of one that training needs."""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from capacity_gap.models.axes import count_params
from capacity_gap.models.building import attention_of, auto_class
from capacity_gap.models.config_files import read_object
from capacity_gap.models.defaults import frozen_rows
from capacity_gap.models.folders import named_by_config
from capacity_gap.models.hub_errors import hub_problem
from capacity_gap.models.quiet import quiet, runnable
from capacity_gap.settings.errors import StageError, UserError, first_line
from capacity_gap.settings.places import user_path
from capacity_gap.store.checkpoint import whole
from capacity_gap.store.files import write_json
from capacity_gap.structure.head import logit_factor

POINTER = "published.json"  # a stage folder that holds this instead of weights points to a checkpoint elsewhere
HERE = "."  # what it points to where the weights lie beside it after all
FILES = ["*.safetensors", "*.json", "*.jinja"]  # what is read of a checkpoint on the hub
NO_CODE = {"trust_remote_code": False}  # said: unsaid, transformers asks at a terminal
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def new_model(shape: Mapping[str, Any], seed: int) -> Any:
    """A model with random weights: `shape` is the content of a config.json, `seed` decides every weight.

    The row of the padding token starts as random as the others; transformers would leave it at zero.
    """
    from transformers import AutoConfig

    settings = copy.deepcopy(dict(shape))  # transformers fills in what a shape's rope_parameters leave out
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    padding = config.pad_token_id
    if frozen_rows(shape):
        config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, attn_implementation=attention_of(config), dtype=torch.float32)
    model.config.pad_token_id = padding
    return quiet(runnable(model))


def load_model(folder: Path, *, device: str = "cpu", device_map: str | None = None) -> Any:
    """The model saved in `folder`, or that it points to; evaluation mode, from safetensors, without remote code.

    Our own models load in fp32; published ones in the dtype, and if asked the 8-bit form, that their pointer names.
    `device_map`: how layers are spread over all devices, as accelerate names it, instead of on one `device`.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, where = folder, {"local_files_only": True, **NO_CODE}
    options: dict[str, Any] = {"dtype": torch.float32}
    if (folder / POINTER).exists():
        pointer = json.loads((folder / POINTER).read_text())
        source = folder if pointer["repository"] == HERE else pointer["repository"]
        where, options = {"revision": pointer["revision"], **NO_CODE}, {"dtype": DTYPES[pointer["dtype"]]}
        if pointer["quantization"] == "8bit":
            from transformers import BitsAndBytesConfig

            options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    if device_map:
        options["device_map"] = device_map
    config = AutoConfig.from_pretrained(source, **where)
    options |= {**where, "config": config}
    model = whole_model(auto_class(config), source, **options)
    with_generation_config_that_saves(model)
    return quiet(runnable(model if "device_map" in options else model.to(device))).eval()


def with_generation_config_that_saves(model: Any) -> None:
    """Repairs a generation_config.json that transformers loads but would not save: the model is copied later.

    Older folders give sampling values without `do_sample`: then sampling is meant. What cannot be saved even so is left
    out, but for the special tokens.
    """
    from transformers import GenerationConfig

    given = getattr(model, "generation_config", None)
    if given is None or _saves(given):
        return
    mended = GenerationConfig(**{**given.to_diff_dict(), "do_sample": True})
    if not _saves(mended):
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        mended = GenerationConfig(**{name: getattr(given, name, None) for name in tokens})
    model.generation_config = mended


def _saves(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def whole_model(kind: Any, source: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(source)` from safetensors, with every weight from there and no other.

    Raises:
        ConfigError: the folder holds an adapter, two checkpoints, or a tensor twice.
        StageError: weights are missing, left over or of another shape, or an adapter came along.
    """
    from transformers import AutoConfig

    from capacity_gap.models.weights import no_adapter, tensors_of

    if Path(source).is_dir():
        no_adapter(Path(source))
        tensors_of(Path(source))
    options |= {"use_safetensors": True, **NO_CODE}
    named = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    config = options.get("config") or AutoConfig.from_pretrained(source, **named, **NO_CODE)
    options["attn_implementation"] = attention_of(config)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what does not match is said below
    try:
        model, info = kind.from_pretrained(source, **options)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a broken file raises errors of many libraries
        said = first_line(error)
        raise StageError(f"{source} cannot be loaded ({said}). Copy or download it again.") from error
    wrong = {what: sorted(map(str, info[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    if getattr(model, "_hf_peft_config_loaded", False):
        wrong["adapter"] = [name for name, _ in model.named_parameters() if "lora" in name] or ["its weights"]
    if model.config.get_text_config().tie_word_embeddings and not is_tied(model):
        wrong["not shared, though its config says so"] = ["the output matrix and the embedding"]
    if any(wrong.values()):
        said = "; ".join(f"{what}: {', '.join(names[:3])} ({len(names)})" for what, names in wrong.items() if names)
        raise StageError(
            f"the weights of {source} do not match its config.json: {said}. Nothing was computed with them. Save the "
            "whole model again with save_pretrained, without adapters."
        )
    return model


def is_tied(model: Any) -> bool:
    """Whether the output matrix is the embedding; transformers leaves them apart where a file holds two that differ."""
    output = model.get_output_embeddings()
    return output is None or output.weight is model.get_input_embeddings().weight


def checkpoint_folder(folder: Path) -> Path:
    """Where the weights of a model stage are: its own folder, or the checkpoint that it points to."""
    if not (folder / POINTER).exists():
        return folder
    pointer = json.loads((folder / POINTER).read_text())
    if pointer["repository"] == HERE:
        return folder
    return _files_of(pointer["repository"], pointer["revision"])


def _files_of(repository: str, revision: str | None) -> Path:
    """The folder of a published checkpoint: the user's own, or a snapshot in the hub's cache."""
    if Path(repository).is_dir():
        return Path(repository)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))


def point_to(
    repository: str,
    out: Path,
    *,
    shape: Mapping[str, Any],
    dtype: str,
    quantization: str,
    revision: str | None = None,
) -> None:
    """Checks that a published checkpoint is there, has its rung's size and all its weights, and writes where it is.

    Raises:
        StageError: it is missing or gated, or of another size than the ladder says.
        ConfigError: its weights are not those of its config.json.
    """
    from transformers import AutoConfig

    from capacity_gap.models.weights import check_weights

    files = _from_hub(partial(_files_of, revision=revision), repository)
    config = _from_hub(lambda _: AutoConfig.from_pretrained(files, local_files_only=True, **NO_CODE), repository)
    found, expected = count_params(config.to_dict()), count_params(shape)
    if found != expected:
        raise StageError(
            f"{repository} has {found:,} parameters, but its rung says {expected:,}: it is not the checkpoint that "
            "this ladder describes."
        )
    if not Path(repository).is_dir():
        revision = files.name  # a snapshot is called by its commit: a branch may move on between two stages
    check_weights(files, config.to_dict())
    shutil.copyfile(files / "config.json", out / "config.json")
    pointer = {"repository": repository, "revision": revision, "dtype": dtype, "quantization": quantization}
    write_json(out / POINTER, pointer)


def point_to_itself(out: Path, *, file: str, licence: str | None, dtype: str, quantization: str) -> None:
    """Says in which type the weights in `out` are held, which file they were read from, and under which licence."""
    pointer = {"repository": HERE, "revision": None, "dtype": dtype, "quantization": quantization}
    pointer |= {"file": file, "licence": licence}
    write_json(out / POINTER, pointer)


def copy_tokenizer(repository: str, out: Path) -> None:
    """Saves a published tokenizer to `out`."""
    published_tokenizer(repository).save_pretrained(out)


def published_tokenizer(repository: str, revision: str | None = None) -> Any:
    """A tokenizer on the hub, at one commit if it is named, or in a folder.

    Where it names no token that ends a text, it gets the one that the model's config.json names.

    Raises:
        StageError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = user_path(repository)
    where: dict[str, Any] = {"local_files_only": True} if folder.is_dir() else {"revision": revision or "main"}

    def load(name: str) -> Any:
        made = AutoTokenizer.from_pretrained(name, **where, **NO_CODE)
        made("a text")  # what is wrong in its settings shows when it is used
        return made

    found = _from_hub(load, str(folder if folder.is_dir() else repository))
    if found.eos_token is None and (folder / "config.json").is_file():
        found.eos_token = named_by_config(read_object(folder / "config.json"), found.get_vocab())
    return found


def check_tokenizer(repository: str, folder: Path) -> None:
    """Checks that a checkpoint's tokenizer has the vocabulary of the one in `folder`: token by token, not by size.

    Raises:
        StageError: they differ.
    """
    theirs = published_tokenizer(repository).get_vocab()
    ours = published_tokenizer(str(folder)).get_vocab()
    if theirs != ours:
        changed = sorted(set(theirs.items()) ^ set(ours.items()))[:3]
        raise StageError(
            f"{repository} has another vocabulary than the tokenizer of this ladder ({len(theirs):,} and {len(ours):,} "
            f"tokens; the first differences: {changed}). Students are distilled on their teachers' logits, so use "
            "teachers that share a tokenizer."
        )


def check_roles(repository: str, folder: Path) -> None:
    """Checks that the tokens which end texts, and the other special ones, are still those of the copy in `folder`.

    Raises:
        StageError: they differ. Texts were packed with the copy, and its roles are no part of a folder's identity.
    """
    theirs, ours = published_tokenizer(repository), published_tokenizer(str(folder))
    now, before = ((t.eos_token, sorted(t.all_special_tokens)) for t in (theirs, ours))
    if now != before:
        raise StageError(
            f"the special tokens of {repository} have changed since this store packed texts with its tokenizer: the "
            f"end-of-text token was {before[0]!r}, all of them {before[1]}; now {now[0]!r}, {now[1]}. Restore "
            "tokenizer_config.json, or use another store."
        )


def _from_hub(load: Any, repository: str) -> Any:
    """Loads something from the hub or a folder; what is missing or gated says what to accept or fetch.

    Raises:
        StageError: it cannot be loaded.
    """
    try:
        return load(repository)
    except UserError:
        raise
    except Exception as error:  # a broken file raises errors of many libraries; the hub's own are OSErrors
        if Path(repository).is_dir():
            said = first_line(error)
            raise StageError(f"{repository} cannot be loaded: {said} Copy or download the folder again.") from error
        raise StageError(f"{repository} cannot be loaded: {hub_problem(error, repository)}") from error


def fetch(named: str) -> Path:
    """Downloads a checkpoint's safetensors, configs and tokenizer to the hub's cache, and returns where.

    Args:
        named: ORG/NAME or ORG/NAME@REVISION.

    Raises:
        StageError: it cannot be downloaded.
    """
    repository, _, revision = named.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    files = [*FILES, "tokenizer*", "*.model", "merges.txt"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (HFValidationError, HTTPError, OSError) as error:
        raise StageError(f"{repository} cannot be fetched: {hub_problem(error, repository)}") from error


def save_model(model: Any, folder: Path, *, leads: bool = True) -> None:
    """Saves weights and config as plain transformers loads them; of several ranks, the one that leads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    kept = dict(model.named_parameters()) | dict(model.named_buffers())  # tied ones once
    if any(isinstance(p, DTensor) for p in kept.values()):
        # Gathering is collective: every rank takes part, though one alone saves.
        state = {name: whole(t).cpu() for name, t in model.state_dict().items() if name in kept}
        if leads:
            model.save_pretrained(folder, state_dict=state)
    elif leads:
        model.save_pretrained(folder)


def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """Last hidden states of tokens [B, T], which the output matrix is applied to; position t predicts token t + 1.

    All positions [B, T, D]; of an encoder–decoder, trained as a prefix language model (Raffel et al. 2020, §3.2.3), the
    last T − ⌊T/2⌋: the encoder reads the first ⌊T/2⌋ + 1 tokens, and the decoder predicts each token after them.
    They lie where the tokens do, wherever the model's first and last layers are.
    """
    given = tokens.to(model.device)
    found = model.last_states(given) if is_sharded(model) else last_states(model, given)
    return found.to(tokens.device)


def is_sharded(model: Any) -> bool:
    """Whether each rank holds its share of the model (`placing.py`): a forward pass then is for all ranks."""
    return isinstance(model, FSDPModule)


def last_states(model: Any, tokens: Tensor) -> Tensor:
    """The forward pass of `hidden_states`."""
    if model.config.is_encoder_decoder:
        return _decoder_states(model, tokens)
    # The base model alone: the loss applies the output matrix in chunks, so logits [B, T, V] never exist.
    found = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    if (factor := logit_factor(model.config)) != 1.0:
        found = found * factor
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return found if bias is None else torch.cat([found, torch.ones_like(found[..., :1])], -1)


def predicted(model: Any, length: int) -> int:
    """How many labels of a sequence of `length` have a hidden state: always the last ones."""
    return length - length // 2 if model.config.is_encoder_decoder else length


def _decoder_states(model: Any, tokens: Tensor) -> Tensor:
    """What `model(input_ids=prefix, labels=rest)` multiplies by its output matrix, the last label not needed."""
    prefix, rest = tokens.tensor_split([tokens.shape[1] // 2 + 1], dim=1)
    start = torch.full_like(tokens[:, :1], model.config.decoder_start_token_id)
    encoded = model.get_encoder()(input_ids=prefix).last_hidden_state
    found = model.get_decoder()(
        input_ids=torch.cat([start, rest], dim=1), encoder_hidden_states=encoded, use_cache=False
    ).last_hidden_state
    scaled = getattr(model.config, "scale_decoder_outputs", False)  # T5's way to tie its embeddings
    return found * model.config.hidden_size**-0.5 if scaled else found


def output_weight(model: Any) -> Tensor:
    """The output matrix [V, D]; the embedding itself where the two are tied. A sharded one is gathered.

    A bias is one more column, [V, D + 1], that meets a one in each hidden state.
    """
    output = model.get_output_embeddings()
    weight, bias = whole(output.weight), getattr(output, "bias", None)
    return weight if bias is None else torch.cat([weight, whole(bias)[:, None]], 1)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters by name, tied ones once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
