"""Labeling: what a shard becomes, and that a run that was cut short goes on without doing anything twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from relevance_ray.cluster.workers import Workers
from relevance_ray.data.market_truth import MARKET_SCALE
from relevance_ray.engines.base import Labels, Pair
from relevance_ray.engines.options import EngineOptions
from relevance_ray.engines.registry import open_engine
from relevance_ray.labeling.pipeline import Shard, label, shards_to_label
from relevance_ray.labeling.shard import count_errors, label_groups
from relevance_ray.schema import GROUP, LABELED_GROUP, pair_id, product_fields
from relevance_ray.storage import CommitLog


def make_groups(start: int, stop: int, products: int = 3) -> pa.Table:
    rows = []
    for group in range(start, stop):
        query = f"query {group}"
        members = [
            {
                "pair_id": pair_id(query, f"p{n}"),
                "product_id": f"p{n}",
                "fields": product_fields({"title": f"title {n}", "attributes": {"size": "xl"}, "price": 1.5}),
                "origins": [{"name": "random", "rank": n}],
            }
            for n in range(products)
        ]
        rows.append({"query_id": str(group), "query": query, "query_source": "log", "products": members})
    return pa.Table.from_pylist(rows, schema=GROUP)


class LengthEngine:
    """A real engine of its own, small: the logit is the length of the query, and each call leaves a line in a file."""

    gains = (0.0, 1.0)
    num_tokens = 0

    def __init__(self, calls: Path) -> None:
        self.calls = calls

    def label(self, pairs: Sequence[Pair]) -> Labels:
        with self.calls.open("a") as file:
            file.write(f"{pairs[0].query}\n")
        lengths = np.array([len(pair.query) for pair in pairs], dtype=np.float32)
        errors: list[str | None] = ["no label" if pair.product_id == "p9" else None for pair in pairs]
        lengths[[error is not None for error in errors]] = np.nan
        return Labels(np.stack([np.zeros_like(lengths), lengths], axis=1), errors, [None] * len(pairs))


def test_labels_stand_beside_their_products_and_a_failed_row_keeps_its_place(tmp_path: Path) -> None:
    groups = pa.concat_tables([make_groups(0, 2), make_groups(100, 101, products=11)])
    labeled = label_groups(groups.slice(1), lambda: LengthEngine(tmp_path / "calls"))
    assert labeled.schema == LABELED_GROUP
    first, second = labeled.to_pylist()
    assert [row["logit"] for row in first["products"]] == [7.0, 7.0, 7.0]
    assert first["products"][0]["class_logits"] == [0.0, 7.0]
    assert first["products"][0]["fields"] == groups.slice(1).to_pylist()[0]["products"][0]["fields"]
    failed = second["products"][9]
    assert (failed["product_id"], failed["error"], failed["logit"], failed["class_logits"]) == (
        "p9",
        "no label",
        None,
        None,
    )
    assert second["products"][10]["logit"] == 9.0
    assert count_errors(labeled) == 1


@pytest.fixture
def ray_sees_this_module(ray_cluster: None) -> Iterator[None]:
    """Workers cannot import a test module; its classes travel by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("ray_sees_this_module")
