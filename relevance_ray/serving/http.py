"""The HTTP interface of a scorer: a plain FastAPI application, tested without a cluster.

Every request is answered or refused with a 4xx whose `detail` is one sentence. The answer to a refused request never
repeats what was sent: a text that is no valid Unicode, or a number that is no JSON, could not be encoded into it.
Unknown keys are refused, since a misspelt field would otherwise lower every score in silence.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from relevance_ray.engines.base import MAX_TEXT_CHARS
from relevance_ray.serving.bodies import MAX_PRODUCTS, Product, Text, sentence_of
from relevance_ray.serving.embed import add_embed
from relevance_ray.serving.rerank import add_rerank, refusal
from relevance_ray.serving.scorer import Scorer, UnscorableError


class ScoreRequest(BaseModel):
    """One query with its products."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "query": "red running shoes",
                    "products": ["Nike Pegasus running shoe, red", {"title": "Leather wallet", "color": "red"}],
                }
            ]
        },
    )

    query: Text = Field(description="The query as typed. Too long a query is refused, never cut.")
    products: list[Product] = Field(
        min_length=1, max_length=MAX_PRODUCTS, description="Products as text (taken as the title) or as fields."
    )


class Result(BaseModel):
    """What the model says of one product."""

    product_id: str | None = Field(None, description="As sent, where it was sent.")
    logit: float = Field(description="The model's output, unbounded.")
    probability: float = Field(description="Calibrated probability that the grade counts as relevant.")
    score: float = Field(description="Expected gain, 0 to 1.")
    grade: str = Field(description="The most probable grade of the model's label scale.")
    truncated: bool | None = Field(
        description="The product's text was longer than the model reads, and was cut; null if the model cannot tell."
    )


class ScoreResponse(BaseModel):
    """Results in the order of the request's products."""

    results: list[Result]
    milliseconds: float = Field(description="Time spent scoring, without HTTP.")


def create_app(scorer: Scorer) -> FastAPI:
    """The application around a loaded scorer: `GET /health`, `GET /info`, `POST /score`, and the routes of
    `rerank.add_rerank` and `embed.add_embed`."""
    app = FastAPI(title="relevance_ray", description="Scores how relevant products are to a query.")

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(request.url.path, sentence_of(error))

    @app.exception_handler(UnscorableError)
    async def refuse_pair(request: Request, error: UnscorableError) -> JSONResponse:
        return refusal(request.url.path, str(error))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return {**scorer.describe(), "max_products": MAX_PRODUCTS, "max_text_chars": MAX_TEXT_CHARS}

    @app.post("/score")
    def score(request: ScoreRequest) -> ScoreResponse:  # not async: runs in a thread, so that /health answers meanwhile
        start = time.perf_counter()
        products = [p if isinstance(p, str) else p.model_dump(exclude_none=True) for p in request.products]
        rows = scorer.score(request.query, products)
        ids = [None if isinstance(p, str) else p.product_id for p in request.products]
        results = [Result(product_id=given, **row) for given, row in zip(ids, rows, strict=True)]
        return ScoreResponse(results=results, milliseconds=round(1000 * (time.perf_counter() - start), 3))

    add_rerank(app, scorer)
    add_embed(app, scorer)
    return app
