"""Queries of a language model on their way into the pool: parts, round trips, growth, refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_endpoint import ChatEndpoint
from small_catalog import LEXICAL, make_prepared, make_products, make_search

from relevance_ray.cluster.workers import Workers
from relevance_ray.engines.options import EndpointOptions
from relevance_ray.errors import UserError
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.generate.pipeline import generate
from relevance_ray.generate.queries.sources import PoolCounts
from relevance_ray.generate.queries.written import WRITTEN, WrittenPlan, round_trip, written_queries
from relevance_ray.generate.writer_options import STYLES, WriterOptions
from relevance_ray.storage import CommitLog

HELD_OUT = "acme red wool hat"


def llm_options(**values: Any) -> GenerateOptions:
    return GenerateOptions(**{"source": "llm", "quotas": LEXICAL, "groups_per_shard": 8, **values})


def test_every_product_is_asked_once_in_a_round_and_the_order_differs_by_round(tmp_path: Path) -> None:
    catalog, _, _ = make_search(tmp_path, make_products(2))
    plan = WrittenPlan(llm_options(), catalog)
    assert (plan.parts_per_round, plan.num_parts) == (4, 4 * len(STYLES))
    rounds = [np.concatenate([plan.rows(4 * number + place)[1] for place in range(4)]) for number in (0, 1)]
    assert [plan.rows(part)[0] for part in (0, 3, 4, 19)] == [0, 0, 1, 4]
    for rows in rounds:
        assert sorted(rows.tolist()) == list(range(480))
    assert (rounds[0] != rounds[1]).mean() > 0.9


def part(first: int, reasons: dict[int, str], size: int = 128) -> pa.Table:
    rows = [
        {
            "anchor": row,
            "style": "plain",
            "query": "" if row in reasons else f"thing number {row * 7919}",
            "reason": reasons.get(row),
            "answer": "x",
        }
        for row in range(first, first + size)
    ]
    return pa.Table.from_pylist(rows, schema=WRITTEN)


def test_parts_are_written_as_far_ahead_as_queries_are_wanted_and_no_further() -> None:
    asked: list[list[int]] = []

    def read(parts: Sequence[int]) -> Iterator[pa.Table]:
        asked.append(list(parts))
        for number in parts:
            yield part(128 * number, dict.fromkeys(range(128 * number, 128 * number + 96), "length"))

    counts = PoolCounts()
    options = llm_options(llm=WriterOptions(round_trip_depth=0))
    stream = written_queries(read, 100, 200, lambda queries, anchors: [True] * len(queries), options, counts)
    found = [query for _, query in zip(range(200), stream, strict=False)]
    assert len(found) == 200
    # Half is hoped for, a quarter comes: four parts, then what a quarter needs for the rest.
    assert asked == [[0, 1, 2, 3], [4, 5, 6]]
    assert counts.refused["length"] == 7 * 96
    assert {query.anchor // 128 for query in found} == set(range(7))


def test_more_queries_than_were_thought_of_are_not_written_a_part_at_a_time() -> None:
    asked: list[int] = []

    def read(parts: Sequence[int]) -> Iterator[pa.Table]:
        asked.append(len(parts))
        for number in parts:
            yield part(128 * number, dict.fromkeys(range(128 * number, 128 * number + 64), "length"))

    options = llm_options(llm=WriterOptions(round_trip_depth=0))
    stream = written_queries(read, 100, 500, lambda queries, anchors: [True] * len(queries), options, PoolCounts())
    assert len([query for _, query in zip(range(2000), stream, strict=False)]) == 2000
    assert len(asked) <= 8


def test_a_query_that_does_not_find_its_product_or_was_almost_written_before_is_refused() -> None:
    table = part(0, {}, 4).to_pylist()
    table[2]["query"] = table[0]["query"]
    counts = PoolCounts()
    options = llm_options()
    stream = written_queries(
        lambda parts: iter([pa.Table.from_pylist(table, schema=WRITTEN)]),
        1,
        4,
        lambda queries, anchors: [anchor != 1 for anchor in anchors],
        options,
        counts,
    )
    assert [query.anchor for query in stream] == [0, 3]
    assert counts.refused == {"round_trip": 1, "near_duplicate": 1}


def test_a_round_trip_accepts_a_twin_of_the_product(tmp_path: Path) -> None:
    products = [*make_products(), make_products()[3] | {"product_id": "twin"}]
    catalog, lexicon, search = make_search(tmp_path, products)
    finds = round_trip(catalog, lexicon, search, depth=1)
    assert finds(["acme red desk lamp", "acme red desk lamp", "yoga mat", "zzz"], [3, 240, 3, 3]) == [
        True,
        True,
        False,
        False,
    ]
    assert round_trip(catalog, lexicon, search, depth=0)(["zzz"], [3]) == [True]
    assert finds([], []) == []


def write(message: str) -> str:
    """A query as a good model gives it, for some products one that must not come through."""
    title = message.splitlines()[0].removeprefix("Product: ")
    brand, color, *kind = title.split(" with ")[0].split()
    if brand == "Bolt":
        return title
    if brand == "Cord":
        return "something to cook dinner on"
    if brand == "Dune":
        return HELD_OUT
    return f"Query: {color} {' '.join(kind)} {brand}".lower()


def test_written_queries_become_groups_and_a_larger_run_asks_no_product_twice(
    tmp_path: Path, ray_cluster: None
) -> None:
    pytest.importorskip("openai")
    prepared = make_prepared(tmp_path / "prepare", make_products(4), [], [HELD_OUT, "something else"])
    out = tmp_path / "generate"
    with ChatEndpoint(write=write) as endpoint:
        writer = WriterOptions(
            engine="openai", openai=EndpointOptions(model="writer", base_url=endpoint.url), styles={"plain": 1}
        )
        first = generate(llm_options(num_pairs=160, llm=writer), str(prepared), str(out), workers=Workers(2))
        asked = len(endpoint.requests)
        second = generate(llm_options(num_pairs=480, llm=writer), str(prepared), str(out), workers=Workers(2))
        messages = [request["messages"][-1]["content"] for request in endpoint.requests]
    assert first["sources"] == {"llm": 20}
    assert asked == 128, "one part is enough for 20 queries"
    assert second["sources"] == {"llm": 60}
    assert len(messages) == len(set(messages)) > asked
    refused = second["left_out"]["refused"]
    assert refused["verbatim"] > 20
    assert refused["unrelated"] + refused.get("round_trip", 0) > 20
    assert second["left_out"]["leaks"]["llm"] + second["left_out"]["repeats"].get("llm", 0) >= 1
    groups = pa.concat_tables([pq.read_table(path) for path in CommitLog(str(out)).files()]).to_pylist()
    assert len(groups) == 60
    assert HELD_OUT not in {group["query"] for group in groups}
    for group in groups:
        assert group["query_source"] == "llm"
        assert group["query"].split()[-1] in ("acme", "echo")


@pytest.mark.slow  # Ray takes its time to give CPUs back that both stages want
def test_written_queries_are_checked_by_search_actors_where_there_are_any(tmp_path: Path, ray_cluster: None) -> None:
    pytest.importorskip("openai")
    prepared = make_prepared(tmp_path / "prepare", make_products(4), [], [HELD_OUT])
    found = []
    with ChatEndpoint(write=write) as endpoint:
        writer = WriterOptions(
            engine="openai", openai=EndpointOptions(model="writer", base_url=endpoint.url), styles={"plain": 1}
        )
        for name, actors, per_shard in (("whole", 0, 1000), ("spread", 2, 300)):
            options = llm_options(num_pairs=640, llm=writer, products_per_shard=per_shard)
            out = str(tmp_path / name)
            # Two search actors beside two writers of two CPUs each are more than the four CPUs that are there.
            generate(options, str(prepared), out, workers=Workers(2), search_actors=actors, writers=Workers(2, cpus=2))
            found.append(pa.concat_tables([pq.read_table(path) for path in CommitLog(out).files()]).to_pylist())
    assert found[0] == found[1]


def test_a_model_that_cannot_be_had_is_one_sentence(tmp_path: Path, ray_cluster: None) -> None:
    pytest.importorskip("openai")
    prepared = make_prepared(tmp_path / "prepare", make_products(), [], [])
    with ChatEndpoint(fault=lambda body, before: (401, {})) as endpoint:
        writer = WriterOptions(engine="openai", openai=EndpointOptions(model="writer", base_url=endpoint.url))
        with pytest.raises(UserError, match="key"):
            generate(llm_options(num_pairs=160, llm=writer), str(prepared), str(tmp_path / "generate"))
    writer = WriterOptions(model="no-such-model")
    with pytest.raises(UserError, match="no-such-model"):
        generate(llm_options(num_pairs=160, llm=writer), str(prepared), str(tmp_path / "other"))


def test_llm_options_without_the_source_are_refused() -> None:
    with pytest.raises(ValueError, match="only read with source llm"):
        GenerateOptions(source="log", llm=WriterOptions(max_words=5))
