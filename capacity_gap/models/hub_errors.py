"""Causes and remedies when a repository of the Hugging Face hub is unavailable. Imports no torch.

transformers wraps the errors of the hub's client in messages of its own; the client's exception classes, found behind
them, tell the causes apart.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import first_line, shown

_FETCH = "Or run `python -m capacity_gap fetch {}` on a machine with a network that shares this cache (HF_HOME)."


def hub_problem(error: BaseException, repository: str) -> str:
    """The cause of `error` and the remedy, in sentences that go on from "ORG/NAME cannot be loaded: "."""
    from huggingface_hub import errors

    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError)
    known: list[tuple[Any, Any]] = [  # the narrower class first: each is looked for behind the whole error
        (errors.GatedRepoError, _gated),
        (errors.RepositoryNotFoundError, _not_there),
        (errors.RevisionNotFoundError, _no_such_revision),
        (errors.HFValidationError, _no_name),
        (errors.RemoteEntryNotFoundError, _no_such_file),
        (errors.HfHubHTTPError, _refused),
        (unreachable, _unreachable),
    ]
    causes = list(_causes(error))
    for kind, said in known:
        if found := next((cause for cause in causes if isinstance(cause, kind)), None):
            return said(found, repository)
    disk = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno is not None), None)
    if disk is not None and not isinstance(disk, FileNotFoundError):
        return _unwritable(disk, repository)
    return _broken(error, repository)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those behind it, as a traceback would show them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _page(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def _gated(error: Any, repository: str) -> str:
    if error.response.status_code == 401:
        return (
            "it is gated, and this machine is not logged in to the hub. Accept its licence on "
            f"{_page(repository)}, then log in with `hf auth login` or set HF_TOKEN."
        )
    return (
        f"it is gated, and the account of this machine has no access. Request access on {_page(repository)}, and run "
        "again once it is granted. `hf auth whoami` shows the account; a fine-grained token must allow reading gated "
        "repositories."
    )


def _not_there(_error: Any, repository: str) -> str:
    return (
        f"it is not a local folder, and {_page(repository)} does not exist or is private. Check the name; for a "
        "private repository, log in with `hf auth login` as an account that may read it."
    )


def _no_such_revision(error: Any, repository: str) -> str:
    asked = re.search(r"/(?:resolve|revision|tree)/([^/]+)", error.response.url.path)
    given = asked[1] if asked else "of the name given"
    return f"it has no branch, tag or commit {given}. Use one listed on {_page(repository)}."


def _no_such_file(error: Any, repository: str) -> str:
    asked = re.search(r"/(?:resolve|tree)/[^/]+/(.+)", error.response.url.path)
    return f"it has no {asked[1] if asked else 'such file'}. {_page(repository)} lists its files."


def _no_name(_error: Any, _repository: str) -> str:
    return "this is neither a local folder nor a hub name of the form ORG/NAME. Check the spelling."


def _refused(error: Any, repository: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "the hub rejects this machine's token (401). Log in again with `hf auth login`, or unset HF_TOKEN."
    if status == 429:
        return "the hub rate-limits this machine (429). Wait some minutes, or log in with `hf auth login`."
    return f"the hub answers with an error ({status}), and {_in_cache(repository)}. Try again later."


def _unreachable(error: Any, repository: str) -> str:
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        why, remedy = "HF_HUB_OFFLINE is set", "Unset it (and TRANSFORMERS_OFFLINE) if there is a network."
    else:
        why = f"{constants.ENDPOINT} cannot be reached or drops the connection ({first_line(list(_causes(error))[-1])})"
        remedy = "Check the network and its proxy."
    return f"{why}, and {_in_cache(repository)}. {remedy} {_FETCH.format(repository)}"


def _unwritable(error: OSError, repository: str) -> str:
    where = f" ({error.filename})" if error.filename else ""  # a full disk has no name
    return (
        f"{error.strerror}{where}. Downloads are cached in {_cached(repository).parent}: free space there and check "
        "write permission, or set HF_HOME to another folder."
    )


def _broken(error: BaseException, repository: str) -> str:
    """Whatever else went wrong, most often a file that is missing on the hub, or missing or damaged in the cache."""
    from huggingface_hub import is_offline_mode

    said = shown(" ".join(f"{error}".split()) or type(error).__name__, most=240).rstrip(".")
    if is_offline_mode():
        said += f". HF_HUB_OFFLINE is set, and {_cached(repository)} may lack a file"
        return f"{said}. Unset it where there is a network. {_FETCH.format(repository)}"
    return (
        f"{said}. {_page(repository)} lists its files. If one is damaged in the cache, delete {_cached(repository)}: "
        "the next start downloads it again."
    )


def _cached(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


def _in_cache(repository: str) -> str:
    held = "holds only a part of it" if (_cached(repository) / "snapshots").is_dir() else "does not hold it"
    return f"the cache {_cached(repository).parent} {held}"
