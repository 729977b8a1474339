"""The labels of a run in few large files: a step of its own, that copies and decides nothing.

Consecutive label shards, in shard order, become one file each time about `target_bytes` of them are together. A file is
named after the shards it holds and their content, so a run that was killed does only what is missing, and labels that grew
change the last file alone: it is written anew with what came behind it, and its commit dropped once the new one is there.
Between the two acts both are committed; a reader takes the files that together hold just the shards it wants
(`compacted_files`), and so sees no pair twice, and none missing.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.errors import UserError
from relevance_ray.progress import Progress
from relevance_ray.schema import LABELED_GROUP
from relevance_ray.storage import CommitLog, file_sizes, fingerprint, join, read_bytes
from relevance_ray.whole_files import HashingStream, reading

ROW_GROUP_BYTES = 32 * 2**20
"""Of a row group in memory: large enough to read well, small enough that a few actors hold one each."""

_PAIR_ID = "products.list.element.pair_id"


@dataclass(frozen=True)
class Counts:
    """What a table of groups holds.

    Attributes:
        rows: groups.
        pairs: products of all groups.
        pair_ids: sum of the pair ids modulo 2**64. They are hashes, so it tells any two sets of pairs apart, in whatever
            order, and a pair that is there twice.
    """

    rows: int = 0
    pairs: int = 0
    pair_ids: int = 0

    @classmethod
    def of(cls, rows: int, pair_ids: pa.Array) -> Counts:
        ids = pair_ids.to_numpy(zero_copy_only=False).view(np.uint64)
        return cls(rows, len(ids), int(ids.sum(dtype=np.uint64)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rows + other.rows, self.pairs + other.pairs, (self.pair_ids + other.pair_ids) % 2**64)


@dataclass(frozen=True)
class Part:
    """One file to be: the label shards it holds, in order, and how many pairs they have."""

    name: str
    shards: tuple[str, ...]
    pairs: int


Do = Callable[[Part], int]
Run = Callable[[Do, Sequence[Part]], Iterable[int]]
"""Does each of some parts, in any order; what each gave, as they come."""


def in_turn(do: Do, parts: Sequence[Part]) -> Iterator[int]:
    """A `Run` in this process."""
    return map(do, parts)


def plan_parts(labels: CommitLog, shards: Sequence[str], target_bytes: int) -> list[Part]:
    """Pack consecutive label shards into files as near to `target_bytes` as they get, by the bytes of their data files.
    Where one ends depends on what stands before that and on the one shard behind it: more shards change the last file
    only."""
    records, sizes = labels.committed(), file_sizes(join(labels.folder, "data"))
    parts: list[Part] = []
    packed: list[str] = []
    size = 0
    for shard, following in itertools.zip_longest(shards, shards[1:]):
        packed.append(shard)
        size += sizes[records[shard]["file"]]
        ahead = sizes[records[following]["file"]] if following is not None else 0
        if following is None or size + ahead / 2 > target_bytes:
            pairs = sum(records[name]["pairs"] for name in packed)
            parts.append(Part(f"{packed[0]}-{fingerprint(_keys(records, packed))}", tuple(packed), pairs))
            packed, size = [], 0
    return parts


def compact(
    labels: CommitLog,
    shards: Sequence[str],
    folder: str,
    fingerprint: str,
    *,
    target_bytes: int,
    run: Run = in_turn,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bring the files in `folder` to hold just the labels of some shards; the root is leased.

    Args:
        labels: the label step.
        shards: names of label shards, in the order that their rows shall have.
        folder: of the compact step; it holds the labels of one set of shards, as it grows, at one `target_bytes`.
        fingerprint: stands in each commit.
        target_bytes: of a file.
        run: how the files that are missing are written.
        progress: counts pairs.

    Returns:
        How many `files` hold how many `shards`, `rows`, `pairs`, and their `pair_ids`: the sum of all modulo 2**64, in hex
        digits; and how many files were `kept`.

    Raises:
        UserError: there are no labels, or a label file is not what its commit says.
    """
    if not shards:
        raise UserError(f"{labels.folder} holds no labels of this run, so there is nothing to compact; label first")
    log = CommitLog(folder)
    log.sweep()
    parts, there = plan_parts(labels, shards, target_bytes), log.committed()
    missing = [part for part in parts if part.name not in there]
    if progress is not None:
        progress.restart(sum(part.pairs for part in parts if part.name in there))
        progress.update(total=sum(part.pairs for part in parts))
    for pairs in run(partial(compact_part, labels.folder, folder, fingerprint), missing):
        if progress is not None:
            progress.advance(pairs)
    counts = _check(labels, shards, log, parts)
    # Last, so that what a dropped file held stands in another by now. Its data stays until the next time, for those who
    # are reading it.
    for name in log.committed().keys() - {part.name for part in parts}:
        log.drop(name)
    return {
        "files": len(parts),
        "shards": len(shards),
        "rows": counts.rows,
        "pairs": counts.pairs,
        "pair_ids": f"{counts.pair_ids:016x}",
        "kept": len(parts) - len(missing),
    }


