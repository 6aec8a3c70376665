"""The Hugging Face hub, through `huggingface_hub` alone: files for plans, and what to say where there are none.

Its environment variables hold: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE. Imports no torch.
"""

from functools import lru_cache
from pathlib import Path

from capacity_gap.settings.errors import ConfigError, first_line

PLANNED_WITH = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@lru_cache(maxsize=256)
def planning_files(repository: str, revision: str | None) -> Path:
    """The folder, named by its commit, with what planning reads of a repository: a few megabytes, fetched once.

    Raises:
        ConfigError: the repository, the revision or the network is not there, or its licence was not accepted.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(PLANNED_WITH)))
    except Exception as error:  # the client raises errors of several libraries
        raise ConfigError(cause(repository, error)) from error


def cause(repository: str, error: Exception) -> str:
    """Why something of a repository cannot be had, and what to do."""
    from huggingface_hub import errors

    fetch = f"`python -m capacity_gap fetch {repository}` on a machine with a network that shares its cache (HF_HOME)"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated: accept its licence on its page of the hub, then log in with `hf auth login` or "
            "set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no repository {repository}, or it is private; nor is there a folder of that name here. Check "
            "the name, and log in with `hf auth login` if it is private."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no such revision. Give a branch, a tag or a commit of it: ORG/NAME@REVISION."
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError):
        return (
            f"{repository} is not in this machine's cache, and the hub cannot be reached; nor is there a folder of "
            f"that name here. Run {fetch}."
        )
    return (
        f"{repository} cannot be loaded from the hub: {first_line(error)} If this machine has no network, run {fetch}."
    )
