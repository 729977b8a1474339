"""Folders that appear whole, and count once a JSON file beside them is there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relevance_ray.storage import is_remote, join, listdir, makedirs, publish_folder, remove_tree, write_json

_PREFIX = ".making-"


@contextlib.contextmanager
def appears_whole(root: str, name: str, about: dict[str, Any]) -> Iterator[Path]:
    """A local path to make a folder at, which then appears as `name` under a root, local or s3://; `name`.json, which says
    what `about` holds by then, is written after it."""
    # Staged on the file system it is published to, where publishing is one rename.
    parent = None if is_remote(root) else root.removeprefix("file://")
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True) as staging:
        folder = Path(staging) / "made"
        yield folder
        publish_folder(folder, join(root, name))
    write_json(join(root, f"{name}.json"), about)


def sweep_staging(root: str) -> None:
    """Make a root where it is missing, and remove what a killed run left half-made; only for the holder of the lease."""
    makedirs(root)
    for name in listdir(root):
        if name.startswith(_PREFIX):
            remove_tree(join(root, name))
