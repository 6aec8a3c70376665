"""What a training run computes on: Hugging Face Accelerate, and the precision of its arithmetic."""

from typing import Any

import torch

from capacity_gap.runtime.process import Runtime


def make_accelerator(runtime: Runtime, precision: str, student: Any) -> Any:
    """Hugging Face Accelerate, set up afresh: one process trains many models, not always alike.

    With several ranks: data-parallel, or with `train.sharding=fsdp` sharded layer by layer.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from torch.distributed.fsdp import MixedPrecisionPolicy

    AcceleratorState._reset_state(reset_partial_state=False)
    plugin = None
    if runtime.sharding == "fsdp" and runtime.ranks.size > 1:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(student._no_split_modules),
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=MixedPrecisionPolicy(),  # autocast alone decides, as on one device
        )
    return Accelerator(
        cpu=runtime.device == "cpu", mixed_precision="bf16" if precision == "bf16" else "no", fsdp_plugin=plugin
    )


def autocast(device: str, precision: str) -> Any:
    """The context in which a model computes at `precision`."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")
