"""A disk without room, whoever says so."""

import errno
import os
import pathlib

# Full; beyond the user's quota; beyond the largest file that is allowed.
_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def lacking(error: Exception, path: pathlib.Path) -> OSError | None:
    """Returns what `error` says of a lack of room, in a line; None if it doesn't.

    Libraries raise other errors with the system's words inside, some pages long.

    Args:
      path: what was being written, if the error names no file.
    """
    if isinstance(error, OSError):
        name = error.filename or str(path)
        found = [error.errno] if error.errno in _ERRORS else []
    else:
        name = str(path)
        found = [number for number in _ERRORS if os.strerror(number) in str(error)]
    return OSError(found[0], os.strerror(found[0]), name) if found else None
