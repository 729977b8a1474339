"""What stands before the scorer: tokens, limits of bodies, the queue that sheds, other origins, and what is counted."""

from __future__ import annotations

import asyncio
import gc
import http.client
import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from fastapi.testclient import TestClient
from on_a_socket import on_a_socket
from tiny_student import WORDS, build_tiny_student

from relevance_ray.errors import UserError
from relevance_ray.serving import guard
from relevance_ray.serving.guard import Tokens
from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.queue import OverloadedError, ScoringQueue
from relevance_ray.serving.scorer import Scorer
from relevance_ray.serving.turns import Work

REQUEST = {"query": "red", "products": ["red running shoes", "leather wallet"]}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(build_tiny_student(tmp_path_factory.mktemp("models") / "student"))


@pytest.fixture(scope="module")
def server(scorer: Scorer) -> Iterator[tuple[str, int]]:
    """The application on a real socket, with small limits."""
    with on_a_socket(create_app(scorer, ServeOptions(max_body_mb=0.2, body_seconds=1.0))) as address:
        yield address


def tokens_file(folder: Path, text: str) -> str:
    path = folder / "tokens"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_with_tokens_only_their_bearers_are_answered(scorer: Scorer, tmp_path: Path) -> None:
    options = ServeOptions(tokens_file=tokens_file(tmp_path, "# of the shop\nfirst-token\n\nsecond-token\n"))
    with TestClient(create_app(scorer, options)) as client:
        for token in ("first-token", "second-token"):
            answer = client.post("/score", json=REQUEST, headers={"Authorization": f"Bearer {token}"})
            assert answer.status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer third-token"},
            {"Authorization": "Basic first-token"},
            {"Authorization": "first-token"},
            {"Authorization": "Bearer # of the shop"},
        ):
            for path, key in (("/score", "detail"), ("/v2/rerank", "message"), ("/rerank", "error")):
                refused = client.post(path, json=REQUEST, headers=headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.json()[key].startswith("give a valid token")
            for path in ("/info", "/metrics", "/examples", "/docs", "/openapi.json"):
                assert client.get(path, headers=headers).status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no token"),
        ("# nothing\n\n", "holds no token"),
        ("fine\ntwo words\n", "line 2 is no token"),
        ("caf\u00e9\n", "line 1 is no token"),
    ],
)
def test_a_file_without_good_tokens_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Tokens.read(tokens_file(tmp_path, text))
    with pytest.raises(UserError, match=r"cannot read serve\.tokens_file"):
        Tokens.read(str(tmp_path / "absent"))


def test_a_large_body_is_answered_413_though_its_client_sends_it_to_the_end(server: tuple[str, int]) -> None:
    host, port = server
    body = json.dumps({"query": "red", "products": ["x" * 1000] * 50_000}).encode()
    assert len(body) > 50e6
    answer = requests.post(
        f"http://{host}:{port}/score", data=body, headers={"Content-Type": "application/json"}, timeout=30
    )
    assert answer.status_code == 413
    assert answer.json()["detail"] == "the body is larger than 200,000 bytes; send fewer products"
    chunked = requests.post(f"http://{host}:{port}/score", data=iter([b"x" * 50_000] * 10), timeout=30)
    assert chunked.status_code == 413


def test_a_slow_body_is_answered_408_and_holds_nobody_up(server: tuple[str, int]) -> None:
    host, port = server
    slow = [http.client.HTTPConnection(host, port, timeout=30) for _ in range(8)]
    for connection in slow:
        connection.putrequest("POST", "/score")
        connection.putheader("Content-Length", "100")
        connection.endheaders()
        connection.send(b'{"query": ')
    assert requests.post(f"http://{host}:{port}/score", json=REQUEST, timeout=30).status_code == 200
    for connection in slow:
        answer = connection.getresponse()
        assert answer.status == 408
        assert json.loads(answer.read())["detail"] == "the body did not arrive within 1 s"
        connection.close()


