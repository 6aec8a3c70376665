"""Training checkpoints: parameters and optimiser state as safetensors, the rest as JSON; whole or absent, no pickle."""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from capacity_gap.settings.errors import Damaged
from capacity_gap.store.files import checkpoints, let_others_read, note_crc, read_json, sync, sync_all

log = logging.getLogger(__name__)
STATE = ("exp_avg", "exp_avg_sq", "step")


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict], *, leads: bool
) -> None:
    """Writes `folder/step-<step>` and then removes older ones. All ranks gather; the one that leads writes."""
    tensors = _tensors(model, optimizer, keep=leads)
    if not leads:
        return
    folder.mkdir(parents=True, exist_ok=True)
    beside, final = folder / f".step-{step}.tmp", folder / f"step-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_file(tensors, beside / "state.safetensors")
    (beside / "state.json").write_text(json.dumps({"step": step, "history": history}))
    for file in list(beside.iterdir()):
        note_crc(file)
    let_others_read(beside)
    sync_all(beside)  # else a crash of the machine could leave the name without the content
    os.rename(beside, final)
    sync(folder)
    for old in checkpoints([folder]):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict]]:
    """Restores the furthest checkpoint below `folder`; returns the next step and the history, (0, []) without one."""
    for found in checkpoints([folder]):
        try:
            tensors, state = _read(found, model)
        except (Damaged, SafetensorError, OSError) as error:
            log.warning("%s is skipped: %s", found, error)
            continue
        _restore(tensors, model, optimizer)
        return state["step"], state["history"]
    return 0, []


def _read(folder: Path, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """The whole content of a checkpoint; raises before anything of `model` is changed."""
    state = read_json(folder / "state.json", {"step": int, "history": list})
    tensors = load_file(folder / "state.safetensors")
    if lacking := [n for n, _ in _named(model) for kind in ("param", *STATE) if f"{kind}/{n}" not in tensors]:
        raise Damaged(folder / "state.safetensors", f"lacks {len(lacking)} tensors, such as those of {lacking[0]}")
    return tensors, state


def _restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, parameter in _named(model):
            parameter.copy_(_like(tensors[f"param/{name}"], parameter))
            state = {key: tensors[f"{key}/{name}"] for key in STATE}
            # A fused optimiser keeps its step counter on the parameter's device.
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key == "step" else _like(value, parameter).clone()
                for key, value in state.items()
            }


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole; only one at a time is so on a device."""
    tensors = {}
    for name, parameter in _named(model):
        state = {"param": parameter.detach()} | {k: torch.as_tensor(optimizer.state[parameter][k]) for k in STATE}
        for kind, tensor in state.items():
            gathered = whole(tensor)  # by all ranks together
            if keep:
                tensors[f"{kind}/{name}"] = gathered.cpu().contiguous()
    return tensors


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, gathered from all ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(full: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, sharded as `parameter` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements)
    return full.to(parameter.device)
