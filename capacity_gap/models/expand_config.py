"""Settings of vocabulary expansion."""

import re
from dataclasses import dataclass

from capacity_gap.settings.checks import need
from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError

CONTENT = "`settings` by the tokenizer's content"


@dataclass
class ExpandConfig:
    """More tokens, those of a second script, for every teacher of the ladder before it is adapted.

    They are learnt from the text that teachers are adapted to, or taken from a second tokenizer.
    """

    vocab: int = setting(0, "Vocabulary size after expansion; 0: no expansion.", least=0, most=10**7)
    multiple: int = setting(64, "Pad the rows of the embedding matrices to a multiple of this.", least=1, most=2**16)
    tokenizer: str | None = setting(
        None, "Second tokenizer: a saved tokenizer's folder, or its name on the hub.", untold=CONTENT
    )
    revision: str | None = setting(None, "The hub commit of expand.tokenizer.", later=True, untold=CONTENT)

    def __post_init__(self) -> None:
        validate("expand", self)
        if self.tokenizer is not None and not self.vocab:
            raise ConfigError(
                f"expand.tokenizer={self.tokenizer} needs expand.vocab=, the vocabulary size after expansion."
            )
        if self.revision is not None:
            commit = re.fullmatch("[0-9a-f]{40}", self.revision) is not None
            need(commit, "expand.revision", self.revision, "a commit, 40 hexadecimal digits")
            need(self.tokenizer is not None, "expand.revision", self.revision, "given with expand.tokenizer= only")
