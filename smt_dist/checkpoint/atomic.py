"""Save folders whole or not at all.

A save is written beside its target, with a manifest of sizes and SHA-256, synced, and then moved to its place.

A folder that doesn't exist yet appears by one rename. Where it exists (an output folder with an older adapter, a
checkpoint of the same step), the files come from a folder inside it, ``.smt_saving``, which is complete from the moment
that its manifest stands in it. A move that was cut short is finished by whoever reads the folder next: either all
files are the old ones or all are the new ones.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from smt_dist.config import parse_model
from smt_dist.errors import SMTError
from smt_dist.files import read_text

MANIFEST_FILE = "smt_manifest.json"
_INSIDE = ".smt_saving"
# Users edit it, and the package never reads it.
_FREE_FILES = frozenset({"README.md"})


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Annotated[int, Field(strict=True, ge=0)]  # bytes
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """List the files of a saved folder with their sizes and SHA-256.

    Attributes:
        format_version: of the folder's format.
        files: path inside the folder -> size and checksum, of all its files but the manifest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    files: dict[str, _Record] = Field(min_length=1)

    @field_validator("files")
    @classmethod
    def _inside_the_folder(cls, value: dict[str, _Record]) -> dict[str, _Record]:
        for name in value:
            parts = PurePosixPath(name).parts
            plain = name.isprintable() and "\\" not in name and "/".join(parts) == name
            if not parts or not plain or name.startswith("/") or ".." in parts or name == MANIFEST_FILE:
                raise ValueError(f"{name[:80]!r} is no name of a file inside the folder")
        return value


@dataclass(frozen=True)
class VerifiedFolder(os.PathLike):
    """Hold a saved folder whose content equals its manifest, so that it is compared once only.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
        stamps: file's name -> when it was written (ns) and its inode, as this rank saw it before it was compared.
    """

    folder: Path
    manifest: Manifest
    stamps: dict[str, tuple[int, int] | None]

    @classmethod
    def about_to_be(cls, folder: Path, manifest: Manifest) -> VerifiedFolder:
        """Note the files as they are; :func:`verify` compares them next."""
        return cls(folder, manifest, {name: _stamp(folder / name) for name in set(manifest.files) - _FREE_FILES})

    def check_unchanged(self) -> None:
        """Raise SMTError, naming the file, if one was written since the folder was verified."""
        for name, stamp in self.stamps.items():
            if _stamp(self.folder / name) != stamp:
                raise SMTError(f"{self.folder / name}: was changed after it was verified; does another run write here?")

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def __str__(self) -> str:
        return os.fspath(self.folder)


def write_manifest(folder: Path) -> Manifest:
    """Measure all files of ``folder`` and write its manifest; all are on the disk afterwards."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    files = {}
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = _Record(size=file.tell(), sha256=digest)
            os.fsync(file.fileno())
    for path in {path.parent for path in paths} | {folder}:
        _sync_folder(path)
    manifest = Manifest(files=files)
    beside = folder / f".{MANIFEST_FILE}"
    beside.write_text(json.dumps(manifest.model_dump(), indent=1) + "\n")
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, folder / MANIFEST_FILE)  # a manifest is whole as well
    _sync_folder(folder)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Read a saved folder's manifest, after finishing a move that was cut short.

    Returns:
        None if there is none.

    Raises:
        SMTError: it is damaged, or the move can't be finished.
    """
    _finish(folder)
    return _read(folder)


