"""The scorer, its HTTP interface, and the same behind a real Ray Serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from fastapi.testclient import TestClient
from tiny_student import build_tiny_student

from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.schema import SCALES
from relevance_ray.scoring import score_file
from relevance_ray.serving.app import running_server
from relevance_ray.serving.http import MAX_PRODUCTS, create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer, UnscorableError

PRODUCTS: list[Any] = [
    "red running shoes",
    {"title": "leather wallet", "color": "red", "brand": "acme"},
    {"product_id": "p3", "title": "phone case with a cotton shirt", "price": 9.5, "attributes": {"for": "phone"}},
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_student(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def scorer(student: Path) -> Scorer:
    return Scorer(student)


@pytest.fixture(scope="module")
def client(scorer: Scorer) -> Iterator[TestClient]:
    with TestClient(create_app(scorer)) as client:
        yield client


def test_scores_are_the_models_logits_through_its_calibration(student: Path, scorer: Scorer) -> None:
    rows = scorer.score("red shoes", PRODUCTS)
    logits = load_pair_model(student).logits(["red shoes"] * 3, [{"title": PRODUCTS[0]}, *PRODUCTS[1:]])
    # build_tiny_student: slope 1.5, thresholds -1, 0, 1; ESCI is relevant from its last grade, gains 0, .01, .1, 1
    at_least = 1 / (1 + np.exp(-(1.5 * logits[:, None] - np.array([-1.0, 0.0, 1.0]))))
    classes = np.stack([1 - at_least[:, 0], *(at_least[:, :-1] - at_least[:, 1:]).T, at_least[:, -1]], axis=1)
    np.testing.assert_allclose([row["logit"] for row in rows], logits, atol=1e-5)
    np.testing.assert_allclose([row["probability"] for row in rows], at_least[:, 2], atol=1e-5)
    np.testing.assert_allclose([row["score"] for row in rows], classes @ [0, 0.01, 0.1, 1], atol=1e-5)
    assert [row["grade"] for row in rows] == [SCALES["esci"].grades[k] for k in classes.argmax(axis=1)]
    assert [row["truncated"] for row in rows] == [False, False, False]


def test_long_product_is_cut_and_says_so(scorer: Scorer) -> None:
    short, long, longer = scorer.score("red", ["shoes", "shoes " * 50, "shoes " * 60])
    assert (short["truncated"], long["truncated"], longer["truncated"]) == (False, True, True)
    assert long["logit"] == pytest.approx(longer["logit"], abs=1e-5)


def test_one_unscorable_product_is_named_by_its_place(scorer: Scorer) -> None:
    with pytest.raises(UnscorableError, match=r"product 1: the product has no text .*title, brand, color"):
        scorer.score("red", ["shoes", {"price": 3.0}])
    with pytest.raises(UnscorableError, match=r"^the query is empty"):
        scorer.score(" ", ["shoes"])
    with pytest.raises(UnscorableError, match="the query has"):
        scorer.score("red " * 40, ["shoes"])


def test_concurrent_calls_give_the_answers_of_single_calls(scorer: Scorer) -> None:
    queries = ["red shoes", "blue case", "green wallet", "cotton shirt"]
    alone = [scorer.score(query, PRODUCTS) for query in queries]
    together: list[Any] = [None] * len(queries)

    def work(place: int) -> None:
        for _ in range(5):
            together[place] = scorer.score(queries[place], PRODUCTS)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_http_answers_what_the_scorer_says(client: TestClient, scorer: Scorer) -> None:
    answer = client.post("/score", json={"query": "red shoes", "products": PRODUCTS})
    assert answer.status_code == 200
    expected = scorer.score("red shoes", PRODUCTS)
    assert answer.json()["results"] == [
        {"product_id": given, **row, "stage": None} for given, row in zip([None, None, "p3"], expected, strict=True)
    ]


def test_http_answers_what_the_score_command_writes(client: TestClient, student: Path, tmp_path: Path) -> None:
    products = ["red running shoes", "leather wallet", "phone case with a cotton shirt", "shoes " * 50]
    rows = [(query, title) for query in ("red shoes", "blue case", "9") for title in products]
    pq.write_table(pa.table({"query": [q for q, _ in rows], "title": [t for _, t in rows]}), tmp_path / "in.parquet")
    score_file(student, tmp_path / "in.parquet", tmp_path / "out.parquet")
    written = pq.read_table(tmp_path / "out.parquet").to_pylist()
    for start in range(0, len(rows), len(products)):
        of_query = written[start : start + len(products)]
        answer = client.post("/score", json={"query": of_query[0]["query"], "products": products}).json()["results"]
        for name in ("logit", "probability", "score"):
            assert [row[name] for row in answer] == pytest.approx([row[name] for row in of_query], abs=1e-5)


def test_http_takes_a_thousand_products_and_refuses_one_more(client: TestClient) -> None:
    full = client.post("/score", json={"query": "red", "products": ["shoes"] * MAX_PRODUCTS})
    assert len(full.json()["results"]) == MAX_PRODUCTS == 1000
    over = client.post("/score", json={"query": "red", "products": ["shoes"] * (MAX_PRODUCTS + 1)})
    assert over.status_code == 422
    assert over.json()["detail"].startswith("products: List should have at most 1000 items")


def test_health_and_info_describe_the_model(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    info = client.get("/info").json()
    assert (info["model"], info["kind"], info["scale"]["name"]) == ("student", "cross_encoder", "esci")
    assert (info["fields"], info["max_tokens"], info["max_products"]) == (["title", "brand", "color"], 32, 1000)


BAD_BODIES = {
    "no JSON": (b"{", "the body is no JSON"),
    "invalid UTF-8": (b'{"query": "caf\xe9", "products": ["a"]}', "it is not UTF-8"),
    "empty body": (b"", "no JSON object; send one"),
    "no products key": (b'{"query": "red"}', "products: Field required"),
    "no products": (b'{"query": "red", "products": []}', "products: List should have at least 1 item"),
    "empty query": (b'{"query": " ", "products": ["a"]}', "the query is empty"),
    "query of a wrong type": (b'{"query": 5, "products": ["a"]}', "query: Input should be a valid string"),
    "product of a wrong type": (b'{"query": "red", "products": [5]}', "products.0: a product is a text or an object"),
    "null product": (b'{"query": "red", "products": ["a", null]}', "products.1: a product is a text or an object"),
    "misspelt field": (
        b'{"query": "red", "products": [{"titel": "a"}]}',
        "products.0.titel: there is no such key",
    ),
    "unknown key": (b'{"query": "red", "products": ["a"], "top_k": 3}', "top_k: there is no such key"),
    "NaN price": (
        b'{"query": "red", "products": [{"title": "a", "price": NaN}]}',
        "products.0.price: Input should be a finite number",
    ),
    "lone surrogate": (b'{"query": "\\ud800", "products": ["a"]}', "query"),
    "NUL": (b'{"query": "red", "products": ["a\\u0000"]}', "product 0: the product's title holds a NUL"),
    "product without text": (b'{"query": "red", "products": [{"price": 3}]}', "product 0: the product has no text"),
    "long query": (b'{"query": "' + b"red " * 40 + b'", "products": ["a"]}', "the query has"),
    "huge text": (b'{"query": "red", "products": ["' + b"a" * 1_000_000 + b'"]}', "at most 100000 characters"),
    "an array": (b"[]", "no JSON object; send one"),
    "deep nesting": (b"[" * 100_000, "nested too deep"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_request_gets_a_4xx_with_a_reason(client: TestClient, case: str) -> None:
    body, reason = BAD_BODIES[case]
    answer = client.post("/score", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert isinstance(answer.json()["detail"], str)
    assert reason in answer.json()["detail"]


def test_ray_serve_answers_as_the_scorer_and_leaves_a_running_ray_alone(
    ray_cluster: None, student: Path, scorer: Scorer
) -> None:
    import ray

    with running_server(student, port=0) as server:
        url = server.url
        assert requests.get(f"{url}/health", timeout=30).json() == {"status": "ok"}
        answer = requests.post(f"{url}/score", json={"query": "red shoes", "products": PRODUCTS}, timeout=30)
        expected = scorer.score("red shoes", PRODUCTS)
        assert [row["logit"] for row in answer.json()["results"]] == pytest.approx(
            [row["logit"] for row in expected], abs=1e-5
        )
        bad = requests.post(f"{url}/score", data="{", headers={"content-type": "application/json"}, timeout=30)
        assert bad.status_code == 422
    assert ray.is_initialized()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)


def test_served_until_ctrl_c_then_ends_cleanly(student: Path) -> None:
    code = f"from relevance_ray.serving.app import serve_model; serve_model({str(student)!r}, port=0)"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's SIGINT is ignored
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Serving"))
        url = line.split(" at ")[1].split(";")[0]
        answer = requests.post(f"{url}/score", json={"query": "red", "products": ["shoes"]}, timeout=30)
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0
        assert rest.strip().endswith("Stopped.")
    finally:
        process.kill()


def test_taken_port_and_bad_folder_are_refused_before_ray_starts(student: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port}"),
            running_server(student, port=port),
        ):
            pass
    with pytest.raises(UserError, match="is no model folder"), running_server(tmp_path):
        pass
    with pytest.raises(UserError, match="port 70000 does not exist"), running_server(student, port=70000):
        pass
    with (
        pytest.raises(UserError, match=r"cannot listen on nowhere\.invalid"),
        running_server(student, "nowhere.invalid"),
    ):
        pass


def test_serve_options_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ServeOptions(num_replicas=0)
