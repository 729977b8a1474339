"""`POST /embed`: a two-tower's vectors, for an index that is searched by the same model."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from relevance_ray.serving.bodies import MAX_PRODUCTS, Product
from relevance_ray.serving.refusals import Refusal, refusals
from relevance_ray.serving.service import Service


class EmbedRequest(BaseModel):
    """Texts and products; a two-tower reads both with the same encoder."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"inputs": ["red running shoes", {"title": "Running shoe", "color": "red"}]}]},
    )

    inputs: list[Product] = Field(
        min_length=1, max_length=MAX_PRODUCTS, description="Queries as text; products as text (the title) or as fields."
    )


class EmbedResponse(BaseModel):
    """Vectors in the order of the inputs."""

    vectors: list[list[float]] = Field(description="Each of length 1, so that their dot product is the cosine.")
    truncated: list[bool] = Field(description="Whether an input was longer than the model reads, and was cut.")


def add_embed(app: FastAPI, service: Service) -> None:
    """Add `POST /embed` to an application; a model that is no two-tower answers it with a 422."""

    @app.post("/embed", responses=refusals(Refusal))
    async def embed(request: EmbedRequest) -> EmbedResponse:
        vectors, truncated = await service.embed(
            [given if isinstance(given, str) else given.model_dump(exclude_none=True) for given in request.inputs]
        )
        return EmbedResponse(vectors=vectors.tolist(), truncated=truncated)
