"""The HTTP interface of a scorer: a plain FastAPI application, tested without a cluster.

Every request is answered or refused with a 4xx whose `detail` is one sentence. Unknown keys are refused, since a misspelt
field would otherwise lower every score in silence. In front of the routes stand, from the outside in: what counts
(`metrics.Counted`), the web's rules for other origins, and what guards (`guard.Guard`).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from relevance_ray.engines.base import MAX_TEXT_CHARS
from relevance_ray.serving.bodies import MAX_PRODUCTS, ScoreRequest
from relevance_ray.serving.embed import add_embed
from relevance_ray.serving.examples import read_examples
from relevance_ray.serving.guard import Guard, Tokens
from relevance_ray.serving.metrics import CONTENT_TYPE, MODEL_HEADER, Counted
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.queue import OverloadedError
from relevance_ray.serving.refusals import TOO_MANY, Refusal, refusal, refusals, sentence_of
from relevance_ray.serving.rerank import add_rerank
from relevance_ray.serving.scorer import Scorer, UnscorableError
from relevance_ray.serving.service import Service
from relevance_ray.serving.shadow_log import Answered
from relevance_ray.serving.two_stage import FirstStage

_PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Result(BaseModel):
    """What the model says of one product."""

    product_id: str | None = Field(None, description="As sent, where it was sent.")
    logit: float = Field(description="The model's output, unbounded.")
    probability: float = Field(description="Calibrated probability that the grade counts as relevant.")
    score: float = Field(description="Expected gain, 0 to 1.")
    grade: str = Field(description="The most probable grade of the model's label scale.")
    truncated: bool | None = Field(
        description="The product's text was longer than the model reads, and was cut; null if the model cannot tell, or did "
        "not read it."
    )
    stage: int | None = Field(
        None, description="2 for the served model, 1 where a first stage cut the product; null without stages."
    )


class ScoreResponse(BaseModel):
    """Results in the order of the request's products."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(description="Which model gave the scores; see /info.")
    results: list[Result]
    milliseconds: float = Field(description="Time spent scoring, without HTTP and without waiting.")


def create_app(scorer: Scorer, options: ServeOptions | None = None, first_stage: FirstStage | None = None) -> FastAPI:
    """The application around a loaded scorer: the page at `/`, `GET /health`, `/info`, `/examples` and `/metrics`,
    `POST /score`, and the routes of `rerank.add_rerank` and `embed.add_embed`.

    Raises:
        UserError: `options.tokens_file` or `options.examples` cannot be read.
    """
    options = options or ServeOptions()
    tokens = Tokens.read(options.tokens_file) if options.tokens_file else None
    offered = read_examples(options.examples)
    service = Service(scorer, options, first_stage)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="relevance_ray",
        description="Scores how relevant products are to a query.",
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if tokens else [],  # for the document; the guard asks
    )

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(request.url.path, sentence_of(error))

    @app.exception_handler(UnscorableError)
    async def refuse_pair(request: Request, error: UnscorableError) -> JSONResponse:
        return refusal(request.url.path, str(error))

    @app.exception_handler(StarletteHTTPException)
    async def refuse_at_the_door(request: Request, error: StarletteHTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's, of a body that Python cannot even decode
            return refusal(request.url.path, "the body is no JSON: it is not UTF-8, or nested too deep")
        return refusal(request.url.path, str(error.detail), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, _error: Exception) -> JSONResponse:  # its traceback goes to the server's log
        said = "the server failed; its log says how"
        return refusal(request.url.path, said, 500, {MODEL_HEADER: scorer.model_id})

    @app.exception_handler(OverloadedError)
    async def shed(request: Request, error: OverloadedError) -> JSONResponse:
        return refusal(request.url.path, str(error), TOO_MANY, {"Retry-After": str(error.retry_after)})

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files("relevance_ray.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_RULES, "Cache-Control": "no-cache"})

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        limits = {
            "max_products": MAX_PRODUCTS,
            "max_text_chars": MAX_TEXT_CHARS,
            "max_body_bytes": int(options.max_body_mb * 1e6),
        }
        stages = {}
        if first_stage is not None:
            about = first_stage.scorer.describe()
            stages = {"first_stage": {**{key: about[key] for key in ("model", "model_id")}, "keep": first_stage.keep}}
        return {**scorer.describe(), **limits, **stages}

    @app.get("/examples")
    async def examples() -> list[dict[str, Any]]:
        """Requests to try, each a body of POST /score."""
        return offered

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """What the server counts, in Prometheus's text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.post("/score", responses=refusals(Refusal))
    async def score(request: ScoreRequest) -> ScoreResponse:
        products = [p if isinstance(p, str) else p.model_dump(exclude_none=True) for p in request.products]
        rows, milliseconds = await service.score(request.query, products)
        service.answered(Answered("/score", request.query, products, rows, milliseconds))
        ids = [None if isinstance(p, str) else p.product_id for p in request.products]
        results = [Result(product_id=given, **row) for given, row in zip(ids, rows, strict=True)]
        return ScoreResponse(model_id=scorer.model_id, results=results, milliseconds=milliseconds)

    add_rerank(app, service)
    add_embed(app, service)
    # Added last stands first.
    app.add_middleware(
        Guard, tokens=tokens, max_body_bytes=int(options.max_body_mb * 1e6), body_seconds=options.body_seconds
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[MODEL_HEADER, "Retry-After"],
        )
    routes = [route.path for route in app.routes if hasattr(route, "path")]
    app.add_middleware(Counted, metrics=service.metrics, model_id=scorer.model_id, routes=routes)
    return app
