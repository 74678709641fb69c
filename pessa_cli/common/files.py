"""Sizes of files that a user names."""

from __future__ import annotations

import stat
from pathlib import Path


def file_size(path: Path) -> int:
    """Return the size of a regular file in bytes, following symbolic links.

    Raises OSError if the path is a folder, pipe or device: reading one of those may block or never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status.st_size
