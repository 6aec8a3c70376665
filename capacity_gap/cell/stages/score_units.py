"""The stage `scores`: the importance of every unit of the teacher that a student is cut from."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import ignored_in_gradients, packed_split
from capacity_gap.data import packing
from capacity_gap.models import accounting
from capacity_gap.models.axes import architecture_identity, dims
from capacity_gap.pruning.methods import LAYER_SCORES, SCORES
from capacity_gap.store.stage import Stage, StageRun

BACKWARD = 3  # forward passes that one with its gradients takes as long as


def scores_stage(cell: ResolvedCell, teacher: Stage, shape: Mapping[str, Any], tokens: Stage) -> Stage:
    """Scores of a model of this shape on the first sequences of the training permutation."""
    c = cell.config.prune
    given = {"method": c.method, "batches": c.batches, "batch_size": cell.score_batch, **cell.arithmetic}
    method = SCORES.entry(c.method)
    given |= method.identity_as("method")
    if c.calibration:
        given["calibration"] = c.calibration
    if method.traits["seeded"]:
        given["seed"] = cell.config.seed
    if method.traits["embedding_gradients"]:
        given |= ignored_in_gradients(cell, shape)
    seen = c.batches * cell.score_batch * cell.sequence_length
    passes, cost = BACKWARD * seen, accounting.train_flops(shape, seen)
    if cell.layer_score:
        layers = LAYER_SCORES.entry(cell.layer_score)
        given |= {"layers": cell.layer_score} | layers.identity_as("layers")
        forward = seen * (layers.traits["passes"] or dims(shape).layers)
        passes, cost = passes + forward, cost + accounting.forward_flops(shape, forward)
    given |= architecture_identity(shape)
    inputs = {"teacher": teacher, "tokens": tokens}
    return Stage("scores", 1, given, inputs, score_units, cost, passes=passes, collective=cell.shards_teachers)


def score_units(run: StageRun) -> None:
    """Scores every unit, and where they are cut by score every layer."""
    import torch

    from capacity_gap.models.placing import load_teacher
    from capacity_gap.pruning.proof import check_proved

    given = run.config
    model = load_teacher(run.inputs["teacher"], run.runtime)
    check_proved(model.config.to_dict())
    packed = packed_split(run, "train")
    chosen = _calibration(packed, given["batches"] * given["batch_size"], given.get("calibration", 0))

    def batches() -> Iterator[Any]:
        for part in chosen.reshape(given["batches"], given["batch_size"]):
            yield torch.from_numpy(packed.batch(part)).to(run.runtime.device)

    by = given.get("layers")
    passes = (LAYER_SCORES.entry(by).traits["passes"] or dims(model.config).layers) if by else 0
    whole = (BACKWARD + passes) * given["batches"]

    def tell(done: int) -> None:
        run.runtime.report(min(done, whole), whole, "passes")

    found = SCORES[given["method"]](
        model, batches(), seed=given.get("seed", 0), on_batch=lambda done: tell(BACKWARD * done)
    )
    if by:
        reread = Reread(batches(), lambda done: tell(BACKWARD * given["batches"] + done))
        found = dataclasses.replace(found, layers=LAYER_SCORES[by](model, reread))
    found.save(run.out)


class Reread(list):
    """Batches that a score of layers reads once or for each layer: says before each how many were read."""

    def __init__(self, batches: Iterable[Any], on_batch: Callable[[int], None]) -> None:
        super().__init__(batches)
        self.read, self.on_batch = 0, on_batch

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.on_batch(self.read)
            yield batch
            self.read += 1


def _calibration(packed: Any, count: int, which: int) -> Any:
    """The indices of the `which`-th run of `count` sequences in the training permutation."""
    needed = (which + 1) * count * packed.sequence_length
    return packing.subset(packed, needed, key="prune.calibration, in tokens")[-count:]
