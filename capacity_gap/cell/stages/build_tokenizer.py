"""The stages `tokenizer` (trained on the corpus, or published) and `vocabulary` (with a second script's tokens)."""

from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import RESULT
from capacity_gap.data.corpus import read_texts
from capacity_gap.data.sources import tokenizer_identity
from capacity_gap.models.axes import dims
from capacity_gap.models.folders import end_of_text
from capacity_gap.models.ladders import FOLDERS
from capacity_gap.settings.hashing import files_digest
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun


def tokenizer_stage(cell: ResolvedCell, corpus: Stage) -> Stage:
    """Byte-level BPE with the family's vocabulary, trained on the corpus; or the published one."""
    if cell.rung in cell.family.published:
        first = next(iter(cell.family.rungs))  # one for the whole ladder, so that all share their tokens
        options = {"repository": cell.tokenizer_of(first)}
        return Stage("tokenizer", 1, _identity(cell, first), {}, copy_published, options=options)
    given = {"vocab_size": dims(cell.base.rungs[cell.rung]).vocab}
    return Stage("tokenizer", 1, given, {"corpus": corpus}, train_on_corpus)


def _identity(cell: ResolvedCell, first: str) -> dict[str, Any]:
    """What a published tokenizer is known by: of the user's own checkpoints its file, whichever model it came with.

    Folders that students are cut from are known by all their content, as they always were.
    """
    own = cell.family.checkpoints.get(first)
    if own is None or (cell.family.name == FOLDERS and cell.start is None):
        return cell.source(first)
    file = own.folder / "tokenizer.json"
    if not file.is_file():  # in a plan
        return {"tokenizer": None}
    return {"tokenizer": files_digest([file]), "end": end_of_text(own.folder)}


def vocabulary_stage(cell: ResolvedCell, corpus: Stage, tokenizer: Stage) -> Stage:
    """The family's tokenizer with the tokens of a second script."""
    c = cell.config.expand
    given: dict[str, Any] = {"vocab": c.vocab}
    if c.tokenizer is not None:
        given["second"] = tokenizer_identity(c.tokenizer, c.revision)
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    return Stage("vocabulary", 2, given, inputs, add_second_script, options={"expand": c})


def train_on_corpus(run: StageRun) -> None:
    """Trains byte-level BPE on the training split."""
    from capacity_gap.data.tokenizer import train_tokenizer

    train_tokenizer(read_texts(run.inputs["corpus"], "train"), run.config["vocab_size"], run.out)


def copy_published(run: StageRun) -> None:
    """Copies the tokenizer that came with the models."""
    from capacity_gap.models.loading import copy_tokenizer

    copy_tokenizer(run.options["repository"], run.out)


def add_second_script(run: StageRun) -> None:
    """Adds a second script's tokens, learnt from the training split or taken from another tokenizer."""
    from capacity_gap.data.expand_tokenizer import expand_tokenizer, text_per_token
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.models import loading

    name, revision = run.options["expand"].tokenizer, run.options["expand"].revision
    tokens = expand_tokenizer(
        run.inputs["tokenizer"],
        run.out,
        size=run.config["vocab"],
        texts=read_texts(run.inputs["corpus"], "train"),
        second=loading.published_tokenizer(name, revision) if name else None,
    )
    held_out = list(read_texts(run.inputs["corpus"], "test"))
    spent = {
        when: text_per_token(load_tokenizer(folder), held_out)
        for when, folder in (("before", run.inputs["tokenizer"]), ("after", run.out))
    }
    write_json(run.out / RESULT, {**spent, "tokens": tokens, "second": name})
