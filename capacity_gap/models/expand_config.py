"""Settings of vocabulary expansion."""

import re
from dataclasses import dataclass, field

from capacity_gap.settings.checks import need, positive
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import LATER


@dataclass
class ExpandConfig:
    """More tokens for every teacher of the ladder before it is adapted: those of a second script.

    They are learnt from the text that teachers are adapted to, or taken from a second tokenizer.
    """

    vocab: int = 0  # tokens in all; 0: the family's own
    multiple: int = 64  # rows of the matrices are a multiple of this
    tokenizer: str | None = None  # a saved tokenizer's folder, or its name on the hub
    revision: str | None = field(default=None, metadata=LATER)  # the commit that such a name means

    def __post_init__(self) -> None:
        need(self.vocab >= 0, "expand.vocab", self.vocab, "zero (no expansion) or more")
        positive("expand", self, "multiple")
        if self.tokenizer is not None and not self.vocab:
            raise ConfigError(f"expand.tokenizer={self.tokenizer} needs expand.vocab=: how many tokens there will be.")
        if self.revision is not None:
            commit = re.fullmatch("[0-9a-f]{40}", self.revision) is not None
            need(commit, "expand.revision", self.revision, "a commit, 40 hexadecimal digits")
            need(self.tokenizer is not None, "expand.revision", self.revision, "given with expand.tokenizer= only")
