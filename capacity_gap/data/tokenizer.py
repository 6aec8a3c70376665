"""Byte-level BPE, trained here; saved as plain transformers loads it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from capacity_gap.data.token_bytes import kind_of, proved, token_bytes

END = "<|endoftext|>"
SAMPLE_BYTES = 8_000_000  # merges of a small vocabulary do not change with more text


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Trains byte-level BPE with `vocab_size` entries, of which id 0 is the end of a text, and saves it to `out`.

    Every byte is in the vocabulary, so any text round-trips. Equal texts give an equal tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)
    wrapped.save_pretrained(out)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    """Every other text until the sample is full: a spread over the whole corpus rather than its beginning."""
    taken = 0
    for i, text in enumerate(texts):
        if i % 2 == 0 and taken < SAMPLE_BYTES:
            taken += len(text)
            yield text


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def bytes_per_id(tokenizer: Any) -> list[int | None]:
    """UTF-8 bytes that each id stands for, 0 for special ones; `None` for those, or for all, whose bytes are not known.

    Summed over a text without unknown characters they are the text's bytes; `token_bytes` says what is not so exact.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: nothing says what its tokens stand for
        return [None] * (max(tokenizer.get_vocab().values()) + 1)
    content = json.loads(backend.to_str())
    special = set(tokenizer.all_special_tokens)
    named = {token for role, token in tokenizer.special_tokens_map.items() if role != "unk_token"}
    lengths = token_bytes(content, special, named | special - {tokenizer.unk_token})
    kind = kind_of(content)
    known = kind is not None and proved(lengths, tokenizer, prepends=kind.prepends)
    return lengths if known else [None] * len(lengths)
