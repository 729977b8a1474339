"""Local and S3 paths, commits and fingerprints.

Every path is a string, local or `s3://...`, and goes through fsspec; S3 credentials and endpoint come from the
environment alone. The trade-off: whole small objects and no appends, so that one primitive, the exclusive create of a
whole file (a hard link on disk, `If-None-Match` on S3), carries exactly-once. Readers trust commits and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.errors import UserError
from relevance_ray.file_systems import StorageError, error_code, is_remote, opened, why
from relevance_ray.whole_files import HashingStream, create_exclusive, streamed, write_bytes


def join(root: str, *parts: str) -> str:
    return "/".join([str(root).rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(path: str | Path) -> str:
    """A path that means the same wherever a process of this machine stands; that of a store as it is."""
    text = str(path)
    return text if is_remote(text) else os.path.abspath(text.removeprefix("file://"))


def exists(path: str) -> bool:
    with opened(path) as (fs, inner):
        return bool(fs.exists(inner))


def check_reachable(path: str) -> None:
    """Raise `UserError` where a bucket is not there, or a path not for us; nothing is asked of a local path."""
    if not is_remote(path):
        return
    try:
        with opened(path) as (fs, inner):
            fs.ls(inner, detail=False)
    except (FileNotFoundError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error
        if isinstance(cause, FileNotFoundError) and error_code(cause) != "NoSuchBucket":
            return  # nothing is there yet
        raise UserError(
            f"cannot reach {path} ({why(cause)}); make the bucket, or mend the endpoint and credentials in the environment "
            "(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        ) from error


def listdir(path: str) -> list[str]:
    """Sorted names directly inside a folder; empty where the folder does not exist."""
    with opened(path) as (fs, inner):
        try:
            names = fs.ls(inner, detail=False)
        except FileNotFoundError:
            return []
        return sorted(
            str(name).rstrip("/").rsplit("/", 1)[-1] for name in names if str(name).rstrip("/") != inner.rstrip("/")
        )


def file_sizes(path: str) -> dict[str, int]:
    """Name -> bytes of the files directly inside a folder."""
    with opened(path) as (fs, inner):
        infos = fs.ls(inner, detail=True)
    return {str(info["name"]).rsplit("/", 1)[-1]: int(info["size"]) for info in infos if info["type"] == "file"}


def makedirs(path: str) -> None:
    if not is_remote(path):
        os.makedirs(path.removeprefix("file://"), exist_ok=True)


def remove_tree(path: str) -> None:
    """Remove a file or folder with all it holds; nothing happens where there is none."""
    with opened(path) as (fs, inner), contextlib.suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)
        if is_remote(path) and fs.find(inner):  # s3fs says nothing of a file that a bulk delete left
            raise StorageError(f"{path} could not be removed; see to the store, and run again")


def remove_if_empty(path: str) -> None:
    """Remove a local folder that holds nothing; a store of objects has no such."""
    if not is_remote(path):
        with contextlib.suppress(OSError):
            os.rmdir(path.removeprefix("file://"))


def remove_file(path: str) -> None:
    """Remove one file; nothing happens where there is none."""
    with opened(path) as (fs, inner), contextlib.suppress(FileNotFoundError):
        fs.rm_file(inner)


def read_bytes(path: str) -> bytes:
    with opened(path) as (fs, inner):
        return bytes(fs.cat_file(inner))


def read_json(path: str) -> Any:
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def write_table(path: str, table: pa.Table) -> None:
    write_bytes(path, table_bytes(table))


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(io.BytesIO(read_bytes(path)), columns=columns)


def localize(path: str) -> Path:
    """A file or folder as a local path: itself where it is local, else a copy in the cache, kept by what it holds."""
    if not is_remote(path):
        return Path(path.removeprefix("file://"))
    check_reachable(path)
    if not exists(path):
        raise UserError(f"there is nothing at {path}; give a folder or file that is there")
    target = cache_folder() / "mirror" / fingerprint(path, content_id(path)) / path.rstrip("/").rsplit("/", 1)[-1]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
        with opened(path) as (fs, inner):
            if fs.isdir(inner):
                fs.get(inner.rstrip("/") + "/", f"{partial}/", recursive=True)
            else:
                fs.get_file(inner, str(partial))
        _put_in_place(partial, target)
    return target


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        os.replace(partial, target)
    except OSError:
        if not target.exists():
            raise
        remove_tree(str(partial))  # another process had the same copy ready first


def cache_folder() -> Path:
    """Where copies and converted weights are kept: `RELEVANCE_RAY_CACHE`, else `~/.cache/relevance_ray`."""
    return Path(os.environ.get("RELEVANCE_RAY_CACHE") or Path.home() / ".cache" / "relevance_ray")


def publish_folder(local: Path, path: str, last: str = "") -> None:
    """Put a finished local folder at its final path: by one rename on disk, by upload on S3, where the file `last`, if one
    is named, comes after all others and makes the folder count."""
    if is_remote(path):
        remove_tree(path)
        names = [file.relative_to(local).as_posix() for file in sorted(local.rglob("*")) if file.is_file()]
        first = [name for name in names if name != last]
        with opened(path) as (fs, inner):
            fs.put([str(local / name) for name in first], [f"{inner.rstrip('/')}/{name}" for name in first])
        if last:
            write_bytes(join(path, last), (local / last).read_bytes())
        return
    target = path.removeprefix("file://")
    remove_tree(target)
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    os.replace(local, target)


# Fingerprints


def fingerprint(*parts: Any) -> str:
    """12 hex digits over plain JSON values: the name of what was made from them."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def content_id(path: str) -> str:
    """Identity of what a file or folder holds: ETags on S3, BLAKE2b of the bytes on disk; "absent" where none is."""
    with opened(path) as (fs, inner):
        if not fs.exists(inner):
            return "absent"
        if is_remote(path):
            infos = fs.find(inner, detail=True) or {inner: fs.info(inner)}
            tags = [[name.removeprefix(inner), str(info.get("ETag"))] for name, info in sorted(infos.items())]
            return fingerprint(tags)
    files = sorted(file for file in Path(inner).rglob("*") if file.is_file()) if os.path.isdir(inner) else [Path(inner)]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(str(file.relative_to(inner)).encode() + b"\0")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


