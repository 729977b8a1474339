"""Labels that the same teacher gave before: what a nightly run need not ask again.

A catalog or a log that grew makes new shards, most of whose pairs earlier shards hold. So that no pair is labeled twice,
an index says which shard labeled each pair last, and the label is taken over where query and product read just the same.
The index is 12 bytes a pair, on disk, in buckets that are sorted one by one and mapped into memory, so nothing is held of
it, however many pairs there are. The next night adds its shards to it.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.labeling.shard import Known, known_rows, pairs_of
from relevance_ray.storage import (
    CommitLog,
    exists,
    fingerprint,
    is_remote,
    join,
    listdir,
    localize,
    makedirs,
    publish_folder,
    read_bytes,
    read_json,
    read_table,
    remove_tree,
    write_json,
)

_BUCKETS = 256
_SHARDS_HELD = 4
_READ_AT_ONCE = 8
_FLUSH_ENTRIES = 2_000_000
_ENTRY = np.dtype([("pair", "<u8"), ("shard", "<u4")])
_LIST = "shards.json"


def build_index(folder: str, wanted: Collection[str], on_shard: Callable[[int, int], None] | None = None) -> str:
    """Index the committed shards of a label folder that are not among the wanted ones.

    Args:
        folder: of the label step; its lease is held.
        wanted: label names of the shards that this run asks for.
        on_shard: told how many shards of how many were read.

    Returns:
        The folder of the index, made where it is not there yet; "" where there is no earlier shard.
    """
    records = CommitLog(folder).committed()
    earlier = [name for name in records if name not in wanted]
    if not earlier:
        return ""
    files = [records[name]["file"] for name in sorted(earlier, key=lambda name: records[name].get("committed", 0))]
    root = join(folder, "earlier")
    place = join(root, fingerprint(files))
    if exists(join(place, _LIST)):
        return place
    makedirs(root)
    before = [name for name in listdir(root) if exists(join(root, name, _LIST))]
    # Staged on the file system it is published to, where publishing is one rename.
    parent = None if is_remote(root) else root.removeprefix("file://")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=parent, ignore_cleanup_errors=True) as staging:
        made = Path(staging) / "index"
        made.mkdir()
        numbered = _extend(made, folder, join(root, before[0]) if before else "", files, on_shard)
        publish_folder(made, place)
        write_json(join(place, _LIST), numbered)  # last: on S3 a folder does not appear whole
    for stale in listdir(root):
        if stale != place.rsplit("/", 1)[-1]:
            remove_tree(join(root, stale))
    return place


def _extend(
    made: Path, folder: str, before: str, files: Sequence[str], on_shard: Callable[[int, int], None] | None
) -> list[str]:
    """Write the buckets of an index over `files`, starting from an older one; the files by their number in it."""
    numbered: list[str] = read_json(join(before, _LIST)) if before else []
    known = set(numbered)
    new = [file for file in files if file not in known]
    writer = _Buckets(made)
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        for start in range(0, len(new), 8 * _READ_AT_ONCE):
            part = new[start : start + 8 * _READ_AT_ONCE]
            found = pool.map(_pair_ids, [join(folder, "data", file) for file in part])
            for file, pairs in zip(part, found, strict=True):
                writer.add(pairs, len(numbered))
                numbered.append(file)
            if on_shard is not None:
                on_shard(start + len(part), len(new))
    writer.flush()
    # A file that a retry replaced, or that this run asks for, is no earlier one any more.
    valid = np.isin(np.asarray(numbered), np.asarray(list(files)))
    older = localize(before) if before else None
    for bucket in range(_BUCKETS):
        entries = np.fromfile(_raw(made, bucket), dtype=_ENTRY)
        if older is not None:
            entries = np.concatenate([np.load(_bucket(older, bucket)), entries])
        entries = entries[valid[entries["shard"]]]
        entries = entries[np.lexsort((entries["shard"], entries["pair"]))]
        newest = np.ones(len(entries), dtype=bool)
        newest[:-1] = entries["pair"][1:] != entries["pair"][:-1]
        np.save(_bucket(made, bucket), entries[newest])
        _raw(made, bucket).unlink()
    return numbered


class _Buckets:
    """Entries on their way into the files of their buckets, a few million at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._waiting, self._count = folder, list[np.ndarray](), 0
        for bucket in range(_BUCKETS):
            _raw(folder, bucket).touch()

    def add(self, pairs: np.ndarray, shard: int) -> None:
        entries = np.empty(len(pairs), dtype=_ENTRY)
        entries["pair"], entries["shard"] = pairs, shard
        self._waiting.append(entries)
        self._count += len(entries)
        if self._count >= _FLUSH_ENTRIES:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        entries = np.concatenate(self._waiting)
        entries = entries[np.argsort(entries["pair"] % _BUCKETS, kind="stable")]
        bounds = np.searchsorted(entries["pair"] % _BUCKETS, np.arange(_BUCKETS + 1))
        for bucket in range(_BUCKETS):
            if bounds[bucket] < bounds[bucket + 1]:
                with open(_raw(self._folder, bucket), "ab") as file:
                    file.write(entries[bounds[bucket] : bounds[bucket + 1]].tobytes())
        self._waiting, self._count = [], 0


