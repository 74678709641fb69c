"""Sizes of files that a user names."""

from __future__ import annotations

import stat
from pathlib import Path


def file_size(path: Path) -> int:
    """The bytes of a file, links followed. Raises OSError for what is none: a folder, a pipe, a device.

    Those may answer a read with nothing, for ever, or without end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status.st_size
