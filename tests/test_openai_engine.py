"""The openai engine against a real endpoint over HTTP: grades, faults, load."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from chat_endpoint import ChatEndpoint, overlap

from relevance_ray.engines.base import Pair
from relevance_ray.engines.generation import Sampling
from relevance_ray.engines.openai import OpenAIGenerator
from relevance_ray.engines.options import EngineOptions, OpenAIOptions
from relevance_ray.engines.registry import open_engine
from relevance_ray.errors import UserError
from relevance_ray.schema import SCALES

ESCI = SCALES["esci"]


def options(endpoint: ChatEndpoint, **changes: Any) -> EngineOptions:
    known: dict[str, Any] = {"model": "judge", "base_url": endpoint.url, "max_retries": 3, "timeout_seconds": 2.0}
    return EngineOptions(engine="openai", openai=OpenAIOptions(**{**known, **changes}))


def pairs(*titles: str) -> list[Pair]:
    return [Pair(index, "red tent", str(index), {"title": title}) for index, title in enumerate(titles)]


def test_grades_come_back_as_logits_of_their_letters() -> None:
    rows = pairs("red tent", "blue tent", "gas stove")
    with ChatEndpoint() as endpoint:
        engine = open_engine(options(endpoint, guidelines="A part is no substitute."), None, ESCI)
        labels = engine.label(rows)
    assert engine.gains == ESCI.gains
    assert labels.errors == [None] * 3
    assert labels.class_logits.dtype == np.float32
    expected = [round(overlap(row.query, row.product["title"]) * 3 - 0.01) for row in rows]
    assert labels.class_logits.argmax(axis=1).tolist() == expected == [3, 1, 0]
    np.testing.assert_allclose(np.exp(labels.class_logits).sum(axis=1), 1.0, rtol=1e-5)
    request = endpoint.requests[0]
    system = request["messages"][0]["content"]
    assert "A part is no substitute." in system
    assert system.splitlines()[-4:] == ["A: I (worst)", "B: C", "C: S", "D: E (best)"]
    assert request["max_completion_tokens"] == 1
    assert request["temperature"] == 0.0


def test_a_busy_endpoint_is_asked_again_and_each_row_keeps_its_own_fate() -> None:
    def fault(body: dict[str, Any], before: int) -> tuple[int, dict[str, str]] | None:
        text = body["messages"][-1]["content"]
        if "refused" in text:
            return 400, {}
        if "lost" in text:
            return 503, {"retry-after-ms": "5"}
        return [(429, {"retry-after-ms": "10"}), (500, {"retry-after-ms": "5"}), (0, {}), None][min(before, 3)]

    titles = ["red tent", "refused", "tent", "lost", "unsure", "red stove", ""]
    with ChatEndpoint(fault) as endpoint:
        labels = open_engine(options(endpoint), None, ESCI).label(pairs(*titles))
    assert [error is None for error in labels.errors] == [True, False, True, False, False, True, False]
    assert labels.errors[1] is not None
    assert "refused with 400" in labels.errors[1]
    assert labels.errors[3] is not None
    assert labels.errors[3].startswith("no answer after 4 tries: ")
    assert labels.errors[4] == "the model gave no probability of some grade (it wrote 'B')"
    assert labels.errors[6] is not None
    assert labels.errors[6].startswith("the product has no text in its fields")
    failed = [error is not None for error in labels.errors]
    assert np.isnan(labels.class_logits[failed]).all()
    assert np.isfinite(labels.class_logits[[not error for error in failed]]).all()


def test_an_endpoint_that_is_gone_ends_the_call_and_a_hung_one_too() -> None:
    with ChatEndpoint() as endpoint:
        pass
    engine = open_engine(options(endpoint, max_retries=0, concurrency=2), None, ESCI)
    with pytest.raises(UserError, match="gives no answer, each request tried 0 times again .Connection error"):
        engine.label(pairs(*["red tent"] * 50))
    alone = engine.label(pairs("red tent"))
    assert alone.errors[0] is not None, "a single row that is lost says nothing of the endpoint"
    with ChatEndpoint(delay=1.0) as slow:
        engine = open_engine(options(slow, max_retries=0, timeout_seconds=0.2), None, ESCI)
        with pytest.raises(UserError, match="timed out"):
            engine.label(pairs(*["red tent"] * 10))


def test_a_model_that_never_grades_is_not_paid_for_all_rows() -> None:
    with ChatEndpoint() as endpoint, pytest.raises(UserError, match="never answers with a grade"):
        open_engine(options(endpoint), None, ESCI).label(pairs(*["unsure"] * 10))


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "refuses the key in MY_KEY"), (404, "knows no model 'judge'"), (400, "refuses every request")],
)
def test_what_the_user_must_mend_ends_the_job(status: int, sentence: str) -> None:
    with (
        ChatEndpoint(lambda *_: (status, {})) as endpoint,
        pytest.raises(UserError, match=sentence),
    ):
        open_engine(options(endpoint, api_key_env="MY_KEY"), None, ESCI).label(pairs(*["red tent"] * 10))


def test_no_key_and_no_endpoint_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds no key"):
        open_engine(EngineOptions(engine="openai", openai=OpenAIOptions(model="judge")), None, ESCI)
    with pytest.raises(ValueError, match="give both or neither"):
        EngineOptions(engine="openai")
    for address in ("judge:8000/v1", "ftp://x/v1", "http://"):
        with pytest.raises(ValueError, match="is no address such as"):
            OpenAIOptions(model="judge", base_url=address)
    with pytest.raises(ValueError, match="base_url of judge holds credentials; put the key into OPENAI_API_KEY$"):
        OpenAIOptions(model="judge", base_url="http://me:secret@judge:8000/v1")


def test_no_more_requests_at_once_and_a_minute_than_allowed() -> None:
    with ChatEndpoint(delay=0.05) as endpoint:
        open_engine(options(endpoint, concurrency=3), None, ESCI).label(pairs(*["red tent"] * 12))
        assert endpoint.most_at_once == 3
    with ChatEndpoint() as endpoint:
        started = time.monotonic()
        open_engine(options(endpoint, requests_per_minute=600), None, ESCI).label(pairs(*["red tent"] * 8))
        assert time.monotonic() - started >= 0.69
        gaps = np.diff(endpoint.times)
        assert np.median(gaps) > 0.08


def test_an_answer_ends_before_the_first_stop_string_whatever_the_endpoint_heeds() -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("red tent\nblue tent", "red tent; x", "tent")]
    with ChatEndpoint() as endpoint:
        found = OpenAIGenerator(options(endpoint).openai).generate(conversations, Sampling(stop=("\n", ";")))
    assert [answer.text for answer in found] == ["red tent", "red tent", "tent"]
    assert endpoint.requests[0]["stop"] == ["\n", ";"]


def test_answers_under_a_schema_and_in_order() -> None:
    schema = {"type": "object", "properties": {"grade": {"type": "string"}}}
    conversations = [[{"role": "user", "content": f"row {row}"}] for row in range(20)]
    with ChatEndpoint() as endpoint:
        generator = OpenAIGenerator(options(endpoint, extra_body={"top_k": 5}).openai)
        found = generator.generate(conversations, Sampling(max_tokens=50, json_schema=schema))
        plain = generator.generate(conversations, Sampling(max_tokens=50))
    assert {answer.text for answer in found} == {'{"grade": "x"}'}
    assert [answer.text for answer in plain] == [f"row {row}" for row in range(20)]
    assert (plain[0].prompt_tokens, plain[0].completion_tokens) == (7, 1)
    assert endpoint.requests[0]["response_format"]["json_schema"]["schema"] == schema
    assert endpoint.requests[0]["top_k"] == 5
