"""The prepare step's core: any source to one layout of Parquet files, and the loaders of that layout.

Everything is checked first or staged aside, and moved into the folder at the end, so bad input leaves nothing half-written.
The catalog is streamed once; what stays in memory is the judgments, the judged products and 8 bytes for each product
and log query.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from relevance_ray.data.readers import open_source
from relevance_ray.data.source import BLOCK_ROWS, DataOptions, Source
from relevance_ray.data.splits import SPLITS, LeakGuard, assign_splits, check_no_leak, query_hash
from relevance_ray.errors import UserError
from relevance_ray.schema import JUDGED_GROUP, JUDGMENT, QUERY, LabelScale, normalize_query, pair_id, product_fields

PRODUCTS_PER_FILE = 500_000
NAMED = 3
"""Of what was dropped for a reason, so many are told one by one."""
HELD_OUT_LOG = "held_out_log.parquet"


class ProgressLine(Protocol):
    def update(self, done: int | None = None) -> None: ...


def prepare(options: DataOptions, out_dir: Path, progress: ProgressLine | None = None) -> dict[str, Any]:
    """Reads the source that `options` describe and writes the layout that every later step reads.

    Writes into `out_dir`: `products/products-00000.parquet` and on (`PRODUCT`), `judgments.parquet` (`JUDGMENT`),
    `judged_groups.parquet` (`JUDGED_GROUP`, one row a query), `queries.parquet` (`QUERY`: the source's log and the train
    queries, without dev and test queries and their near-duplicates), `scale.json`.

    Returns:
        Counts: products, judgments, queries by split, log queries, and what was dropped and why; and `judged_content`, a
        hash of the judged groups and their scale.

    Raises:
        UserError: a missing file or column, an unknown grade, an empty catalog or query, a judged product that is not in
            the catalog, a repeated product id, a split without queries, a leak between splits.
    """
    source = open_source(options)
    if options.is_judged:
        judgments, repeated, conflicts = _checked_judgments(source)
        judgments, leaking = assign_splits(
            judgments, options.test_percent, options.dev_percent, folds=options.folds, fold=options.fold
        )
        check_no_leak(judgments)
    else:
        judgments, repeated, conflicts, leaking = source.judgments, 0, [], 0
    judgments = _with_soft_targets(judgments, source, options.label_smoothing)
    if options.is_judged:
        _refuse_one_grade(judgments, source)
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = out_dir / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "products").mkdir(parents=True)
    try:
        judged, num_products, num_untitled = _write_products(source, judgments, staging / "products", progress)
        groups = _judged_groups(judgments, judged)
        if options.is_judged:
            _refuse_empty_splits(groups)
        pq.write_table(judgments.select(JUDGMENT.names).cast(JUDGMENT), staging / "judgments.parquet")
        pq.write_table(groups, staging / "judged_groups.parquet", row_group_size=512)
        log = _write_log(source, judgments, staging)
        (staging / "scale.json").write_text(json.dumps(source.scale.to_dict(), indent=2) + "\n", encoding="utf-8")
        judged_content = _content(staging / "judged_groups.parquet", staging / "scale.json")
        shutil.rmtree(out_dir / "products", ignore_errors=True)
        for item in sorted(staging.iterdir()):
            os.replace(item, out_dir / item.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "products": num_products,
        "products_without_title": num_untitled,
        "judgments": judgments.num_rows,
        "judged_content": judged_content,
        "queries_by_split": {name: pc.sum(pc.equal(groups["split"], name), min_count=0).as_py() for name in SPLITS},
        "repeated_judgments_dropped": repeated,
        "of_another_grade": {"count": len(conflicts), "first": conflicts[:NAMED]},
        "leaking_judgments_dropped": leaking,
        **log,
    }


def _refuse_one_grade(judgments: pa.Table, source: Source) -> None:
    if pc.count_distinct(judgments["soft_target"]).as_py() == 1 and judgments.num_rows > 1:
        raise UserError(
            f"all {judgments.num_rows:,} judgments of {source.judgments_name} have the grade "
            f"{judgments['grade'][0].as_py()!r}, which teaches nothing; check the column of grades and data.scale"
        )


def _content(*files: Path) -> str:
    """What the files hold, wherever they are put: an ETag of S3 may differ from one upload to the next."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(hashlib.blake2b(file.read_bytes(), digest_size=16).digest())
    return digest.hexdigest()


