"""Teachers larger than one device: their layers on several devices of one process, or a share of each on every rank."""

import warnings
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from capacity_gap.models.loading import hidden_states, is_sharded, is_tied, last_states, load_model
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import StageError

ROOM_FOR_STUDENT = "balanced_low_0"  # the first device holds as little as it can: the student is there too


def load_teacher(folder: Path, runtime: Runtime) -> Any:
    """The model of `folder`, for reading: where `family.placement` says."""
    if runtime.shards_teachers:
        mesh = init_device_mesh(runtime.device.partition(":")[0], (runtime.ranks.size,))
        # In turns: else a machine's memory would hold as many whole teachers as it has ranks.
        return runtime.ranks.in_turns(lambda: shard(load_model(folder), mesh))
    if runtime.placement == "devices":
        return spread(folder, runtime.device)
    return load_model(folder, device=runtime.device)


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """Keeps this rank's share of every parameter, on the mesh's device, a layer at a time; in place.

    In a forward pass each layer is gathered before it runs and let go after it; embeddings and norms stay gathered
    until it ends. An output matrix of its own is gathered where it is used (`output_weight`).
    """
    # The layers of some architectures give views, and FSDP warns of writing into them; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    keep = partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    layers = set(model._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in layers]:
        keep(module)
    if not is_tied(model):
        keep(model.get_output_embeddings())
    keep(model)
    # What gathers is bound to `forward`, which makes logits too; nothing here wants all of them at once.
    model.last_states = MethodType(last_states, model)
    register_fsdp_forward_method(model, "last_states")
    return model


def spread(folder: Path, device: str) -> Any:
    """The model of `folder` with its layers on all devices of this process.

    Raises:
        StageError: it does not fit there; on the CPU or on disk it would compute for ever.
    """
    model = load_model(folder, device_map=ROOM_FOR_STUDENT)
    if not hasattr(model, "hf_device_map"):  # transformers notes several devices only
        model.hf_device_map = {"": str(model.device)}
    if left := sorted({str(place) for place in model.hf_device_map.values()} & {"cpu", "disk"} - {device}):
        raise StageError(
            f"the model of {folder} does not fit on the devices of this process: layers were left on "
            f"{' and '.join(left)}. Use more devices per process, or several ranks: family.placement=ranks."
        )
    return model


@torch.no_grad()
def gathered_states(model: Any, tokens: Tensor) -> Tensor:
    """`hidden_states` of tokens [B, T] that all ranks of a sharded model have alike: each computes some of the rows."""
    if not is_sharded(model):
        return hidden_states(model, tokens)
    rank, size = dist.get_rank(), dist.get_world_size()
    share = -(-len(tokens) // size)
    mine = torch.arange(rank * share, (rank + 1) * share).clamp_max(len(tokens) - 1)  # too few: the last one again
    found = hidden_states(model, tokens[mine.to(tokens.device)]).contiguous()
    parts = [torch.empty_like(found) for _ in range(size)]
    dist.all_gather(parts, found)
    return torch.cat(parts)[: len(tokens)]
