"""How requests share a model: passes in common, large ones cut, what was seen before not run again."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tiny_student import WORDS, build_tiny_student, build_tiny_two_tower

from relevance_ray.engines.encoding import EncodedTexts
from relevance_ray.serving.cache import OutputCache, TokenCache, text_key
from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer, UnscorableError
from relevance_ray.serving.turns import Turns, Work

PRODUCTS = [f"{color} {thing}" for color in ("red", "blue", "green") for thing in ("shoes", "running shoes", "wallet")]


def texts_of(lengths: list[int], first: int = 0) -> EncodedTexts:
    """Inputs whose tokens all say which input they are."""
    ids = [np.full(length, first + place, dtype=np.int32) for place, length in enumerate(lengths)]
    return EncodedTexts(ids, None, [None] * len(ids), np.zeros(len(ids), dtype=bool), 0)


class Model:
    """Gives each input its number, and remembers what it was asked; the first pass waits until it is told to go on."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.go_on = threading.Event()
        self.begun = threading.Event()

    def run(self, texts: EncodedTexts) -> np.ndarray:
        self.passes.append([int(ids[0]) for ids in texts.input_ids])
        self.begun.set()
        assert self.go_on.wait(10)
        return np.asarray(self.passes[-1], dtype=np.float32)[:, None]

    def work(self, lengths: list[int], first: int, pass_tokens: int = 100) -> Work[Any]:
        return Work(self.run, lambda outputs: outputs, texts_of(lengths, first), pass_tokens)


def outputs_of(future: Future[tuple[Any, float]]) -> list[float]:
    return future.result(timeout=10)[0][:, 0].tolist()


def while_busy(model: Model, turns: Turns, works: list[Work[Any]]) -> list[Future[tuple[Any, float]]]:
    """Submit a work, and the others while the model is at it."""
    first = turns.submit(model.work([5], 1000))
    assert model.begun.wait(10)
    futures = [first, *(turns.submit(work) for work in works)]
    return futures


def test_small_requests_that_wait_share_a_pass() -> None:
    model, turns = Model(), Turns()
    futures = while_busy(model, turns, [model.work([10, 20], 0), model.work([30], 10), model.work([50], 20)])
    model.go_on.set()
    assert [outputs_of(future) for future in futures] == [[1000], [0, 1], [10], [20]]
    assert model.passes == [[1000], [1, 0, 10], [20]]  # 60 tokens fit one pass of 100, the last 50 do not


def test_a_large_request_lets_a_small_one_between() -> None:
    model, turns = Model(), Turns()
    futures = while_busy(model, turns, [model.work([40] * 12, 0), model.work([10], 50)])
    model.go_on.set()
    assert outputs_of(futures[2]) == [50]
    assert outputs_of(futures[1]) == list(range(12))
    assert model.passes == [[1000], [0, 1, 2, 3, 4], [50], [5, 6, 7, 8, 9], [10, 11]]


def test_longest_first_and_back_in_order() -> None:
    model, turns = Model(), Turns()
    model.go_on.set()
    assert outputs_of(turns.submit(model.work([10, 90, 30, 400], 0))) == [0, 1, 2, 3]
    assert model.passes == [[3], [1, 2, 0]]


def test_a_request_that_is_cancelled_between_turns_is_not_gone_on_with() -> None:
    model, turns = Model(), Turns()
    large = turns.submit(model.work([150] * 4, 0))
    assert model.begun.wait(10)
    after = turns.submit(model.work([10], 50))
    assert large.cancel()
    model.go_on.set()
    assert outputs_of(after) == [50]
    assert model.passes == [[0], [50]]


def test_an_error_is_of_the_request_that_broke_the_pass_and_of_no_other() -> None:
    class Wrong(Model):
        def run(self, texts: EncodedTexts) -> np.ndarray:
            if any(int(ids[0]) == 13 for ids in texts.input_ids):
                raise ZeroDivisionError("of the model")
            return super().run(texts)

    model, turns = Wrong(), Turns()
    futures = while_busy(model, turns, [model.work([10], 1), model.work([10], 13), model.work([10], 2)])
    model.go_on.set()
    assert isinstance(futures[2].exception(timeout=10), ZeroDivisionError)
    assert [outputs_of(futures[place]) for place in (0, 1, 3)] == [[1000], [1], [2]]


def test_the_pairs_of_all_who_share_a_pass_count_for_its_seconds() -> None:
    told: list[tuple[float, int]] = []
    model, turns = Model(), Turns(lambda seconds, pairs: told.append((seconds, pairs)))
    works = [Work(model.run, lambda outputs: outputs, texts_of([10], first), 100, num_pairs=7) for first in range(3)]
    works.append(Work(model.run, lambda outputs: outputs, texts_of([40] * 12, 20), 100, num_pairs=12))
    futures = while_busy(model, turns, works)
    model.go_on.set()
    for future in futures:
        future.result(timeout=10)
    assert [pairs for _, pairs in told] == [1, 21, 0, 0, 12]


def test_a_fault_that_passes_is_not_remembered(tmp_path: Path) -> None:
    scorer = Scorer(build_tiny_student(tmp_path / "model"), score_cache_mb=1)
    run = scorer.run
    scorer.run = lambda texts: np.full_like(run(texts), np.nan)  # type: ignore[method-assign]
    with pytest.raises(UnscorableError, match="product 0: the model gave a logit that is not finite"):
        scorer.score("red", ["shoes"])
    scorer.run = run  # type: ignore[method-assign]
    assert np.isfinite(scorer.score("red", ["shoes"])[0]["logit"])


