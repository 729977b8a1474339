"""The shadow log: sampled requests as Parquet, texts only if asked, and a query log for the next round."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from tiny_student import build_tiny_student

from relevance_ray.data.files import query_log
from relevance_ray.serving import shadow_log
from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer
from relevance_ray.serving.shadow_log import SHADOW, Answered, ShadowLog

PRODUCTS = ["red running shoes", {"product_id": "p2", "title": "leather wallet"}]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(build_tiny_student(tmp_path_factory.mktemp("models") / "student"))


def logged(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])


def serve_some(scorer: Scorer, options: ServeOptions, queries: list[str]) -> None:
    with TestClient(create_app(scorer, options)) as client:
        for query in queries:
            assert client.post("/score", json={"query": query, "products": PRODUCTS}).status_code == 200
        assert client.post("/score", json={"query": "", "products": PRODUCTS}).status_code == 422
        client.post("/v2/rerank", json={"query": "by rerank", "documents": ["red shoes"]})
        assert client.post("/rerank", json={"query": "refused", "texts": ["shoes " * 60]}).status_code == 422


def test_what_is_logged_is_what_was_answered(scorer: Scorer, tmp_path: Path) -> None:
    options = ServeOptions(shadow_log=str(tmp_path / "log"), shadow_share=1.0, shadow_text=True)
    serve_some(scorer, options, ["red shoes", "wallet", "Red  shoes"])
    table = logged(tmp_path / "log")
    assert table.schema == SHADOW
    assert table["query"].to_pylist() == ["red shoes", "wallet", "Red  shoes", "by rerank"]
    assert table["route"].to_pylist() == ["/score"] * 3 + ["/v2/rerank"]
    assert set(table["model_id"].to_pylist()) == {scorer.model_id}
    expected = scorer.score("red shoes", PRODUCTS)
    [first, second] = table["products"][0].as_py()
    assert (first["product_id"], first["title"]) == (None, "red running shoes")
    assert (second["product_id"], second["grade"]) == ("p2", expected[1]["grade"])
    assert [first["logit"], second["logit"]] == pytest.approx([row["logit"] for row in expected], abs=1e-5)


def test_without_being_asked_no_text_is_kept(scorer: Scorer, tmp_path: Path) -> None:
    options = ServeOptions(shadow_log=str(tmp_path / "log"), shadow_share=1.0)
    serve_some(scorer, options, ["a secret query"])
    [file] = (tmp_path / "log").glob("*.parquet")
    for secret in (b"secret", b"running", b"wallet"):
        assert secret not in file.read_bytes()
    table = logged(tmp_path / "log")
    assert table["query"].null_count == table.num_rows == 2
    assert [product["product_id"] for product in table["products"][0].as_py()] == [None, "p2"]


def test_a_share_of_the_requests_is_kept(tmp_path: Path) -> None:
    log = ShadowLog(str(tmp_path), 0.2, False, "m")
    rows = [{"logit": 0.0, "probability": 0.5, "score": 0.5, "grade": "E", "truncated": False}]
    for _ in range(2000):
        log.record(Answered("/score", "q", ["p"], rows, 1.0))
    log.close()
    assert 300 < logged(tmp_path).num_rows < 500


def test_the_log_is_a_query_log_for_the_next_round(scorer: Scorer, tmp_path: Path) -> None:
    options = ServeOptions(shadow_log=str(tmp_path / "log"), shadow_share=1.0, shadow_text=True)
    serve_some(scorer, options, ["red shoes", "wallet"])
    serve_some(scorer, options, ["red shoes"])
    tables = list(query_log(str(tmp_path / "log"))())
    queries = pa.concat_tables(tables)
    assert sorted(queries["query"].to_pylist()) == ["by rerank", "by rerank", "red shoes", "red shoes", "wallet"]
    assert set(queries["frequency"].to_pylist()) == {1}


def test_what_was_written_and_lost_is_counted(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow_log, "SECONDS", 0.0)
    options = ServeOptions(shadow_log=str(tmp_path / "log"), shadow_share=1.0)
    with TestClient(create_app(scorer, options)) as client:
        client.post("/score", json={"query": "red", "products": PRODUCTS})
        deadline = time.monotonic() + 20
        while "relevance_ray_shadow_logged_requests_total 1.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "relevance_ray_shadow_lost_requests_total 0.0" in client.get("/metrics").text


def test_a_log_that_cannot_be_written_loses_rows_and_no_request(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shadow_log, "write_table", full)
    counted: list[tuple[int, int]] = []
    log = ShadowLog(str(tmp_path / "log"), 1.0, True, "m", lambda *rows: counted.append(rows))
    log.record(Answered("/score", "q", PRODUCTS, scorer.score("red", PRODUCTS), 1.0))
    log.close()
    assert counted == [(0, 1)]


def test_rows_that_no_writer_keeps_up_with_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(shadow_log, "MAX_WAITING", 7)
    monkeypatch.setattr(shadow_log, "PRODUCTS", 1)
    monkeypatch.setattr(shadow_log, "write_table", lambda *_: gate.wait())
    counted: list[tuple[int, int]] = []
    log = ShadowLog(str(tmp_path), 1.0, False, "m", lambda *rows: counted.append(rows))
    row = {"logit": 0.0, "probability": 0.5, "score": 0.5, "grade": "E", "truncated": False}
    for _ in range(10):
        log.record(Answered("/score", "q", ["a", "b"], [row, row], 1.0))
    gate.set()
    log.close()
    written, lost = (sum(column) for column in zip(*counted, strict=True))
    assert written + lost == 10
    assert lost == 7