# Commits

_READ_AT_ONCE = 1000


def _read_files(folder: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of files in a folder, many at once from S3; those that are gone are left out."""
    if not is_remote(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield name, read_bytes(join(folder, name))
        return
    for start in range(0, len(names), _READ_AT_ONCE):
        part = names[start : start + _READ_AT_ONCE]
        with opened(folder) as (fs, inner):
            # Many at once: a hundred thousand one after the other would take an hour.
            found = fs.cat([f"{inner.rstrip('/')}/{name}" for name in part], on_error="return")
            for path, content in found.items():
                if isinstance(content, FileNotFoundError):
                    continue
                if isinstance(content, BaseException):
                    raise content
                yield path.rsplit("/", 1)[-1], content


class CommitLog:
    """The committed shards of one step folder.

    A shard's data file has an attempt-unique name in `data/`; the shard exists once `commits/<shard>.json` was created,
    by one exclusive create. Two attempts at a shard, on two machines that each think the other dead, leave one commit
    and one orphan; nobody reads the orphan, and `sweep` removes it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._records: dict[str, dict[str, Any]] = {}

    def committed(self) -> dict[str, dict[str, Any]]:
        """Shard name -> record (file, rows, checksum, fingerprint, and what the step added), in shard order."""
        names = [name for name in listdir(join(self.folder, "commits")) if name.endswith(".json") and name[0] != "."]
        unread = [name for name in names if name.removesuffix(".json") not in self._records]
        for name, content in _read_files(join(self.folder, "commits"), unread):
            self._records[name.removesuffix(".json")] = json.loads(content)
        return dict(sorted(self._records.items()))

    def commit(self, shard: str, table: pa.Table, fingerprint: str, extra: Mapping[str, Any] | None = None) -> bool:
        """Write a shard and commit it. False where another attempt had committed it first (ours becomes an orphan)."""
        return self._commit(shard, table, fingerprint, extra, instead_of=None)

    def replace(
        self, shard: str, table: pa.Table, fingerprint: str, extra: Mapping[str, Any] | None = None, *, instead_of: str
    ) -> bool:
        """Commit a shard in place of the data file `instead_of`: a reader sees the old one or the new. False where that
        is no longer the committed one."""
        return self._commit(shard, table, fingerprint, extra, instead_of)

    def _commit(
        self,
        shard: str,
        table: pa.Table,
        fingerprint: str,
        extra: Mapping[str, Any] | None,
        instead_of: str | None,
    ) -> bool:
        data = table_bytes(table)
        name = _data_file(shard)
        write_bytes(join(self.folder, "data", name), data)
        checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
        content = _commit_of({"file": name, "rows": table.num_rows, "checksum": checksum}, fingerprint, extra)
        place = self._commit_file(shard)
        if instead_of is None:
            if not create_exclusive(place, content):
                return False
        else:
            if read_json(place)["file"] != instead_of:
                return False
            write_bytes(place, content)
            self._records.pop(shard, None)
        if not exists(join(self.folder, "data", name)):
            # A new driver took this actor for dead and swept the file between the two writes.
            write_bytes(join(self.folder, "data", name), data)
        return True

    def write_streamed(self, shard: str, write: Callable[[HashingStream], int]) -> dict[str, Any]:
        """Write a data file piece by piece, to be committed by `commit_written` and an orphan until then.

        Args:
            write: puts the file's bytes into a stream, and gives its number of rows.
        """
        name = _data_file(shard)
        with streamed(join(self.folder, "data", name)) as stream:
            hashing = HashingStream(stream)
            rows = write(hashing)
        return {"file": name, "rows": rows, "checksum": hashing.digest.hexdigest()}

    def commit_written(
        self, shard: str, written: Mapping[str, Any], fingerprint: str, extra: Mapping[str, Any] | None = None
    ) -> bool:
        """Commit what `write_streamed` gave. False where another attempt had committed the shard first, or a new driver
        took this one for dead and swept the file."""
        if not create_exclusive(self._commit_file(shard), _commit_of(written, fingerprint, extra)):
            return False
        if not exists(join(self.folder, "data", written["file"])):
            self.drop(shard)
            return False
        return True

    def record(self, shard: str) -> dict[str, Any] | None:
        """What the commit of a shard says now, None where it has none."""
        place = self._commit_file(shard)
        with contextlib.suppress(FileNotFoundError):
            return dict(read_json(place))
        return None

    def _commit_file(self, shard: str) -> str:
        return join(self.folder, "commits", f"{shard}.json")

    def path(self, shard: str) -> str:
        """The data file of a committed shard."""
        record = self._records.get(shard) or self.committed()[shard]
        return join(self.folder, "data", record["file"])

    def read(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        return read_table(self.path(shard), columns=columns)

    def files(self) -> list[str]:
        """The data files of all committed shards, in shard order."""
        return [join(self.folder, "data", record["file"]) for record in self.committed().values()]

    def drop(self, shard: str) -> None:
        """Take a commit back, so that its shard is done again."""
        remove_file(self._commit_file(shard))
        self._records.pop(shard, None)

    def sweep(self) -> int:
        """Remove data files that no commit names; only for the holder of the lease, before work starts."""
        kept = {record["file"] for record in self.committed().values()}
        orphans = [name for name in listdir(join(self.folder, "data")) if name not in kept]
        for name in orphans:
            remove_tree(join(self.folder, "data", name))
        return len(orphans)


def _data_file(shard: str) -> str:
    """A name that no other attempt has."""
    return f"{shard}-{uuid.uuid4().hex[:12]}.parquet"


def _commit_of(written: Mapping[str, Any], fingerprint: str, extra: Mapping[str, Any] | None) -> bytes:
    record = {**written, "fingerprint": fingerprint, "committed": round(time.time(), 3), **(extra or {})}
    return json.dumps(record).encode()