def verify(folder: Path, manifest: Manifest, names: Iterable[str] | None = None, checksums: bool = True) -> None:
    """Compare the files with their manifest: all sizes first, then the content.

    Args:
        folder: the save.
        manifest: its manifest.
        names: of files; default: all but the model card, which people edit.
        checksums: read the content; False looks at sizes only.

    Raises:
        SMTError: names the first file that is missing or not what was saved.
    """
    names = set(manifest.files) - _FREE_FILES if names is None else set(names)
    for name in sorted(names):
        path = folder / name
        if name not in manifest.files:
            raise SMTError(f"{path}: is not in {MANIFEST_FILE}: it doesn't belong to this save")
        try:
            found = path.stat()
        except OSError as error:
            raise SMTError(f"{path}: damaged: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device may never end
            raise SMTError(f"{path}: damaged: not a regular file")
        if (size := found.st_size) != (expected := manifest.files[name].size):
            raise SMTError(f"{path}: damaged: {size:,} bytes, but {expected:,} were saved")
    for name in sorted(names) if checksums else ():
        if _digest(folder / name) != manifest.files[name].sha256:
            raise SMTError(f"{folder / name}: damaged: its content isn't what was saved (SHA-256)")


class Save:
    """Write a folder that replaces ``target`` when it is complete; on one rank.

    Raises:
        OSError: from :meth:`begin` and :meth:`commit`; ``target`` is what it was then.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target / _INSIDE if target.is_dir() else target.with_name(f".{target.name}.saving")
        self._begun = False

    def begin(self) -> None:
        """Make the folder, empty: what an earlier save left there is gone."""
        if self.target.is_dir():
            _finish(self.target)
        elif self.target.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.target))
        self._begun = True
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    def commit(self) -> None:
        """Write the manifest and put everything in place."""
        write_manifest(self.folder)
        if self.folder.parent != self.target:
            os.rename(self.folder, self.target)
            _sync_folder(self.target.parent)
        else:
            _finish(self.target)
        self._begun = False

    def close(self) -> None:
        """Remove what wasn't committed."""
        # From its manifest on it is the save: a move that failed half-way is finished by the next reader.
        if self._begun and not (self.folder.parent == self.target and (self.folder / MANIFEST_FILE).exists()):
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def saving(target: str | Path) -> Iterator[Path]:
    """Yield a folder to write into, whose files replace ``target``'s at the end, all or none.

    To be called on one rank.
    """
    save = Save(Path(target))
    try:
        save.begin()
        yield save.folder
        save.commit()
    finally:
        save.close()


def _finish(folder: Path) -> None:
    """Finish a move that was cut short. Several processes may do so at once."""
    inside = folder / _INSIDE
    try:
        _refuse_outside(inside, folder)
        manifest = _read(inside)
    except SMTError:
        if (inside / MANIFEST_FILE).exists():
            raise
        manifest = None  # another process has just finished
    if manifest is None:
        return
    old = _old_files(folder) - set(manifest.files)  # no longer a part of it
    try:
        for name in manifest.files:
            _refuse_outside((inside / name).parent, folder)
            _refuse_outside((folder / name).parent, folder)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _move(inside / name, folder / name)
        for name in old:
            _refuse_outside((folder / name).parent, folder)
            (folder / name).unlink(missing_ok=True)
        _sync_folder(folder)
        _move(inside / MANIFEST_FILE, folder / MANIFEST_FILE)  # last: until then there is something to finish
        _sync_folder(folder)
    except OSError as error:
        raise SMTError(
            f"{folder}: its last save was cut short and can't be put in place ({error.strerror or error}); read it "
            "once where the folder is writable"
        ) from None
    shutil.rmtree(inside, ignore_errors=True)


def _refuse_outside(path: Path, folder: Path) -> None:
    """Refuse a link in a folder from elsewhere: files must not be moved through it."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SMTError(f"{path}: leads out of the folder")


def _move(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # moved already
        os.replace(source, target)


def _read(folder: Path) -> Manifest | None:
    path = folder / MANIFEST_FILE
    return parse_model(Manifest, read_text(path), str(path)) if path.exists() else None


def _old_files(folder: Path) -> set[str]:
    try:
        manifest = _read(folder)
    except SMTError:  # damaged: its files aren't known
        return set()
    return set(manifest.files) if manifest is not None else set()


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:  # verify reports what is wrong with it
        return None
    return found.st_mtime_ns, found.st_ino


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SMTError(f"{path}: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't sync a folder
            raise
    finally:
        os.close(handle)
