"""Byte-level BPE, trained here; saved as plain transformers loads it."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
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

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def bytes_per_id(tokenizer: Any) -> list[int]:
    """UTF-8 bytes that each id stands for; 0 for special ones.

    In byte-level BPE each character of a token is a byte; in SentencePiece `▁` is a space and `<0x0A>` a byte.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))  # ids may skip some
    byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str().partition('"decoder"')[2][:400]
    width = len if byte_level else _sentencepiece_bytes
    return [0 if i in special or token is None else width(token) for i, token in enumerate(tokens)]


def _sentencepiece_bytes(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())