def test_a_resumed_run_labels_only_what_is_missing_and_growth_only_what_is_new(tmp_path: Path) -> None:
    groups = CommitLog(str(tmp_path / "generate"))
    for start in range(0, 30, 10):
        table = make_groups(start, start + 10)
        groups.commit(f"groups-{start:010d}-{start + 10:010d}", table, "g", {"pairs": 30})
    calls, out = tmp_path / "calls", str(tmp_path / "label")
    run = partial(label, folder=out, fingerprint="t", open_engine=partial(LengthEngine, calls), workers=Workers(2))

    shards = shards_to_label(groups, list(groups.committed()))
    assert run(shards) == {
        "shards": 3,
        "skipped": 0,
        "pairs": 90,
        "errors": 0,
        "reused": 0,
        "tokens": 0,
        "labeled_now": {"pairs": 90, "tokens": 0},
        "set_aside": {},
    }
    before = {name: record["checksum"] for name, record in CommitLog(out).committed().items()}

    CommitLog(out).drop(shards[1].label_name)
    groups.commit("groups-0000000030-0000000035", make_groups(30, 35), "g", {"pairs": 15})
    grown = shards_to_label(groups, list(groups.committed()))
    assert run(grown) == {
        "shards": 4,
        "skipped": 2,
        "pairs": 105,
        "errors": 0,
        "reused": 0,
        "tokens": 0,
        "labeled_now": {"pairs": 45, "tokens": 0},
        "set_aside": {},
    }
    assert sorted(calls.read_text().split("\n")) == sorted(
        ["", "query 0", "query 10", "query 20", "query 10", "query 30"]
    )
    after = {name: record["checksum"] for name, record in CommitLog(out).committed().items()}
    assert before.items() <= after.items()


def test_labels_are_kept_under_the_content_of_their_shard(tmp_path: Path) -> None:
    groups = CommitLog(str(tmp_path / "generate"))
    groups.commit("groups-0000000000-0000000002", make_groups(0, 2), "g", {"pairs": 6})
    (shard,) = shards_to_label(groups, list(groups.committed()))
    groups_again = CommitLog(str(tmp_path / "other"))
    groups_again.commit("groups-0000000000-0000000002", make_groups(5, 7), "g", {"pairs": 6})
    (other,) = shards_to_label(groups_again, list(groups_again.committed()))
    assert shard.label_name != other.label_name


