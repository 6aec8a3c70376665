"""GGUF files, which hold quantised weights, a config and a tokenizer in one: read with transformers and `gguf`.

Their weights become ordinary ones once, in the stage that a teacher or student is; planning needs the rest only.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import ConfigError, StageError, first_line, shown

GGUF = ".gguf"
PIP = "pip:"  # before the name of a package that brings a file: pip:PACKAGE/FILE.gguf
PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
IN_PARTS = "Some packages split a large file among their dependencies: see docs/real.md, Gemma."


def packaged(given: str) -> Path:
    """The file that `pip:PACKAGE/FILE.gguf` names, which an installed package brings. The package is not imported.

    Raises:
        ConfigError: the package is not installed, or has no such file.
    """
    package, _, name = given.removeprefix(PIP).partition("/")
    if package and not PACKAGE.fullmatch(package):
        raise ConfigError(
            f"{shown(given)}: {shown(package)} is no name of a package. Write {PIP}PACKAGE/FILE{GGUF}; names have "
            "letters, digits, and -_. between them."
        )
    try:
        listed = metadata.files(package) or [] if package else []
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{shown(given)}: the package {shown(package)} is not installed for {sys.executable}. Install it: `pip "
            f"install --no-deps {shown(package)}`. It is never imported, so its code needs no dependencies. {IN_PARTS}"
        ) from None
    found = [Path(str(file.locate())) for file in listed if name in (file.name, str(file)) and name.endswith(GGUF)]
    if not found:
        there = ", ".join(shown(file.name) for file in listed if file.suffix == GGUF)
        raise ConfigError(
            f"{shown(given)} names no file of an installed package, as {PIP}PACKAGE/FILE{GGUF} does. Files ending in "
            f"{GGUF} of {shown(package) if package else 'no package'}: {there or 'none'}."
            + (f" {IN_PARTS}" if package and not there else "")
        )
    return found[0]


def described(file: Path, digest: str) -> Path:
    """A folder with the config.json and tokenizer of a GGUF file, written once beside the hub's cache.

    Raises:
        ConfigError: the package `gguf` is missing, or transformers cannot read the file.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HOME) / "capacity_gap" / "gguf" / digest[:20]
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        try:
            _describe(file, beside)
            os.replace(beside, folder)
        except OSError:  # another process was first
            if not (folder / "config.json").is_file():
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _describe(file: Path, out: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    _need(file)
    where = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(file.parent, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:  # a broken file raises errors of many libraries
        raise ConfigError(f"{file} cannot be read as a GGUF file: {first_line(error)} Download it again.") from error
    tokenizer.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(_plain(config), indent=1), encoding="utf-8")


def _plain(config: Any) -> dict[str, Any]:
    """A config.json of the model as it is once its weights are ordinary numbers."""
    found = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    return json.loads(json.dumps(found, default=str))


def _need(file: Path) -> None:
    if find_spec("gguf") is None:
        raise ConfigError(f"{file} needs the package gguf: pip install 'capacity_gap[gguf]'.")


def licence(file: Path) -> str | None:
    """The licence that a GGUF file names in its header, such as `apache-2.0`; None if it names none."""
    from gguf import GGUFReader

    said = GGUFReader(file).fields.get("general.license")
    return str(said.contents()) if said is not None else None


def dequantise(file: Path, out: Path, *, dtype: Any) -> None:
    """Writes the model of a GGUF file to `out` as safetensors of type `dtype`, with config.json and tokenizer.

    Raises:
        StageError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    _need(file)
    logging.disable_progress_bar()
    where = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:
        raise StageError(f"{file} cannot be loaded: {first_line(error)} Download it again.") from error
    # What was loaded calls itself quantised and refuses to be saved: the same weights in a model that does not.
    config = type(loaded.config).from_dict(_plain(loaded.config))
    plain = type(loaded)(config).to(dtype)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
