"""Labels that the same teacher gave before: what a nightly run need not ask again.

A catalog or a log that grew makes new shards, most of whose pairs an earlier shard holds. So that no pair is labeled
twice, an index says where each query was labeled last, and a pair's label is taken over where query and product read just
the same. The index is 12 bytes a query, on disk, in buckets that are sorted one by one and mapped into memory: no list of
pairs is held anywhere, however many there are.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray.labeling.shard import Known, known_rows, pairs_of, rows_of
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
    read_table,
    remove_tree,
    write_json,
)

_BUCKETS = 64
_PLACES = 2
"""Places kept of a query, newest first: a pairs file's query may make two groups, in shards that differ."""

_SHARDS_HELD = 4
_ENTRY = np.dtype([("query", "<u8"), ("shard", "<u4")])


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
    names = sorted(
        (name for name in records if name not in wanted),
        key=lambda name: records[name].get("committed", 0),
        reverse=True,
    )
    root = join(folder, "earlier")
    if not names:
        return ""
    files = [records[name]["file"] for name in names]  # a retry gives a shard another file
    place = join(root, fingerprint(files))
    if exists(join(place, "shards.json")):
        return place
    for stale in listdir(root):
        remove_tree(join(root, stale))
    makedirs(root)
    # Staged on the file system it is published to, where publishing is one rename.
    parent = None if is_remote(root) else root.removeprefix("file://")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=parent, ignore_cleanup_errors=True) as staging:
        made = Path(staging) / "index"
        made.mkdir()
        for number, file in enumerate(files):
            _append(made, number, read_table(join(folder, "data", file), columns=["query_id"]))
            if on_shard is not None:
                on_shard(number + 1, len(files))
        for bucket in range(_BUCKETS):
            _sort(made, bucket)
        publish_folder(made, place)
        write_json(join(place, "shards.json"), files)  # last: on S3 a folder does not appear whole
    return place


class EarlierLabels:
    """Looks up what earlier shards say of the pairs of a new one.

    Args:
        folder: of the label step.
        index: what `build_index` gave.
    """

    def __init__(self, folder: str, index: str) -> None:
        local = localize(index)
        self._files: list[str] = json.loads((local / "shards.json").read_text(encoding="utf-8"))
        self._buckets = [np.load(_bucket(local, bucket), mmap_mode="r") for bucket in range(_BUCKETS)]
        self._read = lru_cache(_SHARDS_HELD)(
            lambda number: _Shard(read_table(join(folder, "data", self._files[number])))
        )

    def known(self, groups: pa.Table) -> Known:
        """The labels of those pairs of a GROUP table that an earlier shard holds, failed ones left out."""
        flat = groups.column("products").combine_chunks()
        starts = np.asarray(flat.offsets) - flat.offsets[0].as_py()
        wanted: dict[int, list[int]] = {}
        for group, key in enumerate(_keys(groups["query_id"].to_pylist())):
            for shard in self._places(key):
                wanted.setdefault(shard, []).append(group)
        rows_by_group = rows_of(groups) if wanted else []
        found: dict[int, tuple[_Shard, int]] = {}
        for shard in sorted(wanted):  # newest first
            earlier = self._read(shard)
            for group in wanted[shard]:
                row = rows_by_group[group]
                for number, product in enumerate(row["products"], start=int(starts[group])):
                    place = earlier.place(product["pair_id"], row["query"], product["fields"])
                    if place is not None:
                        found.setdefault(number, (earlier, place))
        places = [found[number] for number in sorted(found)]
        class_logits = [earlier.labels.class_logits[place] for earlier, place in places]
        return Known(
            np.asarray(sorted(found), dtype=np.int64),
            np.stack(class_logits) if class_logits else np.empty((0, 0), dtype=np.float32),
            np.asarray([earlier.labels.logits[place] for earlier, place in places], dtype=np.float32),
            [earlier.labels.rationales[place] for earlier, place in places],
        )

    def _places(self, key: int) -> list[int]:
        bucket = self._buckets[key % _BUCKETS]
        first = int(np.searchsorted(bucket["query"], np.uint64(key)))
        entries = bucket[first : first + _PLACES]
        return [int(entry["shard"]) for entry in entries if int(entry["query"]) == key]


class _Shard:
    """An earlier shard: its labels, and where each pair stands."""

    def __init__(self, labeled: pa.Table) -> None:
        self.labels = known_rows(labeled)
        pairs = pairs_of(labeled)
        self._pairs = [pairs[row] for row in self.labels.rows]
        self._place = {pair.pair_id: place for place, pair in enumerate(self._pairs)}

    def place(self, pair_id: int, query: str, fields: dict[str, Any]) -> int | None:
        """Where the pair stands among the labels; None where it is not there, or reads otherwise."""
        place = self._place.get(pair_id)
        if place is None or (self._pairs[place].query, self._pairs[place].product) != (query, fields):
            return None
        return place


def _keys(query_ids: Sequence[str]) -> list[int]:
    digests = b"".join(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in query_ids
    )
    return np.frombuffer(digests, dtype="<u8").tolist()


def _bucket(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:02d}.npy"


def _append(folder: Path, shard: int, table: pa.Table) -> None:
    keys = np.asarray(sorted(set(_keys(table["query_id"].to_pylist()))), dtype=np.uint64)
    entries = np.zeros(len(keys), dtype=_ENTRY)
    entries["query"], entries["shard"] = keys, shard
    for bucket in range(_BUCKETS):
        mine = entries[keys % np.uint64(_BUCKETS) == bucket]
        with open(_bucket(folder, bucket).with_suffix(".raw"), "ab") as file:
            file.write(mine.tobytes())


def _sort(folder: Path, bucket: int) -> None:
    """From entries as they came to those kept, by query and then newest first."""
    raw = _bucket(folder, bucket).with_suffix(".raw")
    entries = np.fromfile(raw, dtype=_ENTRY)
    entries = entries[np.lexsort((entries["shard"], entries["query"]))]
    too_old = np.zeros(len(entries), dtype=bool)
    too_old[_PLACES:] = entries["query"][_PLACES:] == entries["query"][:-_PLACES]
    np.save(_bucket(folder, bucket), entries[~too_old])
    raw.unlink()
