"""Judged groups of random grades, a model that reads them, and quick options to evaluate with."""

import numpy as np
import pyarrow as pa

from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, FolderModel
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.model_folder import ModelInfo
from relevance_ray.schema import JUDGED_GROUP, SCALES, pair_id, product_fields
from relevance_ray.templates import Template

ESCI = SCALES["esci"]
FAST = EvaluateOptions(num_resamples=200)


def judged_table(num_queries: int = 12, *, seed: int = 0, grades: str = "ICSE", split: str = "test") -> pa.Table:
    """Queries with 4 to 9 products each, graded at random; a title tells its grade."""
    rng = np.random.default_rng(seed)
    rows = []
    for q in range(num_queries):
        products = []
        for i in range(int(rng.integers(4, 10))):
            grade = str(rng.choice(list(grades)))
            products.append(
                {
                    "pair_id": pair_id(f"query {q}", str(i)),
                    "product_id": str(i),
                    "fields": product_fields({"title": f"product {i} of grade {grade}"}),
                    "origins": [{"name": "human", "rank": 0}],
                    "grade": grade,
                    "soft_target": 0.5,
                    "rater_grades": None,
                }
            )
        rows.append(
            {"query_id": str(q), "query": f"query {q}", "query_source": "human", "split": split, "products": products}
        )
    return pa.Table.from_pylist(rows, schema=JUDGED_GROUP)


class TitleReader(FolderModel):
    """A model that reads the grade off the title, right up to noise, and refuses some titles."""

    def __init__(self, *, noise: float = 0.0, refuses: str = "nothing"):
        self.info = ModelInfo("cross_encoder", ESCI, Template())
        self.gains = SINGLE_LOGIT_GAINS
        self.noise, self.refuses, self.calls = noise, refuses, []

    def _forward(self, queries, products):
        self.calls.append(len(queries))
        logits = np.array([float("ICSE".index(product["title"][-1])) for product in products])
        logits += self.noise * np.random.default_rng(len(queries)).normal(size=len(logits))
        errors = ["too good to be true" if p["title"].endswith(self.refuses) else None for p in products]
        return np.stack([np.zeros(len(logits)), logits], axis=1).astype(np.float32), errors