class EarlierLabels:
    """Looks up what earlier shards say of the pairs of a new one.

    Args:
        folder: of the label step.
        index: what `build_index` gave.
    """

    def __init__(self, folder: str, index: str) -> None:
        local = localize(index)
        self._files: list[str] = json.loads((local / _LIST).read_text(encoding="utf-8"))
        self._buckets = [np.load(_bucket(local, bucket), mmap_mode="r") for bucket in range(_BUCKETS)]
        self._read = lru_cache(_SHARDS_HELD)(
            lambda number: _Shard(read_table(join(folder, "data", self._files[number])))
        )

    def known(self, groups: pa.Table) -> Known:
        """The labels of those pairs of a GROUP table that an earlier shard holds, failed ones left out."""
        pairs = pairs_of(groups)
        keys = np.asarray([pair.pair_id for pair in pairs], dtype=np.int64).view(np.uint64)
        found: dict[int, tuple[_Shard, int]] = {}
        for number, rows in self._places(keys):
            earlier = self._read(number)
            for row in rows:
                pair = pairs[row]
                if (place := earlier.place(pair.pair_id, pair.query, pair.product)) is not None:
                    found[row] = (earlier, place)
        places = [found[row] for row in sorted(found)]
        class_logits = [earlier.labels.class_logits[place] for earlier, place in places]
        return Known(
            np.asarray(sorted(found), dtype=np.int64),
            np.stack(class_logits) if class_logits else np.empty((0, 0), dtype=np.float32),
            np.asarray([earlier.labels.logits[place] for earlier, place in places], dtype=np.float32),
            [earlier.labels.rationales[place] for earlier, place in places],
        )

    def _places(self, keys: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Number of an earlier shard, and the rows that it labeled last."""
        shard_of = np.full(len(keys), -1, dtype=np.int64)
        bucket_of = keys % np.uint64(_BUCKETS)
        for bucket in np.unique(bucket_of):
            entries, rows = self._buckets[int(bucket)], np.flatnonzero(bucket_of == bucket)
            if len(entries):
                at = np.minimum(np.searchsorted(entries["pair"], keys[rows]), len(entries) - 1)
                hit = entries["pair"][at] == keys[rows]
                shard_of[rows[hit]] = entries["shard"][at[hit]]
        for number in np.unique(shard_of[shard_of >= 0]):
            yield int(number), np.flatnonzero(shard_of == number).tolist()


class _Shard:
    """An earlier shard: its labels, and where each pair stands."""

    def __init__(self, labeled: pa.Table) -> None:
        self.labels = known_rows(labeled)
        pairs = pairs_of(labeled)
        self._pairs = [pairs[row] for row in self.labels.rows]
        self._place = {pair.pair_id: place for place, pair in enumerate(self._pairs)}

    def place(self, pair_id: int, query: str, fields: Mapping[str, Any]) -> int | None:
        """Where the pair stands among the labels; None where it is not there, or reads otherwise."""
        place = self._place.get(pair_id)
        if place is None or (self._pairs[place].query, self._pairs[place].product) != (query, fields):
            return None
        return place


def _pair_ids(path: str) -> np.ndarray:
    """uint64, the pairs of a file of labels."""
    file = pq.ParquetFile(io.BytesIO(read_bytes(path)))
    products = file.read(columns=["products.list.element.pair_id"]).column("products").combine_chunks()
    return products.flatten().field("pair_id").to_numpy().view(np.uint64)


def _bucket(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:03d}.npy"


def _raw(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:03d}.raw"
