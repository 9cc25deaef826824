"""Atomic writes of files, and the lock of a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from dfkd_fast.config import expand, require_file

__all__ = ["FolderInUseError", "WriteError", "atomic_write", "lock_folder", "make_folder", "write_file", "zip_damage"]

log = logging.getLogger(__name__)

_SUFFIX = ".partial"
_WRITABLE = "make the folder writable, or choose another one"
_REMEDIES = {
    errno.ENOSPC: "free space on this disk, or choose a folder on another one",
    errno.EDQUOT: "free space in the disk quota, or choose a folder on another disk",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose a folder on another file system",
    errno.EIO: "check the disk, or choose a folder on another one",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
}


class FolderInUseError(RuntimeError):
    """Another run writes to the folder."""


class WriteError(OSError):
    """A file could not be written, and its previous content is kept. The message gives the path and a remedy."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"

    @classmethod
    def of(cls, path: Path, error: OSError) -> WriteError:
        """Create the error for a path from the operating system's error."""
        remedy = _REMEDIES.get(error.errno or 0, "choose another folder")
        reason = error.strerror or str(error)
        return cls(error.errno or errno.EIO, f"{reason}; {remedy}", str(path))


class _RecordingFile(io.FileIO):
    """Keeps the error of a failed write, because torch.save replaces it by one without its reason."""

    error: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _create(partial: Path) -> _RecordingFile:
    """Create a temporary file and lock it until it is closed or the process dies."""
    while True:
        raw = _RecordingFile(partial, "wb")
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(raw, fcntl.LOCK_EX)
        if partial.exists():
            return raw
        raw.close()  # another process deleted it before it was locked


def _delete_abandoned(folder: Path, prefix: str) -> None:
    """Delete temporary files that no process has locked."""
    for name in os.listdir(folder):
        if name.startswith(prefix) and name.endswith(_SUFFIX):
            with contextlib.suppress(OSError), (folder / name).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / name).unlink()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing. At the end of the ``with`` block it is flushed to disk and replaces ``path``.

    After an error, or if the process dies, ``path`` is unchanged. Missing folders are created. Temporary files for the
    same ``path`` that killed processes left are deleted.

    Raises:
        WriteError: the file could not be written. The temporary file is deleted.
    """
    path = expand(path)
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}{_SUFFIX}")
    raw: _RecordingFile | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(path.parent, f".{path.name}.")
        raw = _create(partial)
        with io.BufferedWriter(raw) as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)  # while it is locked
        _sync_folder(path.parent)
    except Exception as error:
        cause = error if isinstance(error, OSError) else raw.error if raw is not None else None
        if cause is None:
            if isinstance(error.__context__, KeyboardInterrupt):  # torch.save replaces it by an error too
                raise error.__context__ from None
            raise
        raise WriteError.of(path, cause) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents, unless they exist, and return its expanded path.

    Raises:
        WriteError: it cannot be created.
    """
    path = expand(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError.of(path, error) from error
    return path


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk. Some file systems do not support this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: str | Path, content: bytes) -> Path:
    """Write a file atomically and return its expanded path. Missing folders are created.

    Raises:
        WriteError: the file could not be written; its previous content is kept.
    """
    with atomic_write(path) as file:
        file.write(content)
    return expand(path)


def zip_damage(path: Path) -> str | None:
    """Return what is damaged in a zip archive, such as the files of ``torch.save``, or None."""
    try:
        with zipfile.ZipFile(require_file(path)) as archive:
            broken = archive.testzip()
    except Exception as error:  # damaged headers raise many exception types
        return str(error)
    return None if broken is None else f"the checksum of its record {broken} does not match"


_locks: set[int] = set()


def _close_locks() -> None:
    """A forked process, such as a worker of a data loader, must not hold the lock after its parent dies."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run's folder against other runs, and delete temporary files of a run that was killed.

    The lock belongs to the process. It ends when the process ends, however that happens.

    Raises:
        FolderInUseError: another run holds the lock.
        WriteError: the lock's file cannot be opened.
    """
    path = folder / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise WriteError.of(path, error) from error
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            raise FolderInUseError(
                f"{folder} is in use by another run{f' ({owner})' if owner else ''}: wait until it ends, or choose "
                "another folder for out"
            ) from None
        except OSError as error:
            log.warning("%s: this file system has no locks (%s); do not start a second run here", folder, error)
        with contextlib.suppress(OSError):  # the lock also works on a full disk
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        for written in (folder, folder / "checkpoints", folder / "images"):
            if written.is_dir():
                _delete_abandoned(written, ".")
        yield
    finally:
        if descriptor in _locks:  # not in a forked process
            _locks.remove(descriptor)
            os.close(descriptor)
