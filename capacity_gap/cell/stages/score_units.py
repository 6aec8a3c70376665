"""The stage `scores`: the importance of every unit of the teacher that a student is cut from."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import ignored_in_gradients, packed_split
from capacity_gap.data import packing
from capacity_gap.models import accounting
from capacity_gap.models.axes import dims
from capacity_gap.store.stage import Stage, StageRun


def scores_stage(cell: ResolvedCell, teacher: Stage, shape: Mapping[str, Any], tokens: Stage) -> Stage:
    """Scores of a model of this shape on the first sequences of the training permutation."""
    c = cell.config.prune
    given = {"method": c.method, "batches": c.batches, "batch_size": c.batch_size, **cell.arithmetic}
    if c.method == "random":
        given["seed"] = cell.config.seed
    if c.method in ("taylor", "movement"):  # they read the gradients of the embedding
        given |= ignored_in_gradients(cell, shape)
    seen = c.batches * c.batch_size * cell.config.corpus.sequence_length
    passes = 3 * seen
    if c.layers != "symmetric":
        given["layers"] = c.layers
        passes += seen * (1 if c.layers == "block_influence" else dims(shape).layers)
    inputs = {"teacher": teacher, "tokens": tokens}
    cost = accounting.train_flops(shape, seen)
    return Stage("scores", 1, given, inputs, score_units, cost, passes=passes)


def score_units(run: StageRun) -> None:
    """Scores every unit, and where they are cut by score every layer."""
    import torch

    from capacity_gap.models.loading import load_model
    from capacity_gap.pruning.scores import SCORES

    given = run.config
    model = load_model(run.inputs["teacher"], device=run.runtime.device)
    packed = packed_split(run, "train")
    chosen = packing.subset(packed, given["batches"] * given["batch_size"] * packed.sequence_length)

    def batches() -> Iterator[Any]:
        for part in chosen.reshape(given["batches"], given["batch_size"]):
            yield torch.from_numpy(packed.batch(part)).to(run.runtime.device)

    found = SCORES[given["method"]](
        model,
        batches(),
        seed=given.get("seed", 0),
        on_batch=lambda done: run.runtime.report(done, given["batches"], "batches"),
    )
    if by := given.get("layers"):
        from capacity_gap.pruning.layer_scores import LAYER_SCORES

        found = dataclasses.replace(found, layers=LAYER_SCORES[by](model, batches()))
    found.save(run.out)
