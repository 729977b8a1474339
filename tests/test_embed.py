"""A two-tower's vectors over HTTP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tiny_student import build_tiny_student, build_tiny_two_tower

from relevance_ray.serving.http import create_app
from relevance_ray.serving.scorer import Scorer

PRODUCTS = ["red running shoes", {"title": "leather wallet", "brand": "acme", "product_id": "7"}]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(build_tiny_two_tower(tmp_path_factory.mktemp("models") / "tower"))


def test_vectors_give_the_logits_of_the_same_model(scorer: Scorer) -> None:
    with TestClient(create_app(scorer)) as client:
        answer = client.post("/embed", json={"inputs": ["red shoes", *PRODUCTS]}).json()
        info = client.get("/info").json()
    vectors = np.asarray(answer["vectors"])
    assert vectors.shape == (3, info["dimension"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    logits = [row["logit"] for row in scorer.score("red shoes", PRODUCTS)]
    np.testing.assert_allclose(info["logit_scale"] * (vectors[1:] @ vectors[0] - info["bias"]), logits, atol=1e-4)
    assert answer["truncated"] == [False, False, False]


def test_what_is_cut_or_cannot_be_read_is_told(scorer: Scorer) -> None:
    with TestClient(create_app(scorer)) as client:
        assert client.post("/embed", json={"inputs": ["shoes " * 40, "shoes"]}).json()["truncated"] == [True, False]
        for inputs, said in (
            (["shoes", " "], "input 1: "),
            ([{"price": 3.0}], "input 0: there is no text in the fields this model reads (title, brand, color)"),
            ([], "inputs: List should have at least 1 item"),
        ):
            refused = client.post("/embed", json={"inputs": inputs})
            assert refused.status_code == 422
            assert refused.json()["detail"].startswith(said)


def test_a_two_tower_says_which_products_it_cut(scorer: Scorer) -> None:
    long, fields = "shoes " * 40, {"title": "shoes", "color": "red " * 40}
    assert [row["truncated"] for row in scorer.score("red", [long, "shoes", fields])] == [True, False, True]
    with TestClient(create_app(scorer)) as client:
        assert client.post("/rerank", json={"query": "red", "texts": ["shoes", long]}).status_code == 422
        assert client.post("/rerank", json={"query": "red", "texts": [long], "truncate": True}).status_code == 200


def test_a_cross_encoder_says_that_it_has_no_vectors(tmp_path: Path) -> None:
    with TestClient(create_app(Scorer(build_tiny_student(tmp_path / "student")))) as client:
        refused = client.post("/embed", json={"inputs": ["shoes"]})
    assert refused.status_code == 422
    assert refused.json()["detail"] == "this model is a cross_encoder, which has no vectors; serve a two-tower"