def compact_part(labels_folder: str, folder: str, fingerprint: str, part: Part) -> int:
    """Write and commit one file; its number of pairs. Held in memory: one label shard, and a row group."""
    labels, log = CommitLog(labels_folder), CommitLog(folder)
    records: dict[str, dict[str, Any]] = {}
    found = Counts()

    def write(stream: HashingStream) -> int:
        nonlocal found
        with pq.ParquetWriter(stream, LABELED_GROUP, compression="zstd") as writer:
            pending: list[pa.Table] = []
            for shard in part.shards:
                records[shard] = labels.record(shard) or {}
                table, counts = _read_shard(labels, shard, records[shard])
                found += counts
                pending.append(table)
                if sum(waiting.nbytes for waiting in pending) >= ROW_GROUP_BYTES:
                    _write_rows(writer, pending)
                    pending = []
            _write_rows(writer, pending)
        return found.rows

    written = log.write_streamed(part.name, write)
    copied = count_file(join(folder, "data", written["file"]))
    if copied != found:
        raise RuntimeError(f"{part.name}: read {found}, wrote {copied}")
    log.commit_written(
        part.name,
        written,
        fingerprint,
        {"pairs": found.pairs, "pair_ids": f"{found.pair_ids:016x}", "shards": _keys(records, part.shards)},
    )
    return found.pairs


def count_file(path: str) -> Counts:
    """What a file of groups holds, from the ids alone."""
    counts = Counts()
    with reading(path) as stream, pq.ParquetFile(stream) as file:
        for number in range(file.num_row_groups):
            ids = file.read_row_group(number, columns=[_PAIR_ID])
            counts += _count(ids)
    return counts


def compacted_files(folder: str, labels: CommitLog, shards: Sequence[str]) -> list[str]:
    """The files that hold the labels of some shards, each once and in order, whatever else is committed beside them.

    Raises:
        UserError: they are not compacted, or were labeled again since.
    """
    log = CommitLog(folder)
    records = log.committed()
    wanted = _keys(labels.committed(), shards)
    starting: dict[str, list[str]] = {}
    for name, record in records.items():
        starting.setdefault(record["shards"][0], []).append(name)
    # From the end: the file at which the files that hold the rest begin, for each shard where such files begin.
    chosen: dict[int, str] = {}
    for first in reversed(range(len(wanted))):
        for name in starting.get(wanted[first], []):
            end = first + len(records[name]["shards"])
            if wanted[first:end] == records[name]["shards"] and (end in chosen or end == len(wanted)):
                chosen[first] = name
    files: list[str] = []
    at = 0
    while at < len(wanted):
        if at not in chosen:
            raise UserError(f"{folder} does not hold these labels; run relevance-ray compact")
        files.append(log.path(chosen[at]))
        at += len(records[chosen[at]]["shards"])
    return files


def _keys(records: Mapping[str, Mapping[str, Any]], shards: Iterable[str]) -> list[str]:
    """What names the shards and their content: a shard whose failed rows were labeled again is another."""
    return [f"{shard}:{records[shard]['checksum']}" for shard in shards]


def _read_shard(labels: CommitLog, shard: str, record: Mapping[str, Any]) -> tuple[pa.Table, Counts]:
    path = join(labels.folder, "data", str(record.get("file")))
    data = read_bytes(path)
    if hashlib.blake2b(data, digest_size=16).hexdigest() != record["checksum"]:
        raise UserError(f"{path} does not hold what its commit says; remove that commit and label the shard again")
    table = pq.read_table(io.BytesIO(data)).cast(LABELED_GROUP)
    counts = _count(table)
    if (counts.rows, counts.pairs) != (record["rows"], record["pairs"]):
        raise UserError(f"{path} has {counts.rows} rows and {counts.pairs} pairs, and its commit says otherwise")
    return table, counts


def _write_rows(writer: pq.ParquetWriter, tables: list[pa.Table]) -> None:
    table = pa.concat_tables(tables) if tables else LABELED_GROUP.empty_table()
    if table.num_rows:
        # One row group, unless a single shard is larger than that.
        groups = max(1, round(table.nbytes / ROW_GROUP_BYTES))
        writer.write_table(table, row_group_size=-(-table.num_rows // groups))


def _count(groups: pa.Table) -> Counts:
    return Counts.of(groups.num_rows, groups["products"].combine_chunks().flatten().field("pair_id"))


def _check(labels: CommitLog, shards: Sequence[str], log: CommitLog, parts: Sequence[Part]) -> Counts:
    """The counts of all files, which must be those of the shards they were made from."""
    made, records = log.committed(), labels.committed()
    counts = Counts()
    for part in parts:
        record = made[part.name]
        counts += Counts(record["rows"], record["pairs"], int(record["pair_ids"], 16))
    held = [key for part in parts for key in made[part.name]["shards"]]
    rows, pairs = (sum(records[shard][key] for shard in shards) for key in ("rows", "pairs"))
    if held != _keys(records, shards) or (counts.rows, counts.pairs) != (rows, pairs):
        raise RuntimeError(f"{log.folder} holds {counts}, the labels {rows} rows and {pairs} pairs")
    return counts
