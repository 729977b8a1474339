"""Which file system a path lies on, how long it is waited for, and what is said when it fails.

A labeling job makes many small requests for days, so each must neither hang for long nor give up at the first error.
Requests to S3 are retried here alone; what fails in spite of that is a `StorageError`, which ends a run that the same
command continues.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from http.client import IncompleteRead
from typing import Any

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, ClientError

from relevance_ray.errors import UserError

CONNECT_SECONDS, READ_SECONDS = 5, 15
"""How long an S3 that says nothing is waited for, once the whole request is sent, before it is asked again."""

_MODE, _ATTEMPTS, _ROUNDS = "standard", 6, 3
# botocore's tries at one request, 6 in its `standard` mode, which waits up to 1, 2, 4, 8 and 16 s between them and leaves
# off once a process fails too often (`legacy`, its default, has no such brake); and how often s3fs does all that for an
# answer that is throttled, late or cut short, since botocore does not see where an answer is cut within its body. With the
# defaults, 5 times 5 and squared for a read, a store that hangs can hold one read for half an hour; with these it is given
# up in five minutes, and a store that refuses is waited for three quarters of a minute.

_FAILURES = (OSError, BotoCoreError, ClientError, aiohttp.ClientError, IncompleteRead)


class StorageError(UserError):
    """A store failed, or did not answer, in spite of retries."""


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[Any, str]]:
    """The file system of a path and the path within it.

    Raises:
        UserError: no such kind of path.
        StorageError: from the block, for what a remote file system could not do; that a file is not there, or is there
            already, comes as the `FileNotFoundError` or `FileExistsError` that it is, and so does all of a local disk.
    """
    fs, inner = _open(path)
    try:
        yield fs, inner
    except (FileNotFoundError, FileExistsError):
        raise
    except _FAILURES as error:
        if not is_remote(path):
            raise
        raise StorageError(
            f"{path} failed in spite of retries ({why(error)}); see to the store, and run again"
        ) from error


def why(error: BaseException) -> str:
    """What a store said, on one line, without the credentials that an endpoint's address may hold."""
    said = re.sub(r"(?<=//)[^/\s@]+@", "", getattr(error, "strerror", None) or str(error))
    return " ".join(said.split()) or type(error).__name__


def error_code(error: BaseException) -> str:
    """The S3 code ("SlowDown", "404") behind an error of the file system; empty where none is known."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _open(path: str) -> tuple[Any, str]:
    if not is_remote(path):
        return fsspec.filesystem("file"), os.path.abspath(path.removeprefix("file://"))
    try:
        if not path.startswith("s3://"):
            return fsspec.core.url_to_fs(path)
        fs, inner = fsspec.core.url_to_fs(path, use_listings_cache=False, config_kwargs=_client_config())
    except (ValueError, ImportError) as error:
        raise UserError(
            f"storage path {path!r} cannot be opened ({error}); use a local folder or s3://bucket/prefix"
        ) from error
    fs.retries = _ROUNDS
    return fs, inner


def _client_config() -> dict[str, Any]:
    """botocore's configuration, without what the environment sets: a value given here would win over it."""
    retries: dict[str, Any] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        retries["mode"] = _MODE
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = _ATTEMPTS
    own = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": retries}
    return own | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
