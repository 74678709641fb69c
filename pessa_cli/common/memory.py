"""Telling that memory ran out, which Python, torch and the operating system report in different ways."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed

# torch raises RuntimeError with these texts on the CPU, and a class of its own on accelerators.
TEXTS = re.compile(r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc", re.I)
MORE_MEMORY = "close other programs, or use a machine with more memory"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one of those that caused it, says that memory ran out."""
    return any(
        isinstance(cause, MemoryError)
        or type(cause).__name__ == "OutOfMemoryError"
        or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        or (isinstance(cause, RuntimeError) and TEXTS.search(str(cause)) is not None)
        for cause in _causes(error)
    )


def raise_if_out_of_memory(error: BaseException, what: str = "", hint: str = MORE_MEMORY) -> None:
    """Raise PessaError if memory ran out; `what` says what there was not enough memory to do."""
    if out_of_memory(error):
        reason = listed(str(error).splitlines(), most=1)
        raise PessaError(
            "not enough memory" + f" to {what}" * bool(what) + f"\n{reason}" * bool(reason), hint
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
