"""Refusals: one sentence, in the shape and at the place where the client of each route looks for it.

Of what was sent they repeat no more than the beginning of a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

UNPROCESSABLE, TOO_MANY = 422, 429
_MAX_KEY = 50


class Refusal(BaseModel):
    """Why a request was not answered."""

    detail: str = Field(description="One sentence.")


class CohereRefusal(BaseModel):
    """Why a request was not answered, as Cohere's clients read it."""

    message: str = Field(description="One sentence.")


class TeiRefusal(BaseModel):
    """Why a request was not answered, as clients of text-embeddings-inference read it."""

    error: str = Field(description="One sentence.")
    error_type: str = Field(description="Validation, or Overloaded.")


def refusal(
    path: str, sentence: str, status: int = UNPROCESSABLE, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer to a refused request to a path."""
    content = {"detail": sentence}
    if path.startswith(("/v1/", "/v2/")):
        content = {"message": sentence}
    elif path == "/rerank":
        content = {"error": sentence, "error_type": "Overloaded" if status == TOO_MANY else "Validation"}
    return JSONResponse(content, status_code=status, headers=dict(headers or {}))


def refusals(shape: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route that asks the model may answer beside its results, for the OpenAPI document."""
    said = {
        401: "No valid token, where tokens are asked for.",
        408: "The body took too long to arrive.",
        413: "The body is too large.",
        415: "The body is compressed.",
        UNPROCESSABLE: "The request cannot be scored as it is; the sentence says why.",
        TOO_MANY: "The server is at its capacity; Retry-After says in how many seconds to come again.",
    }
    return {status: {"model": shape, "description": description} for status, description in said.items()}


def sentence_of(error: RequestValidationError) -> str:
    """What is wrong with a request, in one sentence."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    parts = [str(part)[:_MAX_KEY] for part in first["loc"] if part not in ("body", "text", "fields")]
    if not parts:
        return "the body is no JSON object; send one, with the header Content-Type: application/json"
    where = ".".join(parts)
    more = len(error.errors()) - 1
    said = "there is no such key" if first["type"] == "extra_forbidden" else str(first["msg"])
    return f"{where}: {said}" + (f" (and {more} more)" if more else "")
