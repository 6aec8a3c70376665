"""What earlier owners of an unfinished stage left: checkpoints to go on from, and folders to clear up at its end."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from capacity_gap.store.files import checkpoints, is_whole, tell
from capacity_gap.store.lease import lives_here

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint"  # an owner's folder of checkpoints


def adopt_checkpoint(place: Path, checkpoint: Path) -> bool:
    """Moves the furthest whole checkpoint that an earlier owner left to this owner's folder; whether there is one.

    Checkpoints are folders `step-<number>`, each written whole (`checkpoint.save` renames them into place); one that a
    crash of the machine left empty or torn, or of which a byte has changed, is passed over. One is moved and not
    copied: a rename needs no room, and it either happens or not, whatever an owner does that comes back meanwhile.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    for found in checkpoints(place.glob(f"*/{CHECKPOINT}")):
        if not _is_sound(found):
            log.warning("%s is damaged: skipped", found)
            continue
        if found.parent == checkpoint:
            return True
        try:
            _move(found, checkpoint / found.name)
        except FileNotFoundError:
            continue  # another owner was faster
        except OSError as error:
            told = f"{found} cannot be taken over ({error.strerror or error}): work resumes from an earlier step"
            log.warning("%s", told)
            tell(told)
            continue
        return True
    return False


def _is_sound(checkpoint: Path) -> bool:
    try:
        return is_whole(checkpoint)
    except OSError:  # its owner has just removed it
        return False


def _move(found: Path, to: Path) -> None:
    try:
        os.rename(found, to)
    except PermissionError:  # another user's, which may be read only
        beside = to.with_name(f".{to.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(found, beside)
        os.rename(beside, to)
    for half in to.glob(".*"):  # an owner that comes back may still write into it: what is new has another inode
        half.unlink(missing_ok=True)


def leave(mine: Path) -> None:
    """Removes what an overtaken owner made, but for its checkpoints: its successor may have nothing else."""
    if not checkpoints([mine / CHECKPOINT]):
        shutil.rmtree(mine, ignore_errors=True)
        return
    for path in mine.iterdir():
        if path.name != CHECKPOINT:
            _remove(path)


def clear_up(before: Iterable[Path]) -> None:
    """Removes what earlier owners of a finished stage left, but for those that are stopped here: they clear up
    themselves when they go on.
    """
    for path in before:
        if not lives_here(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
