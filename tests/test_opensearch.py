"""The worked example of OpenSearch: what its connector would send is answered as its post-processing reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tiny_student import build_tiny_student

from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer

PAGE = Path(__file__).resolve().parents[1] / "cluster" / "opensearch.md"
HITS = ['red "running" shoes acme', "leather wallet\nred", "phone case"]


def blocks() -> dict[str, dict]:
    """The requests of the page by their first lines."""
    found = re.findall(r"```json\n([A-Z]+ \S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return {line: json.loads(body) for line, body in found}


def test_what_the_connector_sends_is_scored_for_every_hit(tmp_path: Path) -> None:
    [action] = blocks()["POST /_plugins/_ml/connectors/_create"]["actions"]
    # ML Commons fills the template with JSON texts; its pre-processing for Cohere gives these three parameters.
    body = action["request_body"]
    for name, value in {
        "query": json.dumps('shoes 10" red')[1:-1],
        "documents": json.dumps(HITS),
        "top_n": str(len(HITS)),
    }.items():
        body = body.replace("${parameters." + name + "}", value)
    assert "${parameters" not in body
    (tmp_path / "tokens").write_text("TOKEN\n", encoding="utf-8")
    scorer = Scorer(build_tiny_student(tmp_path / "student"))
    headers = {name: value.replace("${credential.token}", "TOKEN") for name, value in action["headers"].items()}
    with TestClient(create_app(scorer, ServeOptions(tokens_file=str(tmp_path / "tokens")))) as client:
        path = action["url"].removeprefix("http://relevance-ray:8000")
        answer = client.request(action["method"], path, content=body, headers=headers)
    assert answer.status_code == 200
    # connector.post_process.cohere.rerank reads index and relevance_score of each result.
    scores = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    expected = [row["probability"] for row in scorer.score('shoes 10" red', HITS)]
    assert [scores[place] for place in range(len(HITS))] == pytest.approx(expected)


def test_the_endpoint_that_is_trusted_is_the_one_that_is_called() -> None:
    found = blocks()
    [pattern] = found["PUT /_cluster/settings"]["persistent"]["plugins.ml_commons.trusted_connector_endpoints_regex"]
    [action] = found["POST /_plugins/_ml/connectors/_create"]["actions"]
    assert re.match(pattern, action["url"])
    assert len(found) == 5