def test_bodies_that_are_held_at_once_are_bounded_together(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODIES_HELD", 2)
    part = b"x" * 90_000
    with on_a_socket(create_app(scorer, ServeOptions(max_body_mb=0.1, body_seconds=30))) as (host, port):
        held = [http.client.HTTPConnection(host, port, timeout=30) for _ in range(3)]
        for connection in held:
            connection.putrequest("POST", "/score")
            connection.putheader("Content-Length", str(len(part) + 1))
            connection.endheaders()
            connection.send(part)
            time.sleep(0.2)
        held[2].send(b"x")
        answer = held[2].getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        for connection in held[:2]:
            connection.send(b"x")
            assert connection.getresponse().status == 422
        assert requests.post(f"http://{host}:{port}/score", json=REQUEST, timeout=30).status_code == 200


def test_what_we_broke_is_a_500_in_the_clients_shape(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret query")

    with TestClient(create_app(scorer), raise_server_exceptions=False) as client:
        monkeypatch.setattr(scorer, "run", broken)
        for path, body, key in (
            ("/score", REQUEST, "detail"),
            ("/v2/rerank", {"query": "red", "documents": ["a"]}, "message"),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 500
            assert answer.json()[key] == "the server failed; its log says how"
            assert answer.headers["x-model-id"] == scorer.model_id
        assert 'relevance_ray_requests_total{route="/score",status="500"} 1.0' in client.get("/metrics").text


def test_a_body_of_another_kind_is_told_what_to_send(server: tuple[str, int]) -> None:
    host, port = server
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/plain"}):
        answer = requests.post(f"http://{host}:{port}/score", data=json.dumps(REQUEST), headers=headers, timeout=30)
        assert answer.status_code == 422
        assert answer.json()["detail"].endswith("send one, with the header Content-Type: application/json")


def test_a_compressed_body_is_refused_by_name(server: tuple[str, int]) -> None:
    host, port = server
    answer = requests.post(
        f"http://{host}:{port}/score", data=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}, timeout=30
    )
    assert answer.status_code == 415
    assert answer.json()["detail"] == "the body is compressed; send it as it is"


def test_pages_of_other_origins_ask_only_where_they_are_named(scorer: Scorer) -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    with TestClient(create_app(scorer)) as client:
        assert "access-control-allow-origin" not in client.options("/score", headers=asked).headers
        assert "access-control-allow-origin" not in client.post("/score", json=REQUEST, headers=asked).headers
    with TestClient(create_app(scorer, ServeOptions(cors_origins=["https://shop.example"]))) as client:
        assert client.options("/score", headers=asked).headers["access-control-allow-origin"] == "https://shop.example"
        other = {**asked, "Origin": "https://elsewhere.example"}
        assert "access-control-allow-origin" not in client.options("/score", headers=other).headers


async def ask(queue: ScoringQueue, num_pairs: int, act: Callable[[], Any]) -> Any:
    """What `act` gives, run in the place of a model."""
    with queue.admitted(num_pairs):
        found, _ = await queue.run(
            lambda held=act: Work(lambda _: held(), lambda outputs: outputs, num_pairs=num_pairs)
        )
    return found


def run_many(queue: ScoringQueue, sizes: list[int], seconds: float = 0.1) -> list[Any]:
    """What becomes of requests that all arrive while the first is worked on."""

    async def run() -> list[Any]:
        async def one(place: int) -> int:
            return await ask(queue, sizes[place], lambda: time.sleep(seconds) or place)

        first = asyncio.create_task(one(0))
        await asyncio.sleep(seconds / 4)
        return await asyncio.gather(first, *(one(place) for place in range(1, len(sizes))), return_exceptions=True)

    return asyncio.run(run())


def test_the_queue_refuses_what_it_could_answer_only_late() -> None:
    depths: list[int] = []
    queue = ScoringQueue(2, 1000, depths.append)
    run_many(queue, [10])
    found = run_many(queue, [10, 10, 10, 10, 10])
    assert found[:3] == [0, 1, 2]
    assert [type(each) for each in found[3:]] == [OverloadedError, OverloadedError]
    assert found[3].retry_after == 1
    assert max(depths) == 3
    assert depths[-1] == 0


def test_the_queue_counts_pairs_and_takes_a_large_request_when_none_waits() -> None:
    queue = ScoringQueue(10, 100)
    assert [isinstance(each, OverloadedError) for each in run_many(queue, [5, 900, 5])] == [False, False, True]
    assert [isinstance(each, OverloadedError) for each in run_many(queue, [5, 50, 40, 30])] == [
        False,
        False,
        False,
        True,
    ]


def test_retry_after_is_about_when_the_queue_is_empty() -> None:
    queue = ScoringQueue(1, 10_000)
    run_many(queue, [10], seconds=0.1)  # 100 pairs a second
    found = run_many(queue, [200, 200, 10], seconds=0.05)
    assert isinstance(found[2], OverloadedError)
    assert 3 <= found[2].retry_after <= 10


def test_a_caller_that_went_away_is_not_scored() -> None:
    worked: list[str] = []

    async def run() -> None:
        queue = ScoringQueue(5, 100)
        first = asyncio.create_task(ask(queue, 1, lambda: time.sleep(0.1) or worked.append("first")))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(ask(queue, 1, lambda: worked.append("gone")))
        last = asyncio.create_task(ask(queue, 1, lambda: worked.append("last")))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.gather(first, last)

    asyncio.run(run())
    assert worked == ["first", "last"]


class Products:
    """Something large that a caller sent."""


@pytest.mark.parametrize("busy_with", ["the model", "tokens"])
def test_what_a_caller_sent_is_let_go_when_it_leaves(busy_with: str) -> None:

    async def run() -> None:
        queue = ScoringQueue(5, 100)
        if busy_with == "the model":
            busy = asyncio.create_task(ask(queue, 1, lambda: time.sleep(0.3)))
        else:
            done = Work(lambda _: None, lambda outputs: outputs)
            busy = asyncio.create_task(queue.run(lambda: time.sleep(0.3) or done))
        await asyncio.sleep(0.05)
        products = Products()
        alive = weakref.ref(products)
        gone = asyncio.create_task(ask(queue, 1, lambda held=products: held))
        del products
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.wait([gone])
        del gone
        gc.collect()
        assert not busy.done()
        assert alive() is None
        await busy

    asyncio.run(run())


def test_an_error_leaves_the_queue_as_it_was() -> None:
    queue = ScoringQueue(0, 10)

    async def fail() -> None:
        def wrong() -> None:
            raise ValueError("of the model")

        for _ in range(3):
            with pytest.raises(ValueError, match="of the model"):
                await ask(queue, 5, wrong)

    asyncio.run(fail())


def test_a_full_server_says_when_to_come_again(scorer: Scorer) -> None:
    app = create_app(scorer, ServeOptions(max_queued_requests=0))
    with TestClient(app) as client:
        answers: list[Any] = []
        products = [" ".join([*words, *["shoes"] * 20]) for words in itertools.permutations(WORDS.split(), 3)][:900]
        bodies = {
            "/score": {"query": "red", "products": products},
            "/v2/rerank": {"query": "red", "documents": products},
        }

        def ask(path: str) -> None:
            answers.append((path, client.post(path, json=bodies[path])))

        threads = [threading.Thread(target=ask, args=(path,)) for path in bodies for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [(path, answer) for path, answer in answers if answer.status_code == 429]
        assert {answer.status_code for _, answer in answers} == {200, 429}
        for path, answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            said = answer.json()["detail" if path == "/score" else "message"]
            assert said.startswith("the server is at its capacity; try again in")
        counted = client.get("/metrics").text.splitlines()
        for path in bodies:
            for status in (200, 429):
                if number := sum(answer.status_code == status for asked, answer in answers if asked == path):
                    line = f'relevance_ray_requests_total{{route="{path}",status="{status}"}} {float(number)}'
                    assert line in counted


def test_metrics_count_requests_pairs_and_cuts_and_name_the_model(scorer: Scorer) -> None:
    with TestClient(create_app(scorer)) as client:
        client.post("/score", json={"query": "red", "products": ["shoes", "shoes " * 60]})
        client.post("/score", json={"query": "red"})
        client.get("/nowhere/or/other")
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        for line in (
            'relevance_ray_requests_total{route="/score",status="200"} 1.0',
            'relevance_ray_requests_total{route="/score",status="422"} 1.0',
            'relevance_ray_requests_total{route="other",status="404"} 1.0',
            "relevance_ray_scored_pairs_total 2.0",
            "relevance_ray_truncated_products_total 1.0",
            "relevance_ray_queued_requests 0.0",
            'relevance_ray_request_seconds_count{route="/score"} 2.0',
            f'relevance_ray_model{{model="student",model_id="{scorer.model_id}"}} 1.0',
        ):
            assert line in answer.text.splitlines()


def test_every_answer_names_the_model_and_another_model_has_another_name(scorer: Scorer, tmp_path: Path) -> None:
    with TestClient(create_app(scorer)) as client:
        answers = [client.post("/score", json=REQUEST), client.get("/health"), client.post("/score", json={})]
        assert {answer.headers["x-model-id"] for answer in answers} == {scorer.model_id}
        assert answers[0].json()["model_id"] == client.get("/info").json()["model_id"] == scorer.model_id
    other = Scorer(build_tiny_student(tmp_path / "student", seed=1))
    assert other.model_id != scorer.model_id
    assert Scorer(scorer.folder).model_id == scorer.model_id
