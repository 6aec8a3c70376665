"""What is checked before any model is trained: text for every budget, tasks, vocabularies, rows to tune on."""

from collections.abc import Iterable, Iterator

from capacity_gap.cell.pipeline import Cell
from capacity_gap.distill.divergences import LOSSES
from capacity_gap.evaluate.tasks import check_tasks
from capacity_gap.instruct.tuning_checks import check_extras, check_rows
from capacity_gap.models.axes import dims
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.stage import Store


def check_budgets(cell: Cell, store: Store, runtime: Runtime) -> None:
    """Raises, before any model is trained, if there are too few tokens for teacher or student, or no such task."""
    from capacity_gap.data.packing import Packed, subset

    _check_benchmarks(cell)
    _check_placement(cell, runtime)
    _check_models(cell)
    for want in cell.budgets:
        packed = Packed(store.compute(want.text, runtime) / "train", cell.sequence_length)
        subset(packed, want.tokens, epochs=want.epochs, key=want.setting, skip=want.skip)
    _check_vocabularies(cell, store, len(Packed(store.path(cell.tokens) / "train", 1).bytes_per_id))
    _check_tuning(cell, store, runtime)
    check_losses([cell], store)


def _check_benchmarks(cell: Cell) -> None:
    """Every task must be there, and its metrics the harness's own unless code may be run."""
    c = cell.config.evaluate
    check_tasks(c.benchmarks, c.folder)
    if c.folder and c.benchmarks and not c.allow_code_execution:
        from capacity_gap.evaluate.harness import forbid_foreign_metrics

        forbid_foreign_metrics(c.folder)


def _check_placement(cell: Cell, runtime: Runtime) -> None:
    """Ranks have a device each; one process may have all."""
    if cell.placement == "devices" and runtime.ranks.size > 1:
        raise ConfigError(
            f"family.placement=devices with {runtime.ranks.size} ranks: it spreads a teacher over the devices of one "
            "process. Use family.placement=ranks, or start the command without torchrun."
        )


def _check_models(cell: Cell) -> None:
    """transformers must be able to build the teacher, and the student that is cut from it."""
    from capacity_gap.models.building import check_builds

    for rung in {cell.rung, cell.origin} & set(cell.base.published):
        check_builds(cell.base.published[rung], cell.base.rungs[rung])
    check_builds(cell.start.source if cell.start else f"the student of {cell.config.student}", cell.student_shape)


def check_losses(cells: Iterable[Cell], store: Store) -> None:
    """Calls each loss of the user's once, on a few random numbers, before anything is planned or run.

    The package's own losses are tested; torch is loaded only where a cell that is not recorded uses another.

    Raises:
        ConfigError: a loss fails, or returns something else than its values and their gradient.
    """
    for name in dict.fromkeys(name for cell in cells for name in _losses_to_check(cell, store)):
        from capacity_gap.distill.check_loss import check_divergence

        check_divergence(name)


def _losses_to_check(cell: Cell, store: Store) -> Iterator[str]:
    distill = cell.config.distill
    if distill.kd_weight and not LOSSES.entry(distill.loss).is_ours and not store.has(cell.distilled):
        yield distill.loss


def _check_vocabularies(cell: Cell, store: Store, tokens: int) -> None:
    """Ids must mean the same to teacher and student, and every id must have its row in both output matrices."""
    from capacity_gap.models.loading import check_roles, check_tokenizer

    published = cell.family.published
    for rung in {cell.rung, cell.origin} & set(published):
        check_tokenizer(cell.tokenizer_of(rung), store.path(cell.base_tokenizer))
    if cell.start:
        check_tokenizer(cell.start.tokenizer, store.path(cell.base_tokenizer))
    if cell.rung in published:
        check_roles(cell.tokenizer_of(next(iter(published))), store.path(cell.base_tokenizer))
    for name, shape in (("teacher", cell.teacher_shape), ("student", cell.student_shape)):
        if dims(shape).vocab < tokens:
            raise ConfigError(
                f"the {name}'s vocabulary has {dims(shape).vocab:,} rows, its tokenizer {tokens:,} tokens. Rows may "
                "be padded but not missing: use the tokenizer that the model was trained with."
            )


def _check_tuning(cell: Cell, store: Store, runtime: Runtime) -> None:
    """Raises if an extra is missing or the rows of a cell that tunes cannot be used."""
    if all(store.has(stage) for stage in cell.tuned.values()):
        return
    c = cell.config
    check_extras(adapters=bool(c.instruct.lora_rank or c.prefer.lora_rank))
    made = store.compute(cell.instructions, runtime)
    check_rows(c.instruct, c.prefer, made, store.path(cell.tokenizer), dims(cell.student_shape).longest)
