"""Files of the Hugging Face hub for plans, through `huggingface_hub` alone.

Its environment variables hold: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE. Imports no torch.
"""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from capacity_gap.models.hub_errors import hub_problem
from capacity_gap.settings.errors import ConfigError

PLANNED_WITH = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja")


class NotHad(ConfigError):
    """A repository of the hub is not available now; it may be later, or on another machine."""


@lru_cache(maxsize=256)
def planning_files(repository: str, revision: str | None) -> Path:
    """The folder, named by its commit, with what planning reads of a repository: a few megabytes, fetched once.

    Raises:
        NotHad: the repository, the revision or the network is not there, or its licence was not accepted.
    """
    from huggingface_hub import snapshot_download

    try:
        with _without_bars():
            return Path(snapshot_download(repository, revision=revision, allow_patterns=list(PLANNED_WITH)))
    except Exception as error:  # the client raises errors of several libraries
        raise NotHad(f"{repository} cannot be loaded: {hub_problem(error, repository)}") from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars for files of some kilobytes."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
