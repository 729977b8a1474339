"""The reranking requests that the field's clients send, in their own shapes: Cohere's `/v1/rerank` and `/v2/rerank`, and
`/rerank` of text-embeddings-inference.

All rank by the model's logit and say the calibrated probability as the score, which is in [0, 1] as both promise. Cohere's
answer tells of cut documents in `meta.warnings`; that of text-embeddings-inference cannot, so what is too long is refused
there unless `truncate` is set.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import PydanticCustomError

from relevance_ray.serving.bodies import MAX_PRODUCTS, ProductFields, Text, form_of
from relevance_ray.serving.refusals import CohereRefusal, TeiRefusal, refusals
from relevance_ray.serving.scorer import UnscorableError
from relevance_ray.serving.service import Service
from relevance_ray.serving.shadow_log import Answered

_STRICT = ConfigDict(extra="forbid", strict=True)
_UNREAD = "Accepted, and not read: this server has one model, and its own limit of tokens."
TopN = Annotated[int, Field(ge=1, description="How many results to return; all by default.")]
Documents = Annotated[list[Text], Field(min_length=1, max_length=MAX_PRODUCTS)]


def _sendable(document: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is no JSON, though Python's parser takes it: such a document could not be given back."""
    try:
        json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError("document", "a document holds a text or a number that is no JSON") from error
    return document


Document = Annotated[
    Annotated[Text, Tag("text")] | Annotated[dict[Text, Any], AfterValidator(_sendable), Tag("fields")],
    Discriminator(
        form_of, custom_error_type="document", custom_error_message="a document is a text or an object of fields"
    ),
]


class CohereRequest(BaseModel):
    """Cohere's rerank request, version 2."""

    model_config = _STRICT | ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "student", "query": "red running shoes", "documents": ["Red running shoe", "Wallet"]}
            ]
        }
    )

    query: Text
    documents: Documents
    top_n: TopN | None = None
    model: Text | None = Field(None, description=_UNREAD)
    max_tokens_per_doc: int | None = Field(None, description=_UNREAD)
    priority: int | None = Field(None, description=_UNREAD)


class CohereRequestV1(BaseModel):
    """Cohere's rerank request, version 1, whose documents may be objects: a `text`, or fields of a product."""

    model_config = _STRICT

    query: Text
    documents: list[Document] = Field(min_length=1, max_length=MAX_PRODUCTS)
    top_n: TopN | None = None
    return_documents: bool = Field(False, description="Give the documents back with the results.")
    rank_fields: list[Text] | None = Field(None, description="Of documents that are objects, the keys to read.")
    model: Text | None = Field(None, description=_UNREAD)
    max_chunks_per_doc: int | None = Field(None, description=_UNREAD)


class TeiRequest(BaseModel):
    """The rerank request of text-embeddings-inference."""

    model_config = _STRICT | ConfigDict(
        json_schema_extra={"examples": [{"query": "red running shoes", "texts": ["Red running shoe", "Wallet"]}]}
    )

    query: Text
    texts: Documents
    raw_scores: bool = Field(False, description="Logits in place of probabilities.")
    return_text: bool = Field(False, description="Give the texts back with the results.")
    truncate: bool = Field(False, description="Cut texts that are longer than the model reads, in place of refusing.")
    truncation_direction: Literal["right", "Right"] = Field("right", description="Texts are cut at their end.")


class TeiResult(BaseModel):
    """One text of a `TeiRequest`."""

    index: int = Field(description="The text's place in the request.")
    score: float
    text: str | None = None


def add_rerank(app: FastAPI, service: Service) -> None:
    """Add `POST /v1/rerank`, `/v2/rerank` and `/rerank` to an application."""

    @app.post("/v2/rerank", tags=["Cohere"], responses=refusals(CohereRefusal))
    async def cohere_v2(request: CohereRequest) -> dict[str, Any]:
        return await _cohere(service, request.query, request.documents, request.top_n, version="2")

    @app.post("/v1/rerank", tags=["Cohere"], responses=refusals(CohereRefusal))
    async def cohere_v1(request: CohereRequestV1) -> dict[str, Any]:
        documents = [_product(place, given, request.rank_fields) for place, given in enumerate(request.documents)]
        answer = await _cohere(service, request.query, documents, request.top_n, version="1")
        if request.return_documents:
            for result in answer["results"]:
                given = request.documents[result["index"]]
                result["document"] = {"text": given} if isinstance(given, str) else given
        return answer

    @app.post(
        "/rerank",
        tags=["text-embeddings-inference"],
        response_model_exclude_none=True,
        responses=refusals(TeiRefusal),
    )
    async def tei(request: TeiRequest) -> list[TeiResult]:
        rows, milliseconds = await service.score(request.query, request.texts)
        cut = [place for place, row in enumerate(rows) if row["truncated"]]
        if cut and not request.truncate:
            raise UnscorableError(f"text {cut[0]} is longer than the model reads; shorten it, or set truncate")
        service.answered(Answered("/rerank", request.query, request.texts, rows, milliseconds))
        scores = [row["logit" if request.raw_scores else "probability"] for row in rows]
        return [
            TeiResult(index=place, score=scores[place], text=request.texts[place] if request.return_text else None)
            for place in _best_first(rows)
        ]


async def _cohere(
    service: Service, query: str, documents: Sequence[str | Mapping[str, Any]], top_n: int | None, version: str
) -> dict[str, Any]:
    rows, milliseconds = await service.score(query, documents)
    service.answered(Answered(f"/v{version}/rerank", query, documents, rows, milliseconds))
    results = [{"index": place, "relevance_score": rows[place]["probability"]} for place in _best_first(rows)[:top_n]]
    meta: dict[str, Any] = {"api_version": {"version": version}}
    if cut := sum(bool(row["truncated"]) for row in rows):
        meta["warnings"] = [f"{cut} of {len(rows)} documents are longer than the model reads, and were cut"]
    return {"id": str(uuid.uuid4()), "results": results, "meta": meta}


def _product(
    place: int, document: str | Mapping[str, Any], rank_fields: Sequence[str] | None
) -> str | Mapping[str, Any]:
    """A document of Cohere's version 1 as a product: its text, or those of its keys (of them, `rank_fields`) that are fields
    of a product."""
    if isinstance(document, str):
        return document
    if rank_fields is not None:
        document = {name: value for name, value in document.items() if name in rank_fields}
    if isinstance(text := document.get("text"), str):
        return text
    fields = {name: value for name, value in document.items() if name in ProductFields.model_fields}
    if not fields:
        raise UnscorableError(f"document {place} has neither a text nor a field of a product, such as title")
    try:
        return ProductFields(**fields).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise UnscorableError(f"document {place}, {first['loc'][0]}: {first['msg']}") from error


def _best_first(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places by falling logit; equal ones as they came."""
    return sorted(range(len(rows)), key=lambda place: -rows[place]["logit"])
