"""The stage `signal`: the teacher's outputs, cached for all students, seeds and losses that they can serve."""

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import packed_split
from capacity_gap.data import packing
from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.models import accounting
from capacity_gap.store.files import CRC
from capacity_gap.store.stage import Stage, StageRun


def signal_stage(cell: ResolvedCell, teacher: Stage, tokens: Stage, *, budget: int) -> Stage:
    """The teacher's outputs on the first tokens of the training permutation; `budget` counts all epochs."""
    c = cell.config
    seen = budget // c.epochs
    given = {
        "kind": c.distill.signal,
        "size": cell.signal_size,
        "temperature": c.distill.temperature,
        "tokens": seen,
        "seed": c.teacher_seed,
        **({"offset": cell.data_offset} if cell.data_offset else {}),
        **cell.arithmetic,
        **SIGNALS.entry(c.distill.signal).identity_as("kind"),
    }
    cost = accounting.forward_flops(cell.teacher_shape, seen)
    options = {"batch_size": c.evaluate.batch_size}
    inputs = {"teacher": teacher, "tokens": tokens}
    return Stage("signal", 1, given, inputs, cache_signal, cost, options, passes=seen, collective=cell.shards_teachers)


def cache_signal(run: StageRun) -> None:
    """Writes a few values a token, block by block; whole blocks are what the next owner takes over."""
    from capacity_gap.distill.signals import write_signal
    from capacity_gap.models.placing import load_teacher
    from capacity_gap.training.accelerator import autocast

    given, packed = run.config, packed_split(run, "train")
    together = run.runtime.ranks if run.runtime.together else None
    # A rank that only helps is told the place of the one that leads, and writes nothing there.
    blocks = run.checkpoint / "step-0" if run.runtime.ranks.leads else run.out

    def on_block(done: int, total: int) -> None:
        run.runtime.report(done, total, "blocks")
        run.runtime.check()

    write_signal(
        load_teacher(run.inputs["teacher"], run.runtime),
        packed,
        packing.subset(packed, given["tokens"], skip=given.get("offset", 0)),
        blocks,
        kind=given["kind"],
        size=given["size"],
        temperature=given["temperature"],
        seed=given["seed"],
        batch_size=run.options["batch_size"],
        vocabulary=len(packed.bytes_per_id),
        autocast=lambda: autocast(run.runtime.device, given["precision"]),
        ranks=together,
        on_block=on_block,
    )
    if not run.runtime.ranks.leads:
        return
    # A block's entropy says that it is whole: whoever is killed here leaves none that only seems so.
    for file in sorted(blocks.iterdir(), key=lambda file: "entropy" not in file.name):
        if file.suffix != CRC:  # a finished stage lists its files with their hashes
            file.rename(run.out / file.name)
