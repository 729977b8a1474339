"""Requests that the page offers to try: read from a file, or made of judged queries that no model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
from pydantic import ValidationError

from relevance_ray.errors import UserError
from relevance_ray.serving.bodies import ProductFields, ScoreRequest
from relevance_ray.storage import read_bytes, write_bytes

MAX_EXAMPLES, MAX_PRODUCTS_SHOWN = 50, 20


def read_examples(path: str) -> list[dict[str, Any]]:
    """The first `MAX_EXAMPLES` lines of a file, local or s3://; none where the path is empty.

    Raises:
        UserError: no such file, or a line that is no body of POST /score.
    """
    if not path:
        return []
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        raise UserError(
            f"{path}, which serve.examples names, cannot be read ({error.strerror or error}); mend the path"
        ) from error
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:MAX_EXAMPLES], 1):
        try:
            found.append(ScoreRequest.model_validate_json(line).model_dump(exclude_none=True))
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"][:1])
            raise UserError(f"{path}, line {number}: {where}{first['msg']}; write a body of POST /score") from error
    return found


def judged_examples(prepared: Path, num_queries: int = MAX_EXAMPLES) -> list[dict[str, Any]]:
    """Bodies of POST /score from the judged test queries of a prepared folder, with their first products; a query whose
    products could not be sent as they are (a text too long, an attribute without a value) is left out."""
    groups = ds.dataset(prepared / "judged_groups.parquet")
    table = groups.head(num_queries, columns=["query", "products"], filter=ds.field("split") == "test", batch_size=64)
    found: list[dict[str, Any]] = []
    for row in table.to_pylist(maps_as_pydicts="lossy"):
        products = [_fields(item["fields"], item["product_id"]) for item in row["products"][:MAX_PRODUCTS_SHOWN]]
        example = {"query": row["query"], "products": products}
        try:
            ScoreRequest.model_validate(example)
        except ValidationError:
            continue
        found.append(example)
    return found


def write_examples(path: str, examples: list[dict[str, Any]]) -> None:
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    write_bytes(path, "".join(lines).encode())


def _fields(fields: Mapping[str, Any], product_id: str) -> dict[str, Any]:
    given = {"product_id": product_id, **fields}
    return {name: value for name, value in given.items() if name in ProductFields.model_fields and value}
