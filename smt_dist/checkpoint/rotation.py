"""Find, verify and remove the checkpoint folders of a run."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from smt_dist.checkpoint.atomic import MANIFEST_FILE, VerifiedFolder, read_manifest, verify
from smt_dist.checkpoint.trainer_state import check_trainer_state
from smt_dist.checkpoint.training_state import OPTIMIZER_FILE, SCHEDULE_FILE
from smt_dist.distributed import from_main_process, get_rank, raise_on_any_rank
from smt_dist.errors import SMTError

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]{{1,18}})")
_LEFTOVER = re.compile(rf"\.{PREFIX_CHECKPOINT_DIR}-[0-9]{{1,18}}\.(saving|deleted)")


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """List all folders with a checkpoint's name by step, complete or not."""
    found = [(match, path) for path in Path(output_dir).glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if path.is_dir())]


def verify_checkpoint(folder: Path) -> VerifiedFolder:
    """Verify that a checkpoint is what was saved and can be gone on from; reads all its files.

    Raises:
        SMTError: what is wrong, with the file's name.
    """
    if not folder.is_dir():
        raise SMTError(f"{folder}: no such checkpoint folder")
    manifest = read_manifest(folder)
    if manifest is None:
        raise SMTError(f"{folder}: has no {MANIFEST_FILE}: no checkpoint, one of an older version, or cut short")
    verified = VerifiedFolder.about_to_be(folder, manifest)
    verify(folder, manifest)
    for name in (TRAINER_STATE_NAME, OPTIMIZER_FILE, SCHEDULE_FILE):
        if name not in manifest.files:
            raise SMTError(f"{folder}: has no {name}: there is nothing to go on from (--save_only_model)")
    check_trainer_state(folder)
    return verified


def last_checkpoint(output_dir: str) -> VerifiedFolder | None:
    """Find the newest checkpoint that is whole; a newer one that is damaged is logged.

    Raises:
        SMTError: there are checkpoints, all of them damaged: starting anew would throw the run away.
    """
    damaged: list[str] = []
    for folder in reversed(checkpoint_folders(output_dir)):
        try:
            manifest = read_manifest(folder)
            if manifest is not None and OPTIMIZER_FILE not in manifest.files:
                continue  # of --save_only_model: complete, but without the state that a resume needs
            found = verify_checkpoint(folder)
        except SMTError as error:
            logger.warning("checkpoint passed over: %s", error)
            damaged.append(str(error))
        else:
            if damaged:
                logger.warning("going on from %s instead", folder)
            return found
    if damaged:
        raise SMTError(f"{output_dir}: none of its checkpoints is whole ({damaged[0]}); to start anew, move them away")
    return None


def find_checkpoint(wanted: str | bool | VerifiedFolder | None, output_dir: str) -> VerifiedFolder | None:
    """Find the checkpoint that ``--resume_from_checkpoint`` means; collective.

    Rank 0 reads all its files once, and so does the first rank of each other node, whose disk may hold another copy;
    the others compare the files' sizes with what rank 0 has found.

    Args:
        wanted: one that was found before, which is given back; a folder; ``auto``: the newest that is whole, if there
            is any; ``true`` (or True): the newest, which has to exist; ``false``, ``none`` or None: none.
        output_dir: of the run.

    Raises:
        SMTError: it is damaged or missing, or a rank doesn't see it.
    """
    if isinstance(wanted, VerifiedFolder):
        return wanted
    flag = str(wanted).lower()
    if flag in ("false", "none"):
        return None

    def find() -> VerifiedFolder | None:
        if flag not in ("auto", "true"):
            return verify_checkpoint(Path(wanted))
        found = last_checkpoint(output_dir)
        if found is None and flag == "true":
            raise SMTError(f"--resume_from_checkpoint: {output_dir} holds no checkpoint")
        return found

    def see() -> VerifiedFolder | None:
        if found is None or get_rank() == 0:
            return found
        if not found.folder.is_dir():
            raise SMTError(f"{found}: rank 0 found a checkpoint there, this rank doesn't (is --output_dir shared?)")
        own = VerifiedFolder.about_to_be(found.folder, found.manifest)
        verify(found.folder, found.manifest, checksums=os.environ.get("LOCAL_RANK") == "0")
        return own

    found = from_main_process(find, "the checkpoint")
    return raise_on_any_rank(see, "the checkpoint")


def is_whole(folder: Path) -> bool:
    """Return whether all files of a checkpoint are there in full length; contents aren't read."""
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            verify(folder, manifest, checksums=False)
    except SMTError:
        return False
    return manifest is not None


def prune_checkpoints(output_dir: str | Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints beyond ``limit``, the damaged ones first.

    Args:
        output_dir: of the run.
        limit: ``--save_total_limit``; None or less than 1 keeps all.
        keep: never deleted, even if they are more: the one just saved, and the best.
    """
    if limit is None or limit < 1:
        return
    folders = checkpoint_folders(output_dir)
    # By time, not by step: a run that continues from an earlier step writes smaller numbers later.
    rank = {folder: (is_whole(folder), _saved_at(folder)) for folder in folders}
    excess = len(folders) - max(limit, len(keep))
    for folder in [folder for folder in sorted(folders, key=rank.get) if folder not in keep][: max(0, excess)]:
        _delete(folder)


def remove_leftovers(output_dir: str | Path) -> None:
    """Delete what a killed run left: half a save, or half a deletion."""
    for path in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _saved_at(folder: Path) -> tuple[int, int]:
    step = int(_NAME.fullmatch(folder.name)[1])
    manifest = folder / MANIFEST_FILE
    return (manifest.stat().st_mtime_ns if manifest.exists() else 0), step


def _delete(folder: Path) -> None:
    """Delete a folder, under another name first.

    A deletion that is cut short then leaves no half checkpoint.
    """
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
