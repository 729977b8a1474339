"""What a user can mend, in one sentence.

`UserError` carries a sentence that names the file, row or key and the way out. The command line prints it without a
traceback and exits with code 2; anything else that escapes is our fault and keeps its traceback.
"""

from __future__ import annotations

import errno

_WRONG_PATH = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class UserError(Exception):
    """Something the user can mend: a missing file, an unknown grade, a mistyped key."""


def what_to_mend(error: BaseException) -> str:
    """The sentence for the user who can mend an error; empty for what is our fault."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, _WRONG_PATH):
        return f"{error.filename}: {error.strerror}; give a path that can be read or written there"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room, and the same command goes on"
    return ""
