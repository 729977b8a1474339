"""Small model folders for the tests of engines, cut from real models, with heads that tell pairs apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoModelForSequenceClassification

from relevance_ray.engines.base import Pair
from relevance_ray.engines.bm25 import build_bm25_folder
from relevance_ray.engines.ensemble import build_ensemble_folder
from relevance_ray.engines.sequence import build_start_folder
from relevance_ray.model_folder import ModelInfo
from relevance_ray.models import resolve_model
from relevance_ray.schema import PRODUCT, SCALES
from relevance_ray.templates import Template

ESCI = SCALES["esci"]
QUERIES = ["red tent", "red tent", "cámping stove  2 burner", "usb-c cable", "x"]
PRODUCTS: list[dict[str, Any]] = [
    {"title": "Norrvik trail tent", "color": "red"},
    {"title": "Tent pegs, " + "steel " * 60, "brand": "Norrvik"},
    {"title": "Gas stove", "brand": "Flamma"},
    {"title": "USB-C cable 2 m 日本語 — 100W"},
    {"title": "y"},
]
PROMPT = (
    "You judge how well a product answers a search in a shop. Grade it as exact, substitute, complement or irrelevant, by "
    "what the shopper asked for.\nSearch: {query}\nProduct: {product}\nGrade:"
)


def as_pairs(queries: list[Any], products: list[Any]) -> list[Pair]:
    rows = enumerate(zip(queries, products, strict=True))
    return [Pair(index, query, str(index), product) for index, (query, product) in rows]


def cross_encoder_folder(out: Path, num_labels: int = 1) -> Path:
    """Two layers of minilm that read pairs of texts, with token types."""
    return _sequence_folder("minilm", ModelInfo("cross_encoder", ESCI, Template(max_tokens=48)), out, num_labels)


def causal_folder(out: Path, num_labels: int = 4) -> Path:
    """Two layers of smollm2-135m that read a prompt."""
    template = Template(max_tokens=80, prompt=PROMPT)
    return _sequence_folder("smollm2-135m", ModelInfo("classifier", ESCI, template), out, num_labels)


def _sequence_folder(source: str, info: ModelInfo, out: Path, num_labels: int) -> Path:
    build_start_folder(resolve_model(source), info, out, num_labels=num_labels, num_layers=2, dropout=0.0, seed=0)
    # A fresh head is so small that its logits hardly differ from pair to pair.
    model = AutoModelForSequenceClassification.from_pretrained(out)
    torch.manual_seed(num_labels)
    for name, weight in model.named_parameters():
        if name in ("bert.pooler.dense.weight", "classifier.weight", "score.weight"):
            weight.data.normal_(0, 0.5)
    model.save_pretrained(out)
    return out


def bm25_folder(out: Path) -> Path:
    rows = [{"product_id": str(index), **product} for index, product in enumerate(PRODUCTS)]
    return build_bm25_folder([pa.Table.from_pylist(rows, schema=PRODUCT)], Template(), ESCI, out)


def ensemble_folder(out: Path) -> Path:
    """A cross-encoder and BM25."""
    members = [cross_encoder_folder(out.parent / "member"), bm25_folder(out.parent / "bm25_member")]
    stack = {
        "mean": [2.0, 1.0],
        "spread": [0.5, 1.0],
        "weights": [1.0, 0.5],
        "slope": 1.0,
        "bias": [0.0, 0.2, 0.1, -0.3],
    }
    return build_ensemble_folder(members, stack, ESCI, out)
