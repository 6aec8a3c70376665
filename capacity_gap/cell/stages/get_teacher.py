"""The stages `teacher` (pre-trained here), `published`, `expand` (rows for new tokens) and `adapt` (trained on)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell, teacher_tokens
from capacity_gap.cell.stages.run_training import optimizer_identity, run_training, training_stage
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.models.axes import dims
from capacity_gap.models.checkpoints import Checkpoint
from capacity_gap.store.stage import Stage, StageRun

ALONE = DistillConfig(kd_weight=0.0)  # a teacher has no teacher


def pretrained_stage(cell: ResolvedCell, rung: str, tokens: Stage) -> Stage:
    """A teacher as the ladder has it: published, or pre-trained on `tokens`."""
    c, shape = cell.config, cell.base.rungs[rung]
    if rung in cell.family.published:
        given = {"shape": shape, **cell.source(rung), "dtype": c.family.dtype}
        given["quantization"] = c.family.quantization
        return published_stage("published", given, cell.family.published[rung], cell.family.checkpoints.get(rung))
    budget = teacher_tokens(c, cell.base.params[rung])
    return _trained_here(cell, "teacher", shape, tokens, seed=c.teacher_seed, budget=budget)


def published_stage(name: str, given: dict[str, Any], repository: str, own: Checkpoint | None) -> Stage:
    """A stage that points to a checkpoint, or holds the numbers of a GGUF file."""
    options = {"repository": repository, "revision": own.revision if own else None}
    return Stage(name, 1, given, {}, dequantise_gguf if own and own.is_gguf else point_to_published, options=options)


def start_stage(cell: ResolvedCell, tokens: Stage) -> Stage:
    """A student of its own shape, trained here before it has a teacher: the same under every teacher."""
    seed, budget = cell.config.seed, cell.start_tokens
    return _trained_here(cell, "start", cell.student_shape, tokens, seed=seed, budget=budget)


def _trained_here(
    cell: ResolvedCell, name: str, shape: Mapping[str, Any], tokens: Stage, *, seed: int, budget: int
) -> Stage:
    """A model of this shape, trained from random weights as the family's are."""
    c = cell.config.family
    given = {"shape": shape, "seed": seed, "tokens": budget, "epochs": c.teacher_epochs}
    given |= optimizer_identity(c.pretrain, dims(shape).hidden)
    return training_stage(cell, name, given, {"tokens": tokens}, pretrain, shape)


def expanded_stage(cell: ResolvedCell, rung: str, model: Stage, vocabulary: Stage) -> Stage:
    """A teacher with rows for the tokens of a second script."""
    rows = dims(cell.family.rungs[rung]).vocab
    return Stage("expand", 1, {"rows": rows}, {"model": model, "vocabulary": vocabulary}, expand)


def adapted_stage(cell: ResolvedCell, rung: str, model: Stage, tokens: Stage) -> Stage:
    """A teacher trained on."""
    c, shape = cell.config, cell.family.rungs[rung]
    given = {"tokens": cell.adapt_tokens, "epochs": c.adapt.epochs, "seed": c.teacher_seed}
    given |= optimizer_identity(c.adapt.optim, dims(shape).hidden)
    inputs = {"model": model, "tokens": tokens}
    return training_stage(cell, "adapt", given, inputs, adapt, shape, held=cell.teacher_dtype)


def point_to_published(run: StageRun) -> None:
    """Checks a teacher that is there already, on the hub or in a folder, against its rung, then points to it."""
    from capacity_gap.models.loading import point_to

    point_to(
        run.options["repository"],
        run.out,
        revision=run.options["revision"],
        shape=run.config["shape"],
        dtype=run.config["dtype"],
        quantization=run.config["quantization"],
    )


def dequantise_gguf(run: StageRun) -> None:
    """Turns the quantised weights of a GGUF file into ordinary ones, which the stage then holds."""
    from capacity_gap.models.gguf_files import dequantise, licence
    from capacity_gap.models.loading import DTYPES, point_to_itself

    given, file = run.config, Path(run.options["repository"])
    dequantise(file, run.out, dtype=DTYPES[given["dtype"]])
    held = {"dtype": given["dtype"], "quantization": given["quantization"]}
    point_to_itself(run.out, file=file.name, licence=licence(file), **held)


def pretrain(run: StageRun) -> None:
    """Trains a teacher from random weights on the training split."""
    from capacity_gap.models.loading import new_model

    run_training(run, new_model(run.config["shape"], run.config["seed"]), distill=ALONE)


def expand(run: StageRun) -> None:
    """Adds rows for the new tokens to the embedding and the output matrix."""
    from capacity_gap.data.expand_tokenizer import PARTS
    from capacity_gap.models.expand_embeddings import expand_checkpoint
    from capacity_gap.models.loading import checkpoint_folder

    new = json.loads((run.inputs["vocabulary"] / PARTS).read_text())
    expand_checkpoint(
        checkpoint_folder(run.inputs["model"]),
        run.out,
        first=new["first"],
        parts=new["parts"],
        rows=run.config["rows"],
        on_shard=lambda done, total: run.runtime.report(done, total, "shards"),
    )


def adapt(run: StageRun) -> None:
    """Continues a teacher's pre-training on the text that its students will learn."""
    from capacity_gap.models.loading import load_model

    # Published weights are held in bf16, but never trained so: the optimiser's small steps would round to nothing.
    run_training(run, load_model(run.inputs["model"]).float(), distill=ALONE)
