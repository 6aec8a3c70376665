"""The stage `tokens`: every split as a memory-mapped stream of token ids."""

from capacity_gap.data import packing
from capacity_gap.data.corpus import SPLITS, read_texts
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun


def tokens_stage(corpus: Stage, tokenizer: Stage) -> Stage:
    """The corpus in this tokenizer's tokens."""
    return Stage("tokens", 1, {}, {"corpus": corpus, "tokenizer": tokenizer}, pack_tokens)


def pack_tokens(run: StageRun) -> None:
    """Encodes each split, and counts the bytes that each token id stands for."""
    from capacity_gap.data.tokenizer import bytes_per_id, load_tokenizer

    tok = load_tokenizer(run.inputs["tokenizer"])
    for i, split in enumerate((*SPLITS, "ood")):
        packing.pack(read_texts(run.inputs["corpus"], split), tok, run.out / split)
        run.runtime.report(i + 1, 4, "splits")
    write_json(run.out / "bytes_per_id.json", bytes_per_id(tok))
