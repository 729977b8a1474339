"""The one exception for what a user can mend.

`UserError` carries one sentence that names the file, row or key and the way out. The command line prints it without a
traceback and exits with code 2; anything else that escapes is our fault and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a missing file, an unknown grade, a mistyped key."""
