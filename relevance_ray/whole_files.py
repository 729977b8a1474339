"""Files put in place whole: a reader sees nothing, or the old content, or all of the new.

`create_exclusive` is what exactly-once stands on: of any number of writers one creates the file (a hard link on disk,
`If-None-Match` on S3), and each learns whether it was the one, also where the answer to its request was lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from relevance_ray.file_systems import error_code, is_remote, opened

PART_BYTES = 16 * 2**20
"""What of a streamed file is held in memory, and sent to S3 at once."""

READ_AHEAD_BYTES = 2**20

_CONFLICT_CODES = ("ConditionalRequestConflict", "OperationAborted", "409")
_CONFLICT_SECONDS = (0.1, 0.5, 1.0, 2.0)
# S3 answers 409 while another's write to the same place is under way, and wants the request anew; no library does that.


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file: a reader sees the old content or the new, never a part."""
    if is_remote(path):
        with opened(path) as (fs, inner):
            fs.pipe_file(inner, data)
        return
    temporary = _write_temporary(path, data)
    os.replace(temporary, path.removeprefix("file://"))


def create_exclusive(path: str, data: bytes) -> bool:
    """Create a whole file only where none is yet; False where another was first. `data` must be unique to its writer: on
    S3 that is what tells the writer's own retried request from another's."""
    if is_remote(path):
        with opened(path) as (fs, inner):
            return _create_remote(fs, inner, data)
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path.removeprefix("file://"))
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def _create_remote(fs: Any, inner: str, data: bytes) -> bool:
    for wait in (*_CONFLICT_SECONDS, None):
        try:
            fs.pipe_file(inner, data, mode="create")
            return True
        except OSError as error:
            code = error_code(error)
            if code in _CONFLICT_CODES and wait is not None:
                time.sleep(wait)
                continue
            # From a store that does not name the condition that failed, s3fs makes no FileExistsError.
            if not isinstance(error, FileExistsError) and code not in ("PreconditionFailed", "412"):
                raise
        with contextlib.suppress(FileNotFoundError):  # what stood there may be gone again
            # A retried request may lose against its own first try: what counts is whose content stands there.
            return bool(fs.cat_file(inner) == data)
    return False


def _write_temporary(path: str, data: bytes) -> str:
    folder, name = os.path.split(os.path.abspath(path.removeprefix("file://")))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with _naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Give an error of the disk that names no file, as that of a full one does, the name of this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


@contextlib.contextmanager
def reading(path: str) -> Iterator[IO[bytes]]:
    """A file to be read in places, without the rest of it."""
    with opened(path) as (fs, inner), fs.open(inner, "rb", block_size=READ_AHEAD_BYTES) as file:
        yield file


@contextlib.contextmanager
def streamed(path: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file at a path that nobody else writes, once the block ends well. On disk the file
    grows in sight, so its path must mean nothing yet; on S3 it is not there before its last part is."""
    if not is_remote(path):
        path = path.removeprefix("file://")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with _naming(path), open(path, "wb") as local:
            yield local
            local.flush()
            os.fsync(local.fileno())
        return
    with opened(path) as (fs, inner):
        file = fs.open(inner, "wb", block_size=PART_BYTES)
        try:
            yield file
        except BaseException:
            file.closed = True  # to close it would be to finish it
            if file.mpu is not None:
                with contextlib.suppress(FileNotFoundError):  # discarded by a request whose answer was lost
                    file.discard()
            raise
        size = file.tell()
        try:
            file.close()
        except FileNotFoundError:
            # The upload was finished by a request whose answer was lost; to the next try, it is no longer there.
            if not fs.exists(inner) or fs.size(inner) != size:
                raise


class HashingStream(io.RawIOBase):
    """A stream to write to that passes all on to another.

    Attributes:
        digest: BLAKE2b-128 of what was written.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest = stream, hashlib.blake2b(digest_size=16)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self._stream.tell()

    def flush(self) -> None:
        """Nothing: what is written goes on at once, and a flush of S3's stream would be a part too small."""
