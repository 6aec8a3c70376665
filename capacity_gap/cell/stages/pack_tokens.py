"""The stage `tokens`: every split as a memory-mapped stream of token ids."""

from capacity_gap.data import packing
from capacity_gap.data.corpus import SPLITS, read_texts
from capacity_gap.settings.errors import StageError
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun


def tokens_stage(corpus: Stage, tokenizer: Stage, *, bos: bool | None) -> Stage:
    """The corpus in this tokenizer's tokens; `bos`: every sequence begins with the token that begins a text."""
    return Stage("tokens", 1, {"bos": True} if bos else {}, {"corpus": corpus, "tokenizer": tokenizer}, pack_tokens)


def pack_tokens(run: StageRun) -> None:
    """Encodes each split, and counts the bytes that each token id stands for."""
    from capacity_gap.data.tokenizer import bytes_per_id, load_tokenizer

    tok = load_tokenizer(run.inputs["tokenizer"])
    begin = tok.bos_token_id if run.config.get("bos") else None
    if run.config.get("bos") and begin is None:
        raise StageError("corpus.bos=true, but the tokenizer names no token that begins a text. Say corpus.bos=false.")
    for i, split in enumerate((*SPLITS, "ood")):
        packing.pack(read_texts(run.inputs["corpus"], split), tok, run.out / split, begin=begin)
        run.runtime.report(i + 1, 4, "splits")
    write_json(run.out / "bytes_per_id.json", bytes_per_id(tok))