def with_bytes(groups: pa.Table, marker: str, raw: bytes) -> pa.Table:
    """A table with text that is no UTF-8 in the place of a marker of the same length, as Parquet files may hold it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, groups.schema) as writer:
        writer.write_table(groups)
    content = sink.getvalue().to_pybytes()
    assert len(marker) == len(raw)
    assert content.count(marker.encode()) == 1
    return pa.ipc.open_stream(content.replace(marker.encode(), raw)).read_all()


def test_a_shard_with_rotten_rows_names_them_and_labels_the_others(ray_sees_this_module: None, tmp_path: Path) -> None:
    rows = make_groups(0, 3, products=6).to_pylist()
    for group in rows:
        for product in group["products"]:
            product["fields"] |= {"title": "red steel bottle", "attributes": []}
    rotten = {
        "NUL": rows[0]["products"][0]["fields"],
        "characters": rows[0]["products"][1]["fields"],
        "Unicode": rows[1]["products"][2]["fields"],
        "mapping": rows[1]["products"][3],
    }
    rotten["NUL"]["title"] = "a\x00b"
    rotten["characters"]["description"] = "x" * 1_000_000
    rotten["Unicode"]["brand"] = "@MARKER@"
    rotten["mapping"]["fields"] = None
    rows[2]["query"] = " "
    shards = commit_groups(
        tmp_path / "groups",
        [with_bytes(pa.Table.from_pylist(rows, schema=GROUP), "@MARKER@", b"caf\xe9 \xff!!"), make_groups(5, 6)],
    )
    out = tmp_path / "label"
    factory = partial(open_engine, EngineOptions(engine="oracle"), None, MARKET_SCALE)
    summary = label(shards, str(out), "key", factory)
    assert (summary["pairs"], summary["errors"], summary["set_aside"]) == (21, 4 + 6, {})
    labeled = CommitLog(str(out)).read(shards[0].label_name)
    errors = labeled.column("products").combine_chunks().flatten().field("error").to_pylist()
    failed = {index: error for index, error in enumerate(errors) if error is not None}
    assert list(failed) == [0, 1, 8, 9, *range(12, 18)]
    for number, word in zip((0, 1, 8, 9, 12), (*rotten, "empty"), strict=True):
        assert word in failed[number]
    logits = labeled.column("products").combine_chunks().flatten().field("logit").to_pylist()
    assert all((logit is None) == (index in failed) for index, logit in enumerate(logits))
    again = label(shards, str(out), "key", factory, retry=True)
    assert again["errors"] == 10


class NotingEngine(LengthEngine):
    """Writes down every pair that it is asked for."""

    def label(self, pairs: Sequence[Pair]) -> Labels:
        with self.calls.open("a") as file:
            file.writelines(f"{pair.query}/{pair.product_id}\n" for pair in pairs)
        lengths = np.array([len(pair.query) + len(pair.product["title"]) for pair in pairs], dtype=np.float32)
        return Labels(np.stack([np.zeros_like(lengths), lengths], axis=1), [None] * len(pairs), [None] * len(pairs))


def commit_groups(folder: Path, tables: Sequence[pa.Table]) -> list[Shard]:
    log = CommitLog(str(folder))
    for number, table in enumerate(tables):
        pairs = len(table.column("products").combine_chunks().flatten())
        log.commit(f"groups-{number:03d}", table, "generated", {"pairs": pairs})
    return shards_to_label(log, [f"groups-{number:03d}" for number in range(len(tables))])


def test_a_nightly_run_asks_only_for_what_is_new(ray_sees_this_module: None, tmp_path: Path) -> None:
    out, calls = tmp_path / "label", tmp_path / "calls"
    first = commit_groups(tmp_path / "monday", [make_groups(0, 20), make_groups(20, 40)])
    label(first, str(out), "key", partial(NotingEngine, calls))
    assert len(calls.read_text().splitlines()) == 120

    # A query is new, one has a new product, one product has another title; all shards are cut elsewhere.
    groups = [*make_groups(0, 13).to_pylist(), *make_groups(900, 901).to_pylist(), *make_groups(13, 40).to_pylist()]
    groups[3]["products"] += [make_groups(3, 4, products=5).to_pylist()[0]["products"][4]]
    groups[30]["products"][1]["fields"]["title"] = "another title"
    groups[35]["query"] = "Query 34"
    expected = {
        *(f"query 900/p{n}" for n in range(3)),
        "query 3/p4",
        "query 29/p1",
        *(f"Query 34/p{n}" for n in range(3)),  # a model may well see upper case
    }
    tables = [pa.Table.from_pylist(groups[at : at + 11], schema=GROUP) for at in range(0, len(groups), 11)]
    calls.unlink()
    second = commit_groups(tmp_path / "tuesday", tables)
    summary = label(second, str(out), "key", partial(NotingEngine, calls))
    assert set(calls.read_text().splitlines()) == expected
    assert summary["pairs"] == 41 * 3 + 1
    assert summary["reused"] == summary["pairs"] - len(expected)
    log = CommitLog(str(out))
    labeled = pa.concat_tables([log.read(shard.label_name) for shard in second])
    assert labeled.select(["query", "query_id"]).equals(pa.concat_tables(tables).select(["query", "query_id"]))
    for row in labeled.to_pylist():
        for product in row["products"]:
            assert product["logit"] == len(row["query"]) + len(product["fields"]["title"])
            assert product["class_logits"] == [0.0, product["logit"]]

    # Nothing new at all, in other shards: the engine is not even opened.
    calls.unlink()
    third = commit_groups(tmp_path / "wednesday", [pa.concat_tables(tables)])
    again = label(third, str(out), "key", partial(NotingEngine, calls))
    assert again["reused"] == summary["pairs"]
    assert again["labeled_now"] == {"pairs": 0, "tokens": 0}
    assert not calls.exists()

    # What was gone for two nights and is back is known, but for what read otherwise when it was labeled last.
    fourth = commit_groups(tmp_path / "thursday", [make_groups(0, 40)])
    label(fourth, str(out), "key", partial(NotingEngine, calls))
    assert set(calls.read_text().splitlines()) == {"query 29/p1", *(f"query 34/p{n}" for n in range(3))}
