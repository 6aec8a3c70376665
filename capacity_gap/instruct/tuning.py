"""TRL's trainers on our models: supervised fine-tuning and DPO, of all weights or of low-rank adapters.

TRL takes seconds to import, so it is imported where it is used.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.runtime.process import Interrupted, Runtime, take
from capacity_gap.settings.errors import StageError

LOG_EVERY = 5  # steps between points of the history


@dataclass(frozen=True)
class Tuning:
    """What one run of a trainer does, whatever it trains on."""

    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float
    max_length: int
    lora_rank: int
    seed: int
    precision: str
    micro_batch: int
    activation_checkpointing: bool = False


def fine_tune(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    tuning: Tuning,
    *,
    packing: bool,
    neftune: float,
    runtime: Runtime,
    scratch: Path,
) -> tuple[Any, list[dict]]:
    """Trains `model` on rows of ids, of which only those with a label count in the loss.

    Args:
        model: a causal language model; changed in place.
        tokenizer: the one that the ids are of.
        rows: `{"input_ids": […], "labels": […]}`, as `chat.encoded` makes them of conversations.
        tuning: how long, how fast.
        packing: several rows in one sequence, none of which sees another.
        neftune: noise on the embeddings, α/√(T·D) at most (Jain et al. 2023, arXiv 2310.05914); 0 for none.
        runtime: device, progress, interruption.
        scratch: where the trainer may write.

    Returns:
        The trained model, adapters merged, and the logged points.
    """
    with _trl() as trl:
        from datasets import Dataset

        settings = trl.SFTConfig(
            **_arguments(tuning, runtime, scratch),
            packing=packing,
            packing_strategy="bfd",
            eval_packing=False,
            neftune_noise_alpha=neftune or None,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=_on_one_device(settings, runtime.device),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            peft_config=_lora(tuning.lora_rank),
        )
        return _run(trainer, runtime)


def prefer(
    model: Any,
    reference: Any,
    tokenizer: Any,
    pairs: Sequence[dict],
    tuning: Tuning,
    *,
    beta: float,
    runtime: Runtime,
    scratch: Path,
) -> tuple[Any, list[dict]]:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290):

        −log σ(β·[log π(y⁺|x)/π₀(y⁺|x) − log π(y⁻|x)/π₀(y⁻|x)]),  π₀ the reference.

    `pairs` are rows `{"prompt": [turns], "chosen": [turn], "rejected": [turn]}`. With adapters the reference is the
    model without them, and `reference` may be None. Returns as `fine_tune` does; points have `rewards/margins`.
    """
    with _trl() as trl:
        from datasets import Dataset

        trainer = trl.DPOTrainer(
            model=model,
            ref_model=None if tuning.lora_rank else reference,
            args=_on_one_device(trl.DPOConfig(**_arguments(tuning, runtime, scratch), beta=beta), runtime.device),
            train_dataset=Dataset.from_list(list(pairs)),
            processing_class=tokenizer,
            peft_config=_lora(tuning.lora_rank),
        )
        return _run(trainer, runtime)


def _arguments(tuning: Tuning, runtime: Runtime, scratch: Path) -> dict[str, Any]:
    """What both trainers take: our optimiser settings; no files, no trackers, no bars of their own."""
    micro = min(tuning.micro_batch, tuning.batch_size)
    if tuning.batch_size % micro:
        raise StageError(f"a batch of {tuning.batch_size} does not split into micro-batches of {micro}.")
    return {
        "output_dir": str(scratch),
        "num_train_epochs": tuning.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": tuning.batch_size // micro,
        "learning_rate": tuning.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": tuning.warmup,
        "max_length": tuning.max_length,
        "seed": tuning.seed,
        "bf16": tuning.precision == "bf16",
        "use_cpu": runtime.device == "cpu",
        "gradient_checkpointing": tuning.activation_checkpointing,
        "logging_steps": LOG_EVERY,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _on_one_device(settings: Any, device: str) -> Any:
    """The settings, for one device: of several a trainer would use all, and multiply the batch by their number.

    Reading them has made the first GPU this process's own, whichever it was given.
    """
    import torch

    settings._n_gpu = 1
    if device.startswith("cuda"):
        take(device)
        settings.__dict__["_setup_devices"] = torch.device(device)  # the cached property behind `device`
    return settings


def _lora(rank: int) -> Any:
    """Adapters on every linear map, scaled by 2 (α = 2·rank); None to train all weights."""
    if not rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise StageError("lora_rank needs the extra: pip install 'capacity_gap[instruct]'.") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _run(trainer: Any, runtime: Runtime) -> tuple[Any, list[dict]]:
    from transformers.trainer_callback import PrinterCallback, TrainerCallback

    class Watching(TrainerCallback):
        """Reports the trainer's progress, and stops it when the process is asked to end."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            runtime.report(state.global_step, state.max_steps, "steps")
            control.should_log = control.should_log or state.global_step == state.max_steps
            control.should_training_stop = control.should_training_stop or runtime.stop.is_set()
            return control

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watching())
    trainer.train()
    if runtime.stop.is_set():
        raise Interrupted
    points = [point for point in trainer.state.log_history if "loss" in point]
    model = trainer.model
    model = (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).eval()
    model.config.use_cache = True  # trainers switch it off for good; answers are slow without
    return model, points


@contextlib.contextmanager
def _trl() -> Iterator[Any]:
    """Imports TRL with telemetry and progress bars off."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
        import trl
    except ImportError as error:
        raise StageError("instruction tuning needs the extra: pip install 'capacity_gap[instruct]'.") from error
    quiet = logging.getLogger("trl")
    level, bars = quiet.level, datasets.are_progress_bars_disabled()
    quiet.setLevel(logging.ERROR)  # it warns of packing without FlashAttention: tests show that no attention crosses
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL uses names that transformers is about to retire
            yield trl
    finally:
        quiet.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
