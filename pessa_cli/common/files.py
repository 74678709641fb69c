"""Whether files that a user names exist, and their sizes."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


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


def file_size(path: Path) -> int:
    """Return the size of a regular file in bytes, following symbolic links.

    Raises OSError if the path is a folder, pipe or device: reading one of those may block or never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status.st_size
