"""Whether the training texts are long enough: packed, collected, or estimated from their files. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from capacity_gap.cell.pipeline import Cell
from capacity_gap.data.sources import size
from capacity_gap.models.axes import dims
from capacity_gap.runner.plan_lines import about, format_bytes
from capacity_gap.settings.errors import Damaged
from capacity_gap.settings.scales import format_scale
from capacity_gap.store.files import read_json
from capacity_gap.store.stage import Stage, Store

# Bytes a token of byte-level BPE by the size of its vocabulary. Measured: 2.89 with 1,024 tokens on the embedded prose.
# Of larger ones as reported for English by the families that publish them; code and other scripts have fewer.
BYTES_PER_TOKEN = {4_096: 2.9, 65_536: 4.0, 10**9: 4.4}


@dataclass(frozen=True)
class Want:
    """The most that one setting asks of a training text."""

    setting: str
    tokens: int  # in all passes
    epochs: int
    each: int  # in one pass, whole sequences, with those before it
    length: int
    stage: Stage  # the packed text
    cell: Cell


def text_lines(cells: Sequence[Cell], store: Store) -> list[str]:
    """For each training text what one pass must hold, and what it holds or seems to hold."""
    return [_line(want, store) for want in _wants(cells)]


def _wants(cells: Sequence[Cell]) -> Iterator[Want]:
    most: dict[tuple[str, int], Want] = {}
    for cell in cells:
        length = cell.sequence_length
        for stage, tokens, epochs, setting, skip in cell.budgets:
            each = tokens // (length * epochs) * length + skip // length * length
            if (stage.key, length) not in most or each > most[stage.key, length].each:
                most[stage.key, length] = Want(setting, tokens, epochs, each, length, stage, cell)
    yield from most.values()


def _line(want: Want, store: Store) -> str:
    said = f"text: {want.setting} asks for {want.each:,} tokens a pass"
    if store.has(want.stage):
        try:
            packed = read_json(store.path(want.stage) / "train.json", {"tokens": int})["tokens"]
        except Damaged as error:
            return f"{said}; {error.file} {error.why}, so the corpus will be packed again"
        held = (packed - 1) // want.length * want.length
        return f"{said}, the corpus holds {held:,}" if want.each <= held else _short(want, f"{held:,} tokens")
    if not (found := _bytes(want, store)):
        return f"{said}; the corpus size is known after packing, before any model is trained"
    held, how = found
    ratio = next(r for most, r in BYTES_PER_TOKEN.items() if dims(want.cell.teacher_shape).vocab <= most)
    seems = f"about {about(held / ratio)} tokens ({format_bytes(held)} {how}, {ratio:g} bytes a token assumed)"
    return f"{said}, the text has {seems}" if want.each <= held / ratio else _short(want, seems)


def _short(want: Want, held: str) -> str:
    passes = f" in {want.epochs} passes" if want.epochs > 1 else ""
    return (
        f"warning: text too short: {want.setting}={format_scale(want.tokens)}{passes}, the text has {held}: "
        "those cells will fail"
    )


def _bytes(want: Want, store: Store) -> tuple[float, str] | None:
    """Bytes of the training split, and how they are known: counted where the corpus is collected, else estimated."""
    corpus = want.stage.inputs["corpus"]
    if store.has(corpus):
        try:
            return read_json(store.path(corpus) / "corpus.json", {"splits": dict})["splits"]["train"][
                "bytes"
            ], "counted"
        except (Damaged, KeyError, TypeError):
            return None
    source = corpus.options["source"]
    if (whole := size(source)) is None:
        return None
    return whole * (1 - source.validation - source.test), "to train on, from its files"
