"""The clients of the field, pointed at a server of ours: they work as they are."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import cohere
import pytest
import requests
import uvicorn
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from tiny_student import build_tiny_student

from relevance_ray.serving.http import create_app
from relevance_ray.serving.scorer import Scorer

QUERY = "red shoes"
DOCUMENTS = ["leather wallet", "red running shoes", "blue phone case", "red shirt", "green shoe for running"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(build_tiny_student(tmp_path_factory.mktemp("models") / "student"))


@pytest.fixture(scope="module")
def url(scorer: Scorer) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(create_app(scorer), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield "http://{}:{}".format(*listener.getsockname())
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def probabilities(scorer: Scorer) -> list[float]:
    return [row["probability"] for row in scorer.score(QUERY, DOCUMENTS)]


@pytest.fixture(scope="module")
def best_first(probabilities: list[float]) -> list[int]:
    return sorted(range(len(DOCUMENTS)), key=lambda place: -probabilities[place])


def test_coheres_client_of_version_2_gets_its_ranking(
    url: str, probabilities: list[float], best_first: list[int]
) -> None:
    answer = cohere.ClientV2("a key", base_url=url).rerank(model="student", query=QUERY, documents=DOCUMENTS, top_n=3)
    assert [result.index for result in answer.results] == best_first[:3]
    scores = [result.relevance_score for result in answer.results]
    assert scores == pytest.approx([probabilities[place] for place in best_first[:3]], abs=1e-6)
    assert answer.id


def test_coheres_client_of_version_1_gets_its_ranking_and_its_documents(url: str, best_first: list[int]) -> None:
    client = cohere.Client("a key", base_url=url)
    answer = client.rerank(query=QUERY, documents=DOCUMENTS, model="student", return_documents=True)
    assert [result.index for result in answer.results] == best_first
    assert answer.results[0].document.text == DOCUMENTS[best_first[0]]


def test_documents_of_version_1_may_be_products(url: str, scorer: Scorer) -> None:
    products = [{"title": "wallet", "brand": "acme", "shelf": 3}, {"title": "red shoe", "brand": "nike"}]
    client = cohere.Client("a key", base_url=url)
    answer = client.rerank(query=QUERY, documents=products, model="student")
    told = [{"title": "wallet", "brand": "acme"}, {"title": "red shoe", "brand": "nike"}]
    scores = {result.index: result.relevance_score for result in answer.results}
    assert [scores[0], scores[1]] == pytest.approx([row["probability"] for row in scorer.score(QUERY, told)], abs=1e-6)
    by_title = client.rerank(query=QUERY, documents=products, model="student", rank_fields=["title"])
    scores = {result.index: result.relevance_score for result in by_title.results}
    titles = [row["probability"] for row in scorer.score(QUERY, ["wallet", "red shoe"])]
    assert [scores[0], scores[1]] == pytest.approx(titles, abs=1e-6)


def test_coheres_client_is_told_what_is_wrong_and_what_was_cut(url: str) -> None:
    client = cohere.ClientV2("a key", base_url=url)
    with pytest.raises(cohere.UnprocessableEntityError) as refused:
        client.rerank(model="student", query=" ", documents=DOCUMENTS)
    assert refused.value.body["message"] == "the query is empty"
    cut = client.rerank(model="student", query=QUERY, documents=["shoes " * 50, "shoes"])
    assert cut.meta.warnings == ["1 of 2 documents are longer than the model reads, and were cut"]


def test_langchains_compressor_reranks_documents(url: str, best_first: list[int]) -> None:
    reranker = CohereRerank(model="student", cohere_api_key="a key", base_url=url, top_n=2)
    documents = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(DOCUMENTS)]
    best = reranker.compress_documents(documents, QUERY)
    assert [document.metadata["place"] for document in best] == best_first[:2]


def test_text_embeddings_inferences_request_gets_its_answer(
    url: str, scorer: Scorer, probabilities: list[float], best_first: list[int]
) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS}
    answer = requests.post(f"{url}/rerank", json=body, timeout=30).json()
    assert [set(result) for result in answer] == [{"index", "score"}] * 5
    assert [result["index"] for result in answer] == best_first
    assert answer[0]["score"] == pytest.approx(max(probabilities), abs=1e-6)
    body |= {"raw_scores": True, "return_text": True, "truncate": True, "truncation_direction": "Right"}
    answer = requests.post(f"{url}/rerank", json=body, timeout=30).json()
    logits = [row["logit"] for row in scorer.score(QUERY, DOCUMENTS)]
    assert answer[0]["score"] == pytest.approx(max(logits), abs=1e-5)
    assert answer[0]["text"] == DOCUMENTS[best_first[0]]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/rerank", {"query": QUERY, "texts": ["shoes " * 50]}, {"error": "text 0 is longer than the model reads"}),
        ("/rerank", {"query": QUERY, "texts": []}, {"error": "texts: List should have at least 1 item"}),
        ("/rerank", {"query": QUERY, "texts": ["a"], "truncation_direction": "left"}, {"error": "truncation_direction"}),
        ("/v2/rerank", {"query": QUERY, "documents": ["a"], "top_n": 0}, {"message": "top_n: Input should be greater"}),
        ("/v2/rerank", {"query": QUERY, "documents": [{"text": "a"}]}, {"message": "documents.0: Input should be a va"}),
        ("/v1/rerank", {"query": QUERY, "documents": [{"shelf": 1}]}, {"message": "document 0 has neither a text nor a"}),
        ("/v1/rerank", {"query": QUERY, "documents": [{"title": 5}]}, {"message": "document 0, title: Input should be"}),
        ("/v1/rerank", {"documents": ["a"]}, {"message": "query: Field required"}),
        ("/v1/rerank", {"query": QUERY, "documents": [5]}, {"message": "documents.0: a document is a text or an object"}),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_where_its_client_looks(
    url: str, path: str, body: dict[str, object], said: dict[str, str]
) -> None:
    answer = requests.post(f"{url}{path}", json=body, timeout=30)
    assert answer.status_code == 422
    for key, sentence in said.items():
        assert answer.json()[key].startswith(sentence)


@pytest.mark.parametrize("value", ["NaN", '"\\ud800"', '["\\ud800"]'])
def test_what_could_not_be_given_back_is_refused(url: str, value: str) -> None:
    body = '{"query": "red", "documents": ["a", {"title": "b", "shelf": VALUE}], "return_documents": true}'
    headers = {"content-type": "application/json"}
    answer = requests.post(f"{url}/v1/rerank", data=body.replace("VALUE", value), headers=headers, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["message"] == "documents.1: a document holds a text or a number that is no JSON"
