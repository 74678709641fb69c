"""Files that a user names: whether they exist, their sizes, and how each is written, complete or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pessa_cli.common.errors import PessaError, UsageError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # os.rename of a folder, where something is already
TORCH_WRITING = ("inline_container", "StreamWriter", "iostream error")  # in the texts of torch.save's RuntimeErrors
TEMPORARY = ".pessa-"  # the beginning of the names of files that are being written


def is_there(path: Path) -> bool:
    """Return whether a path exists; a name that is too long for a file, or has a null character, does not.

    Raises OSError if that cannot be known, for example without permission for its folder.
    """
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def check_there(path: Path, hint: str) -> None:
    """Raise PessaError, with `hint`, if nothing is at a path that a user named."""
    if not is_there(path):
        raise PessaError(f"{path} does not exist", hint)


def check_file(path: Path, hint: str) -> None:
    """Raise PessaError if a path that a user named is not that of a regular file; `hint` is for one that is missing."""
    check_there(path, hint)
    if path.is_dir():
        raise PessaError(f"{path} is a folder, not a file", hint)
    if not path.is_file():  # a pipe, a socket or a device, which may never end
        raise PessaError(f"{path} is not a regular file", "copy what it holds into a file first")


def file_size(path: Path) -> int:
    """Return the size of a regular file in bytes, following symbolic links.

    Raises OSError if the path is a folder, pipe or device: reading one of those may block or never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status.st_size


def reason(error: OSError) -> str:
    """Return why the operating system refused, without the number and the path that `str` adds."""
    return error.strerror or str(error)


def disk_error(error: Exception) -> OSError | None:
    """Return the error of the operating system that another library reports as one of its own; None if it is none.

    safetensors raises SafetensorError with the number in its text, torch a RuntimeError of its writer of zip files, or
    of the C++ stream below it.
    """
    if found := re.search(r"\(os error ([0-9]+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if isinstance(error, RuntimeError) and any(part in str(error) for part in TORCH_WRITING):
        return OSError(f"torch could not write its file: {str(error).splitlines()[0]}")
    return None


def check_writable(path: Path, option: str, new: bool = False) -> None:
    """Raise an error if no file can be written at `path`, before the work whose result it is for.

    option: the option that named the path, for messages. new: also if there is a file already. Raises UsageError for
    such a path and for a folder that does not exist, and PessaError if the folder cannot be written to.
    """
    try:
        if not path.resolve().parent.is_dir():
            raise UsageError(f"{option} {path}: {path.parent} is not a folder", "create it first")
        if new and os.path.lexists(path):
            raise UsageError(f"{option} {path} exists already", "give another file, or delete that one")
        if path.exists() and not path.is_file():
            kind = "is a folder" if path.is_dir() else "is not a regular file"
            raise UsageError(f"{option} {path} {kind}", "give the name of a file in a folder that exists")
        _probe(path)
    except OSError as error:
        raise PessaError(
            f"{option} {path}: no file can be written there: {reason(error)}",
            "give a file in a folder you may write to",
        ) from error


def _probe(path: Path) -> None:
    """Raise OSError if the name is too long, or if no file can be created beside it."""
    with suppress(FileNotFoundError):
        path.lstat()
    probe = _beside(path.resolve())
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    probe.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}.partial")


@contextmanager
def whole_file(path: Path, option: str = "", new: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the `with` block ends, complete and flushed to disk.

    It is written under another name in the same folder, and renamed. After an error, `path` is as it was before. If
    `path` is a link, the file that it leads to is replaced. option: the option that named it, for messages. new: do not
    replace a file that has appeared there. Raises PessaError when the file cannot be written.
    """
    partial: Path | None = None
    try:
        target = path.absolute() if new else path.resolve()
        if target.exists() and not target.is_file():
            raise OSError("not a regular file")
        partial = _beside(target)
        with partial.open("xb") as file:
            if target.is_file():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            try:
                rename_new(partial, target)
            except FileExistsError as error:
                kept, partial = partial, None
                raise PessaError(
                    f"{path} has appeared during the run, and was left as it is", f"what was to be written is in {kept}"
                ) from error
        else:
            partial.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        hint = "free some space on the disk" if error.errno in FULL_DISK else "check its folder and the permissions"
        raise PessaError(f"cannot write {option and f'{option} '}{path}: {reason(error)}", hint) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_file(path: Path, content: bytes, option: str = "", new: bool = False) -> None:
    """Write a file as `whole_file` does, from its whole content."""
    with whole_file(path, option, new) as file:
        file.write(content)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that nothing has. Raises FileExistsError if something has this name."""
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if os.path.lexists(target):
        raise taken
    if source.is_dir():
        try:
            source.rename(target)  # fails if a file, or a folder with content, has appeared there meanwhile
        except OSError as error:
            if error.errno in OCCUPIED:
                raise taken from error
            raise
        return
    try:
        os.link(source, target)  # unlike a rename, this fails if a file has appeared there meanwhile
    except FileExistsError:
        raise
    except OSError:  # not every file system has links
        source.rename(target)
    else:
        source.unlink()


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where the file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
