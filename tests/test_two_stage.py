"""A two-tower in front: who is kept, what is said of the others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tiny_student import build_tiny_student, build_tiny_two_tower

from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.serving.app import check_options
from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer
from relevance_ray.serving.two_stage import FirstStage, check_first_stage

PRODUCTS = [
    f"{color} {thing}" for color in ("red", "blue", "green", "black") for thing in ("shoe", "wallet", "case", "shirt")
]
QUERY = "red shoe"


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scorer, Scorer]:
    folder = tmp_path_factory.mktemp("models")
    return Scorer(build_tiny_student(folder / "student")), Scorer(
        build_tiny_two_tower(folder / "tower"), score_cache_mb=1
    )


@pytest.fixture(scope="module")
def client(scorers: tuple[Scorer, Scorer]) -> Iterator[TestClient]:
    served, tower = scorers
    with TestClient(create_app(served, ServeOptions(), FirstStage(tower, 5))) as client:
        yield client


def ask(client: TestClient, products: list[Any]) -> list[dict[str, Any]]:
    answer = client.post("/score", json={"query": QUERY, "products": products})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


def test_the_best_of_the_first_stage_have_the_served_models_scores(
    client: TestClient, scorers: tuple[Scorer, Scorer]
) -> None:
    served, tower = scorers
    first = [row["logit"] for row in tower.score(QUERY, PRODUCTS)]
    best = sorted(range(len(PRODUCTS)), key=lambda place: -first[place])[:5]
    rows = ask(client, PRODUCTS)
    assert {place for place, row in enumerate(rows) if row["stage"] == 2} == set(best)
    expected = served.score(QUERY, PRODUCTS)
    for place in best:
        assert rows[place]["logit"] == pytest.approx(expected[place]["logit"], abs=1e-5)
        assert rows[place]["grade"] == expected[place]["grade"]


def test_what_is_cut_stands_below_in_the_first_stages_order(client: TestClient, scorers: tuple[Scorer, Scorer]) -> None:
    first = [row["logit"] for row in scorers[1].score(QUERY, PRODUCTS)]
    rows = ask(client, PRODUCTS)
    kept = [row["logit"] for row in rows if row["stage"] == 2]
    cut = [place for place, row in enumerate(rows) if row["stage"] == 1]
    assert max(rows[place]["logit"] for place in cut) < min(kept)
    assert max(rows[place]["probability"] for place in cut) <= min(
        row["probability"] for row in rows if row["stage"] == 2
    )
    by_answer = sorted(cut, key=lambda place: rows[place]["logit"])
    assert [round(first[place], 5) for place in by_answer] == sorted(round(first[place], 5) for place in cut)
    assert [row["truncated"] for row in rows] == [False if row["stage"] == 2 else None for row in rows]


def test_few_products_are_all_scored(client: TestClient, scorers: tuple[Scorer, Scorer]) -> None:
    rows = ask(client, PRODUCTS[:5])
    assert [row["stage"] for row in rows] == [None] * 5
    assert [row["logit"] for row in rows] == pytest.approx(
        [row["logit"] for row in scorers[0].score(QUERY, PRODUCTS[:5])], abs=1e-5
    )


def test_an_error_names_the_product_by_its_own_place(client: TestClient) -> None:
    products: list[Any] = [*PRODUCTS[1:], {"price": 3.0}]
    answer = client.post("/score", json={"query": QUERY, "products": products})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(f"product {len(products) - 1}: ")


def test_rerank_and_info_and_metrics_know_of_both(client: TestClient, scorers: tuple[Scorer, Scorer]) -> None:
    answer = client.post("/v2/rerank", json={"query": QUERY, "documents": PRODUCTS, "top_n": 3}).json()
    rows = ask(client, PRODUCTS)
    assert [row["index"] for row in answer["results"]] == sorted(
        range(len(PRODUCTS)), key=lambda place: -rows[place]["logit"]
    )[:3]
    about = client.get("/info").json()
    assert about["first_stage"] == {"model": "tower", "model_id": scorers[1].model_id, "keep": 5}
    assert 'relevance_ray_cache_hits_total{cache="first_stage_scores"}' in client.get("/metrics").text


def test_a_first_stage_must_be_a_two_tower_that_loads(scorers: tuple[Scorer, Scorer], tmp_path: Path) -> None:
    served, tower = scorers[0].folder, scorers[1].folder
    check_first_stage(tower, served)
    with pytest.raises(UserError, match="is a cross_encoder; give a student of student.kind=two_tower"):
        check_first_stage(served, served)
    with pytest.raises(UserError, match="does not exist"):
        check_first_stage(Path("/nowhere"), served)
    info = read_model_info(served)
    reads_more = build_tiny_student(tmp_path / "more", replace(info.template, fields=("title", "bullets")))
    with pytest.raises(UserError, match="does not read bullets, which the served model does"):
        check_first_stage(tower, reads_more)
    broken = tmp_path / "broken"
    shutil.copytree(tower, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="broken does not load"):
        check_options(ServeOptions(first_stage=str(broken)), served)
    with pytest.raises(ValueError, match="first_stage_keep must be at least 1"):
        ServeOptions(first_stage_keep=0)