def test_the_cache_is_bounded_and_forgets_what_is_not_asked_for() -> None:
    cache = OutputCache(0.0017, 1)
    assert cache.size == 10
    keys = [text_key(str(number)) for number in range(100)]
    for start in range(0, 100, 5):
        some = keys[start : start + 5]
        cache.put(some, np.arange(start, start + 5)[:, None], np.arange(5) % 2 == 0)
        known, outputs, truncated = cache.get(keys[:1])
        assert known.tolist() == [True]  # asked for each time
        assert outputs.tolist() == [[0.0]]
        assert truncated.tolist() == [True]
    known, outputs, _ = cache.get(keys)
    assert known.sum() == 10
    assert outputs[known, 0].tolist() == np.flatnonzero(known).tolist()
    assert (cache.hits, cache.misses) == (30, 90)


def test_keys_tell_where_a_text_ends() -> None:
    assert len({text_key("red shoes", "x"), text_key("red", " shoesx"), text_key("red shoesx")}) == 3
    assert text_key("ab", "c") != text_key("a", "bc")


def test_the_token_cache_is_bounded() -> None:
    cache = TokenCache(0.002, 10)
    for number in range(50):
        cache.put(str(number), np.asarray([number], dtype=np.int32))
    known = [number for number in range(50) if cache.get(str(number)) is not None]
    assert len(known) == cache.size == 6


@pytest.mark.parametrize("build", [build_tiny_student, build_tiny_two_tower])
def test_caches_change_no_score_and_spare_the_model(build: Any, tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    plain, cached = Scorer(folder), Scorer(folder, score_cache_mb=1, token_cache_mb=1)
    expected = plain.score("red shoes", PRODUCTS)
    asked: list[int] = []
    run = cached.run
    cached.run = lambda texts: asked.append(len(texts.input_ids)) or run(texts)  # type: ignore[method-assign]
    for part in (PRODUCTS[:5], PRODUCTS, PRODUCTS[::-1]):
        found = dict(zip(part, cached.score("red shoes", part), strict=True))
        for text, row in zip(PRODUCTS, expected, strict=True):
            if text in found:
                assert found[text] == pytest.approx(row, abs=1e-5)
    assert asked == [5, 4, 0]  # of a two-tower the query, too, is the text of a product
    is_tower = build is build_tiny_two_tower
    cached.score("blue wallet", PRODUCTS)
    assert asked[-1] == (0 if is_tower else len(PRODUCTS))
    assert set(cached.caches) == ({"scores"} if is_tower else {"scores", "tokens"})
    if not is_tower:
        assert cached.caches["tokens"].misses == len(PRODUCTS)


def test_a_long_product_stays_truncated_from_the_cache(tmp_path: Path) -> None:
    scorer = Scorer(build_tiny_student(tmp_path / "model"), score_cache_mb=1)
    long = "shoes " * 60
    for _ in range(2):
        assert [row["truncated"] for row in scorer.score("red", ["shoes", long])] == [False, True]


def test_metrics_tell_the_hit_rate(tmp_path: Path) -> None:
    scorer = Scorer(build_tiny_student(tmp_path / "model"), score_cache_mb=1, token_cache_mb=1)
    with TestClient(create_app(scorer, ServeOptions())) as client:
        body = {"query": "red", "products": PRODUCTS}
        first, second = (client.post("/score", json=body).json()["results"] for _ in range(2))
        assert first == second
        text = client.get("/metrics").text
    assert f'relevance_ray_cache_hits_total{{cache="scores"}} {len(PRODUCTS)}.0' in text
    assert f'relevance_ray_cache_misses_total{{cache="scores"}} {len(PRODUCTS)}.0' in text
    assert 'relevance_ray_cache_hits_total{cache="tokens"} 0.0' in text


def test_requests_at_once_are_each_answered_as_alone(tmp_path: Path) -> None:
    """Small ones and large ones, so that passes are shared and cut."""
    scorer = Scorer(build_tiny_student(tmp_path / "model"))
    scorer._model.max_batch_tokens = 100  # type: ignore[attr-defined]
    words = WORDS.split()
    products = [" ".join(each) for each in itertools.permutations(words, 2)]
    asked = [(words[place], products[place : place + (3 if place % 3 else 200)]) for place in range(12)]
    alone = [scorer.score(query, some) for query, some in asked]
    passes: list[int] = []
    run = scorer.run
    scorer.run = lambda texts: passes.append(len(texts.input_ids)) or run(texts)  # type: ignore[method-assign]
    with TestClient(create_app(scorer, ServeOptions(max_queued_requests=20, max_queued_pairs=10_000))) as client:
        found: list[Any] = [None] * len(asked)

        def ask(place: int) -> None:
            query, some = asked[place]
            found[place] = client.post("/score", json={"query": query, "products": some}).json()["results"]

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for mine, its in zip(alone, found, strict=True):
        assert [row["logit"] for row in its] == pytest.approx([row["logit"] for row in mine], abs=1e-5)
    assert sum(passes) == sum(len(some) for _, some in asked)
    assert max(passes) < 200, "large requests are cut"
