"""A small world to train in: products are a color and a thing, and a product answers a query as far as both agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from relevance_ray import storage
from relevance_ray.schema import JUDGED_GROUP, LABELED_GROUP, LabelScale, pair_id, query_id

COLORS = ["red", "blue", "green", "black"]
THINGS = ["shoe", "wallet", "case", "shirt", "lamp", "table"]
SCALE = LabelScale("tiny", ("no", "near", "yes"), (0.0, 0.4, 1.0), "yes")
WORDS = [*COLORS, *THINGS, "|", ":", "?", "search", "query", "product", "how", "well", "does", "the", "answer", "grade"]


def build_tiny_encoder(folder: Path, num_layers: int = 2) -> Path:
    """A BERT of random weights, as `save_pretrained` leaves it."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def build_tiny_causal(folder: Path) -> Path:
    """A Llama-like causal model of random weights, without a padding token, as most of them come."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def agreement(query: str, title: str) -> int:
    """How many of color and thing agree: 0, 1 or 2, which is also the class."""
    return len(set(query.split()) & set(title.split()))


def _groups(num_groups: int, products: int, seed: int) -> list[tuple[str, list[str]]]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(num_groups):
        query = f"{rng.choice(COLORS)} {rng.choice(THINGS)}"
        color, thing = query.split()
        titles = [query, f"{rng.choice(COLORS)} {thing}", f"{color} {rng.choice(THINGS)}"]
        titles += [f"{rng.choice(COLORS)} {rng.choice(THINGS)}" for _ in range(products - 3)]
        out.append((query, titles))
    return out


def _candidate(query: str, title: str) -> dict:
    fields = dict.fromkeys(("brand", "color", "category", "description", "attributes", "price")) | {"title": title}
    return {"pair_id": pair_id(query, title), "product_id": title, "fields": fields, "origins": []}


def labeled_groups(num_groups: int, products: int = 4, seed: int = 0) -> pa.Table:
    """LABELED_GROUP rows whose logit is 3 for full agreement, 0 for half, -3 for none."""
    rows = []
    for query, titles in _groups(num_groups, products, seed):
        labels = [float(3 * agreement(query, title) - 3) for title in titles]
        candidates = [
            _candidate(query, title) | {"logit": logit, "class_logits": [0.0, logit], "rationale": None, "error": None}
            for title, logit in zip(titles, labels, strict=True)
        ]
        rows.append({"query_id": query_id(query), "query": query, "query_source": "log", "products": candidates})
    return pa.Table.from_pylist(rows, schema=LABELED_GROUP)


def judged_groups(num_groups: int, products: int = 6, seed: int = 1) -> pa.Table:
    """JUDGED_GROUP rows: every query of the small world has a split of its own by its hash."""
    rows = []
    for query, titles in _groups(num_groups, products, seed):
        grades = [SCALE.grades[agreement(query, title)] for title in titles]
        judged = [
            _candidate(query, title)
            | {"grade": grade, "rater_grades": None}
            | {"soft_target": float(SCALE.expected_gain(SCALE.distribution(grade)))}
            for title, grade in zip(titles, grades, strict=True)
        ]
        split = ("train", "train", "dev")[int(query_id(query), 16) % 3]
        rows.append(
            {"query_id": query_id(query), "query": query, "query_source": "human", "split": split, "products": judged}
        )
    return pa.Table.from_pylist(rows, schema=JUDGED_GROUP)


def write(path: Path, table: pa.Table) -> str:
    storage.write_table(str(path), table)
    return str(path)
