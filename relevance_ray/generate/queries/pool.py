"""The pool: the queries of a run in one file, a row a group, of which every worker maps its range.

The trade-off: one process walks the stream of queries from its start (some ten thousand a second) whenever another
`num_pairs` is asked for. What it keeps in memory is a few bytes a query, beside the log's Arrow table and, where files of
the shop's own pairs are given, some 100 bytes for each of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from relevance_ray.errors import UserError
from relevance_ray.generate.queries.sources import PoolCounts, PoolQuery

POOL = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("query_source", pa.string(), nullable=False),
        pa.field("locale", pa.string()),
        pa.field("anchor", pa.int64()),
        pa.field("rows", pa.list_(pa.int64())),
        pa.field("ranks", pa.list_(pa.int32())),
        pa.field("engine_rows", pa.list_(pa.int64())),
    ]
)
"""One row a group. `anchor`: catalog row of the product that the query was made from. `rows` and `ranks`: the products
that a pairs file gives; null where candidates are to be found. `engine_rows`: what the shop's engine found, best first."""

_ROWS_PER_BATCH = 10_000


@dataclass
class PoolSummary:
    """What a pool holds.

    Attributes:
        asked: the number of pairs that it was made for.
        groups: its rows.
        pairs: products of all groups.
        sources: groups by query source.
        left_out: queries by reason and source; `refused`: answers of the language model by reason.
    """

    asked: int
    groups: int
    pairs: int
    sources: dict[str, int]
    left_out: dict[str, dict[str, int]]

    def to_dict(self) -> dict:
        return asdict(self)


def write_pool(
    stream: Iterable[PoolQuery], path: Path, num_pairs: int, group_size: int, counts: PoolCounts
) -> PoolSummary:
    """Write the head of the stream whose groups hold `num_pairs` pairs within 1%, as a POOL file.

    Args:
        stream: what `mix` gives.
        path: of the file, which is whole when this returns.
        num_pairs: how many pairs are wanted.
        group_size: products of each group that brings none of its own.
        counts: filled by the stream while it is read; named in the error.

    Raises:
        UserError: the stream holds fewer, or whole groups do not come within 1%: the sentence says what can be had.
    """
    groups = total = before = 0
    sources: Counter[str] = Counter()
    with pa.ipc.new_file(str(path), POOL) as writer:
        block: list[dict] = []
        for row in _rows(stream):
            size = group_size if row["rows"] is None else len(row["rows"])
            if total + size >= num_pairs:
                before, total = total, total + size
                if before and num_pairs - before < total - num_pairs:
                    before, total = total, before
                else:
                    groups += 1
                    sources[row["query_source"]] += 1
                    block.append(row)
                break
            groups, total = groups + 1, total + size
            sources[row["query_source"]] += 1
            block.append(row)
            if len(block) == _ROWS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(block, schema=POOL))
                block.clear()
        writer.write_batch(pa.RecordBatch.from_pylist(block, schema=POOL))
    if abs(total - num_pairs) > 0.01 * num_pairs:
        raise UserError(_refusal(num_pairs, sources, total, before, group_size, counts))
    left_out = {"repeats": dict(counts.repeats), "leaks": dict(counts.leaks), "refused": dict(counts.refused)}
    return PoolSummary(num_pairs, groups, total, dict(sources), left_out)


def _rows(stream: Iterable[PoolQuery]) -> Iterator[dict]:
    for query in stream:
        for part in query.parts or (None,):
            yield {
                "query": query.query,
                "query_source": query.source,
                "locale": query.locale,
                "anchor": query.anchor,
                "rows": None if part is None else [row for row, _ in part],
                "ranks": None if part is None else [rank for _, rank in part],
                "engine_rows": list(query.engine_rows) or None,
            }


def _refusal(
    num_pairs: int, sources: Mapping[str, int], total: int, before: int, group_size: int, counts: PoolCounts
) -> str:
    groups = sum(sources.values())
    if max(total, before) < num_pairs:
        refused = f", {counts.refused.total():,} answers of the language model refused" if counts.refused else ""
        left_out = (
            f"{counts.repeats.total():,} repeats and {counts.leaks.total():,} near-duplicates of held-out queries"
        )
        if not groups:
            return f"generate.source gives no query ({left_out} left out{refused}); add a source, such as titles"
        more = "" if set(sources) == {"file"} else ", raise generate.candidates_per_query"
        return (
            f"generate.num_pairs {num_pairs:,} cannot be met: the sources hold {groups:,} groups with {total:,} pairs "
            f"({left_out} left out{refused}); lower generate.num_pairs to {total}{more} or add to generate.source"
        )
    choices = " or ".join(str(count) for count in sorted({before, total}) if count)
    size = "" if "file" in sources else f" of {group_size}"
    return f"generate.num_pairs {num_pairs:,} cannot be met within 1% by whole groups{size}; set it to {choices}"


class PoolFile:
    """The rows of a pool by number, from a local copy of its file."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows [start, stop), a POOL table."""
        return self._table.slice(start, stop - start)