def read_judged(folder: str | Path, split: str | None = None) -> pa.Table:
    """The `JUDGED_GROUP` table of a prepared folder, of one split or of all."""
    table = pq.read_table(Path(folder) / "judged_groups.parquet")
    return table if split is None else table.filter(pc.equal(table["split"], split))


def read_held_out_queries(folder: str | Path) -> list[str]:
    """The queries of dev and test."""
    table = pq.read_table(Path(folder) / "judged_groups.parquet", columns=["query", "split"])
    return list(table.filter(pc.is_in(table["split"], pa.array(["dev", "test"])))["query"].to_pylist())


def read_scale(folder: str | Path) -> LabelScale:
    """The label scale of a prepared folder."""
    return LabelScale.from_dict(json.loads((Path(folder) / "scale.json").read_text(encoding="utf-8")))


def product_files(folder: str | Path) -> list[Path]:
    """The products' Parquet files of a prepared folder, in catalog order."""
    return sorted((Path(folder) / "products").glob("products-*.parquet"))


def iter_products(folder: str | Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Streams the catalog of a prepared folder in its order, as `PRODUCT` tables of at most `BLOCK_ROWS` rows."""
    for path in product_files(folder):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BLOCK_ROWS, columns=list(columns) if columns else None):
                yield pa.Table.from_batches([batch])


def read_queries(folder: str | Path) -> pa.Table:
    """The `QUERY` table of a prepared folder, most frequent first."""
    return pq.read_table(Path(folder) / "queries.parquet")


def read_whole_log(folder: str | Path) -> pa.Table:
    """`read_queries`, and the lines of the log that are queries of dev and test: for reports, never to train on."""
    held_out = Path(folder) / HELD_OUT_LOG
    tables = [read_queries(folder), *([pq.read_table(held_out)] if held_out.is_file() else [])]
    return pa.concat_tables(tables)


def _checked_judgments(source: Source) -> tuple[pa.Table, int, list[str]]:
    """The judgments without repeats of a pair (the first stays), how many those were, and a line for each that gives its
    pair another grade than the first."""
    table, name, scale = source.judgments, source.judgments_name, source.scale
    if not table.num_rows:
        raise UserError(f"{name} holds no judgment; the teacher is trained on them and every model is measured by them")
    first: dict[tuple[str, str], tuple[str, int]] = {}
    conflicts: list[str] = []
    known: set[str] = set()
    keep: list[bool] = []
    columns = [table[column].to_pylist() for column in ("query_id", "query", "product_id", "grade", "row")]
    for query_id, query, product_id, grade, row in zip(*columns, strict=True):
        if not query or not query.strip():
            raise UserError(f"{name}, row {row}: the query is empty; write one or drop the row")
        if query_id is None or product_id is None:
            raise UserError(f"{name}, row {row}: {'query_id' if query_id is None else 'product_id'} is empty; fill it")
        if grade not in known:
            try:
                scale.hard_distribution(grade)
            except UserError as error:
                raise UserError(f"{name}, row {row}: {error}; mend the row or the scale") from error
            known.add(grade)
        keep.append((query_id, product_id) not in first)
        first_grade, first_row = first.setdefault((query_id, product_id), (grade, row))
        if scale.hard_distribution(first_grade).tolist() != scale.hard_distribution(grade).tolist():
            conflicts.append(
                f"{name}, row {row}: query {query!r}, product {product_id!r} is {grade}, in row {first_row} {first_grade}"
            )
    _refuse_two_queries_of_one_id(columns[0], columns[1], columns[4], name)
    return table.filter(pa.array(keep)), keep.count(False), conflicts


def _refuse_two_queries_of_one_id(ids: list[str], queries: list[str], rows: list[int], name: str) -> None:
    text_of: dict[str, str] = {}
    for query_id, query, row in zip(ids, queries, rows, strict=True):
        normal = normalize_query(query)
        if text_of.setdefault(query_id, normal) != normal:
            raise UserError(
                f"{name}, row {row}: query_id {query_id!r} has the queries {text_of[query_id]!r} and {query!r}; "
                "give each query its own id"
            )


def _with_soft_targets(judgments: pa.Table, source: Source, label_smoothing: float) -> pa.Table:
    scale = source.scale
    cache: dict[tuple[str, tuple[float, ...] | None], float] = {}
    targets = np.empty(judgments.num_rows, dtype=np.float32)
    columns = [judgments[name].to_pylist() for name in ("grade", "rater_grades", "row")]
    for index, (grade, votes, row) in enumerate(zip(*columns, strict=True)):
        key = (grade, tuple(votes) if votes else None)
        if key not in cache:
            try:
                distribution = scale.distribution(grade, votes, label_smoothing)
            except UserError as error:
                raise UserError(f"{source.judgments_name}, row {row}: rater_grades: {error}; mend the row") from error
            cache[key] = float(scale.expected_gain(distribution))
        targets[index] = cache[key]
    return judgments.append_column("soft_target", pa.array(targets))


def _write_products(
    source: Source, judgments: pa.Table, folder: Path, progress: ProgressLine | None
) -> tuple[dict[str, dict[str, Any]], int, int]:
    """Writes the catalog; returns the judged products by id, how many products there are, and how many without a title."""
    wanted = pc.unique(judgments["product_id"])
    judged: dict[str, dict[str, Any]] = {}
    hashes: list[np.ndarray] = []
    num_products = num_untitled = 0
    writer: pq.ParquetWriter | None = None
    try:
        for block in source.products():
            if not block.num_rows:
                continue
            ids = block["product_id"].to_pylist()
            if None in ids:
                row = num_products + ids.index(None) + 1
                raise UserError(f"{source.products_name}, product {row} has no product_id; fill it or drop the row")
            hashes.append(np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids)))
            for row in block.filter(pc.is_in(block["product_id"], wanted)).to_pylist():
                judged.setdefault(row["product_id"], row)
            if (
                writer is None
                or num_products // PRODUCTS_PER_FILE != (num_products + block.num_rows) // PRODUCTS_PER_FILE
            ):
                if writer is not None:
                    writer.close()
                number = len(list(folder.iterdir()))
                writer = pq.ParquetWriter(folder / f"products-{number:05d}.parquet", block.schema, compression="zstd")
            writer.write_table(block)
            num_products += block.num_rows
            num_untitled += pc.sum(pc.equal(pc.utf8_trim_whitespace(block["title"]), "")).as_py()
            if progress is not None:
                progress.update(num_products)
    finally:
        if writer is not None:
            writer.close()
    if not num_products:
        raise UserError(f"{source.products_name} holds no product; the catalog must not be empty")
    if num_untitled == num_products:
        raise UserError(
            f"{source.products_name}: none of the {num_products:,} products has a title; name the column that holds it in "
            "data.columns ({products: {title: NAME}})"
        )
    _refuse_repeated_products(source, np.concatenate(hashes))
    for product_id, row in zip(judgments["product_id"].to_pylist(), judgments["row"].to_pylist(), strict=True):
        if product_id not in judged:
            raise UserError(
                f"{source.judgments_name}, row {row}: product {product_id!r} is not in {source.products_name}; "
                "add the product or drop the judgment"
            )
    return judged, num_products, num_untitled


def _refuse_repeated_products(source: Source, hashes: np.ndarray) -> None:
    """Equal 64-bit hashes mean equal ids: among a billion products a false alarm has a chance of 3%."""
    order = np.argsort(hashes, kind="stable")
    repeats = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    if len(repeats):
        ids = (product_id for block in source.products() for product_id in block["product_id"].to_pylist())
        value = hashes[repeats.min()]
        first, second = itertools.islice(
            (pair for pair, own in zip(enumerate(ids, 1), hashes, strict=True) if own == value), 2
        )
        raise UserError(
            f"{source.products_name}: product_id {second[1]!r} is there twice, as products {first[0]} and {second[0]}; keep "
            "one row a product"
        )


def _judged_groups(judgments: pa.Table, judged: dict[str, dict[str, Any]]) -> pa.Table:
    groups: dict[str, dict[str, Any]] = {}
    for row in judgments.to_pylist():
        product = judged[row["product_id"]]
        group = groups.setdefault(
            row["query_id"],
            {
                "query_id": row["query_id"],
                "query": row["query"],
                "query_source": "human",
                "split": row["split"],
                "products": [],
            },
        )
        group["products"].append(
            {
                "pair_id": pair_id(row["query"], row["product_id"], product["locale"]),
                "product_id": row["product_id"],
                "fields": product_fields(product),
                "origins": [{"name": "human", "rank": 0}],
                "grade": row["grade"],
                "soft_target": row["soft_target"],
                "rater_grades": row["rater_grades"],
            }
        )
    return pa.Table.from_pylist(list(groups.values()), schema=JUDGED_GROUP)


def _refuse_empty_splits(groups: pa.Table) -> None:
    present = set(groups["split"].to_pylist())
    for split in SPLITS:
        if split not in present:
            raise UserError(
                f"no judged query is in {split} ({len(groups)} in all); judge more queries, or raise data.{split}_percent"
                if split != "train"
                else f"no judged query is left for training ({len(groups)} in all); judge more queries"
            )


def _write_log(source: Source, judgments: pa.Table, folder: Path) -> dict[str, int]:
    """Writes the log queries that may be trained on, most frequent first, and apart from them those that models are
    measured by; returns counts."""
    train = judgments.filter(pc.equal(judgments["split"], "train"))
    held_out = judgments.filter(pc.not_equal(judgments["split"], "train"))
    measured_by = pc.unique(held_out["query"]).to_pylist()
    guard, frequency_of = LeakGuard(measured_by), dict.fromkeys(map(query_hash, measured_by), 0)
    position: dict[int, int] = {}
    queries: list[str] = []
    frequencies: list[int] = []
    locales: list[str | None] = []
    held_back = 0
    for query, frequency, locale in _log_lines(source, pc.unique(train["query"]).to_pylist()):
        if not query or not query.strip():
            continue
        key = query_hash(query)
        if key in position:
            frequencies[position[key]] = max(frequencies[position[key]], frequency)
        elif guard.is_leak(query):
            held_back += 1
            if key in frequency_of:
                frequency_of[key] = max(frequency_of[key], frequency)
        else:
            position[key] = len(queries)
            queries.append(query)
            frequencies.append(frequency)
            locales.append(locale)
    table = _query_table(queries, frequencies, locales)
    order = np.argsort(-np.asarray(frequencies, dtype=np.int64), kind="stable")
    pq.write_table(table.take(pa.array(order)), folder / "queries.parquet")
    logged = [(query, count) for query in measured_by if (count := frequency_of[query_hash(query)])]
    held_out_log = _query_table([query for query, _ in logged], [count for _, count in logged], [None] * len(logged))
    pq.write_table(held_out_log, folder / HELD_OUT_LOG)
    return {"log_queries": len(queries), "log_queries_held_back": held_back}


def _query_table(queries: list[str], frequencies: list[int], locales: Sequence[str | None]) -> pa.Table:
    arrays = [pa.array(queries, pa.string()), pa.array(frequencies, pa.int64()), pa.array(locales, pa.string())]
    return pa.table(arrays, schema=QUERY)


def _log_lines(source: Source, train_queries: list[str]) -> Iterable[tuple[str, int, str | None]]:
    for block in source.queries():
        yield from zip(*(block[name].to_pylist() for name in QUERY.names), strict=True)
    for query in train_queries:
        yield query, 1, None
