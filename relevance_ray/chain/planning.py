"""What labeling will take, before any of it is spent: pairs, tokens, hours, storage, cost.

Tokens, bytes and speed are those of a sample: real queries with real products, through the teacher, or through one of the
same size that was never trained. So a plan is as good as its sample is like what will be generated; where shards are
there already, they are the sample.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from relevance_ray.chain.folders import StepFolders
from relevance_ray.config import Config
from relevance_ray.data.readers import open_source
from relevance_ray.engines.base import Engine, Labels, Pair
from relevance_ray.engines.generation import Generated, Message, Sampling
from relevance_ray.errors import UserError
from relevance_ray.labeling.pipeline import shards_to_label
from relevance_ray.labeling.shard import label_groups, pairs_of
from relevance_ray.model_folder import read_model_info
from relevance_ray.models import resolve_model
from relevance_ray.schema import GROUP, PRODUCT, LabelScale, pair_id, product_fields, query_id
from relevance_ray.storage import CommitLog, exists, join, localize, table_bytes
from relevance_ray.templates import Template

if TYPE_CHECKING:
    from relevance_ray.engines.encoding import PairEncoder
    from relevance_ray.engines.query_likelihood import QueryEncoder

SAMPLE_PAIRS = 1000
MEASURED_SECONDS = 10.0
_PAIRS_AT_ONCE = 64
WRITES_A_SHARD, READS_A_SHARD, OBJECTS_A_SHARD = 6, 13, 4
"""Requests to S3, generation and labeling together (those that write or list are priced alike), and what is kept there;
counted by `benchmarks/scale_simulation.py`."""
HEAD_BYTES_A_SHARD = 13_000
"""What the driver and Ray's control store keep of one; measured by `benchmarks/labeling_memory.py`."""
_PRODUCTS, _QUERIES = 20_000, 20_000
"""Of the head of the catalog and of the log, of which the sample is drawn."""


@dataclass(frozen=True)
class Plan:
    """What labeling will take.

    Attributes:
        pairs: asked for.
        pairs_labeled: of them, labeled already, in shards that are generated.
        pairs_of_earlier_runs: labeled by the same teacher in other shards. Which of them will be taken over is not known
            before their shards are generated, so they are not counted on.
        sampled_pairs: that the estimates come from.
        sample: where those come from.
        tokens_per_pair: mean over the sample, as the models of the teacher read them; for an endpoint, a guess of four
            characters a token; 0 for an engine that reads none.
        tokens_per_pair_error: its standard error, over queries.
        pairs_per_second: of one engine; None where it is neither given nor can be measured.
        rate_source: "given", or what it was measured on.
        engines: at work at once.
        hours: for the pairs that are not labeled yet, all engines together, start not counted.
        gpu_hours, cpu_hours: what the engines hold for that long.
        cost: `gpu_hours` at the price given, else None.
        generate_gigabytes, label_gigabytes: of all the pairs, as they are stored.
        shards: units of work, each a Ray task of labeling.
        objects: files of generation and labeling.
        put_requests, get_requests: to S3, if the root lies there, for all the pairs: those that write or list, and those
            that read.
        head_gigabytes: memory that these shards take on the head, beside what Ray takes there anyway.
    """

    pairs: int
    pairs_labeled: int
    pairs_of_earlier_runs: int
    sampled_pairs: int
    sample: str
    tokens_per_pair: float
    tokens_per_pair_error: float
    pairs_per_second: float | None
    rate_source: str
    engines: int
    hours: float | None
    gpu_hours: float | None
    cpu_hours: float | None
    cost: float | None
    generate_gigabytes: float
    label_gigabytes: float
    shards: int
    objects: int
    put_requests: int
    get_requests: int
    head_gigabytes: float

    @property
    def tokens(self) -> float:
        """Of the pairs that are not labeled yet."""
        return self.tokens_per_pair * max(0, self.pairs - self.pairs_labeled)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": self.tokens}


def plan_labeling(
    config: Config,
    pairs_per_second: float | None = None,
    gpu_hour_price: float | None = None,
    seconds: float = MEASURED_SECONDS,
) -> Plan:
    """Plan the labeling of a configuration; nothing is written at its root.

    Args:
        pairs_per_second: of one engine, where it is known; measured on this machine otherwise.
        gpu_hour_price: in any currency.
        seconds: how long to measure.

    Raises:
        UserError: no product, query or model to take a sample of or with; a rate or price that is not positive.
    """
    for name, value in (("the rate", pairs_per_second), ("the price of a GPU hour", gpu_hour_price)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be more than 0; it is {value:g}")
    at = StepFolders(config)
    groups, sample, scale = _sample(config, at)
    num_sampled = len(groups.column("products").combine_chunks().flatten())
    done, others = _pairs_labeled(at)
    rate, rate_source = pairs_per_second, "given"
    if rate is None and done < config.generate.num_pairs:
        rate, rate_source = _measure(config, at, scale, groups, seconds)
    tokens, error = _tokens(config, scale, groups)
    labeled = label_groups(groups, lambda: _AnyLogits(scale.gains))
    pairs = config.generate.num_pairs
    num_shards = pairs / config.generate.candidates_per_query / config.generate.groups_per_shard
    resources = config.resources
    hours = max(0, pairs - done) / (rate * resources.label_actors) / 3600 if rate else None
    held = None if hours is None else hours * resources.label_actors
    gpu_hours = None if held is None else held * resources.gpus_per_label_actor
    return Plan(
        pairs=pairs,
        pairs_labeled=done,
        pairs_of_earlier_runs=others,
        sampled_pairs=num_sampled,
        sample=sample,
        tokens_per_pair=tokens,
        tokens_per_pair_error=error,
        pairs_per_second=rate,
        rate_source=rate_source,
        engines=resources.label_actors,
        hours=hours,
        gpu_hours=gpu_hours,
        cpu_hours=None if held is None else held * resources.cpus_per_label_actor,
        cost=gpu_hours * gpu_hour_price if gpu_hour_price and gpu_hours is not None else None,
        generate_gigabytes=_gigabytes(groups, num_sampled, pairs, num_shards),
        label_gigabytes=_gigabytes(labeled, num_sampled, pairs, num_shards),
        shards=math.ceil(num_shards),
        objects=math.ceil(OBJECTS_A_SHARD * num_shards),
        put_requests=math.ceil(WRITES_A_SHARD * num_shards),
        get_requests=math.ceil(READS_A_SHARD * num_shards),
        head_gigabytes=HEAD_BYTES_A_SHARD * num_shards / 1e9,
    )


def _sample(config: Config, at: StepFolders) -> tuple[pa.Table, str, LabelScale]:
    """About `SAMPLE_PAIRS` pairs as GROUP rows, where they come from, and the label scale."""
    source = open_source(config.data)
    generated = CommitLog(at.folder("generate"))
    names = list(generated.committed())
    if names:
        tables, num_pairs = [], 0
        for index in np.random.default_rng(0).permutation(len(names)):
            tables.append(generated.read(names[index]))
            num_pairs += generated.committed()[names[index]]["pairs"]
            if num_pairs >= SAMPLE_PAIRS:
                break
        return pa.concat_tables(tables), "what is generated", source.scale
    products = list(itertools.islice((row for table in source.products() for row in table.to_pylist()), _PRODUCTS))
    texts = itertools.islice((text for table in source.queries() for text in table["query"].to_pylist()), _QUERIES)
    queries = list(texts) or source.judgments["query"].to_pylist()
    queries = [query for query in queries if query and query.strip()]
    if not products or not queries:
        raise UserError(f"{source.products_name if not products else source.judgments_name} holds nothing to sample")
    where = "the head of the catalog and of the query log, put together at random"
    return _random_groups(queries, products, config.generate.candidates_per_query), where, source.scale


def _random_groups(queries: Sequence[str], products: Sequence[dict[str, Any]], size: int) -> pa.Table:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(-(-SAMPLE_PAIRS // size)):
        query = queries[int(rng.integers(len(queries)))]
        chosen = [products[index] for index in rng.choice(len(products), size=min(size, len(products)), replace=False)]
        members = [
            {
                "pair_id": pair_id(query, product["product_id"], product.get("locale")),
                "product_id": product["product_id"],
                "fields": product_fields(product),
                "origins": [{"name": "random", "rank": 0}],
            }
            for product in chosen
        ]
        rows.append({"query_id": query_id(query), "query": query, "query_source": "log", "products": members})
    return pa.Table.from_pylist(rows, schema=GROUP)


def _measure(
    config: Config, at: StepFolders, scale: LabelScale, groups: pa.Table, seconds: float
) -> tuple[float | None, str]:
    """Pairs a second of one engine on this machine, and what it was measured on; None where that would cost money, or
    where the engine is not one that runs here."""
    from relevance_ray.engines.registry import open_engine

    if config.label.engine == "openai":
        return None, "asking the endpoint would cost"
    if config.label.engine == "vllm" and find_spec("vllm") is None:
        return None, "vLLM is not installed here"
    with tempfile.TemporaryDirectory(prefix="plan-", ignore_cleanup_errors=True) as work:
        folder = _teacher(config, at, scale, groups, Path(work)) if config.label.runs_teacher else None
        options = replace(config.label, num_threads=config.label.num_threads or config.resources.cpus_per_label_actor)
        engine = open_engine(options, folder, scale, config.data.label_smoothing)
        rate = _rate(engine, pairs_of(groups), seconds, again=options.engine != "vllm")
        if (close := getattr(engine, "close", None)) is not None:
            close()
    where = "this machine" if options.engine == "transformers" else f"this machine, engine {options.engine}"
    return rate, f"measured on {where}"


def _rate(engine: Engine, pairs: Sequence[Pair], seconds: float, again: bool) -> float:
    """Pairs a second, the first call left out; each other takes about a second, or a shard's pairs. With `again` the
    sample is gone through as often as there is time; an engine that keeps prefixes would know it by then."""
    engine.label(pairs[:_PAIRS_AT_ONCE])
    taken, count, start, size = 0.0, 0, 0, _PAIRS_AT_ONCE
    while taken < seconds and (start < len(pairs) or again):
        part = pairs[start % len(pairs) : start % len(pairs) + size]
        started = time.perf_counter()
        engine.label(part)
        taken += time.perf_counter() - started
        count, start = count + len(part), start + size
        size = max(_PAIRS_AT_ONCE, min(len(pairs), int(count / taken)))
    return count / taken


def _teacher(config: Config, at: StepFolders, scale: LabelScale, groups: pa.Table, work: Path) -> str:
    """The teacher's folder where it is trained, else that of one that takes as long."""
    if not at.trains_teacher:
        return config.label.model
    if exists(join(at.folder("prepare"), "step.json")) and at.is_done("train-teacher"):
        return join(at.folder("train-teacher"), "model")
    from relevance_ray.training.teacher import build_untrained

    fields = [product["fields"] for group in groups["products"].to_pylist() for product in group]
    rows = [{**product, "product_id": str(number)} for number, product in enumerate(fields)]
    products = pa.Table.from_pylist(rows, schema=PRODUCT)
    return str(build_untrained(config.teacher, scale, lambda: [products], work / "teacher"))


def _tokens(config: Config, scale: LabelScale, groups: pa.Table) -> tuple[float, float]:
    """Tokens that the engine reads of a pair, and their standard error over groups."""
    per_group, sizes = np.zeros(groups.num_rows), np.zeros(groups.num_rows)
    for index, group in enumerate(groups.select(["query", "products"]).to_pylist()):
        sizes[index] = len(group["products"])
    pairs = pairs_of(groups)
    group_of = np.repeat(np.arange(groups.num_rows), sizes.astype(np.int64))
    for count in _token_counters(config, scale):
        np.add.at(per_group, group_of, count(pairs))
    mean = per_group.sum() / sizes.sum()
    spread = np.std(per_group - mean * sizes, ddof=1) if groups.num_rows > 1 else 0.0
    return float(mean), float(spread / sizes.mean() / np.sqrt(groups.num_rows))


def _token_counters(config: Config, scale: LabelScale) -> Iterator[Callable[[Sequence[Pair]], np.ndarray]]:
    """For each model that reads the pairs, the tokens of each pair."""
    if config.label.engine == "openai":
        from relevance_ray.engines.grading import GradingEngine

        endpoint = config.label.openai
        prompts = GradingEngine(_NoAnswers(), scale, endpoint.fields, endpoint.guidelines)
        yield prompts.guess_tokens
        return
    if config.label.engine in ("oracle", "file"):
        return
    from transformers import AutoTokenizer

    from relevance_ray.engines.encoding import PairEncoder

    for kind, source, template in _readers(config):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if kind == "bi_encoder":
            yield partial(_text_tokens, tokenizer, template)
        elif kind == "query_likelihood":
            from relevance_ray.engines.query_likelihood import QueryEncoder

            yield partial(_query_tokens, QueryEncoder(tokenizer, template))
        else:
            yield partial(_pair_tokens, PairEncoder(tokenizer, template))


def _readers(config: Config) -> Iterator[tuple[str, str, Template]]:
    """Kind, source and template of each model of the teacher that reads tokens."""
    from relevance_ray.engines.ensemble import member_folders
    from relevance_ray.engines.sequence import is_causal

    if config.label.model:
        folder = localize(config.label.model)
        kind = read_model_info(folder).kind
        for place in member_folders(folder) if kind == "ensemble" else [folder]:
            info = read_model_info(place)
            if info.kind != "bm25":
                yield info.kind, str(place), info.template
        return
    teacher = config.teacher
    for member in teacher.members if teacher.kind == "ensemble" else [teacher]:
        if member.kind != "bm25":
            source = str(resolve_model(member.model))
            yield member.kind, source, member.template(causal=member.kind == "classifier" and is_causal(source))


def _pair_tokens(encoder: PairEncoder, pairs: Sequence[Pair]) -> np.ndarray:
    return encoder.encode([pair.query for pair in pairs], [pair.product for pair in pairs]).lengths


def _query_tokens(encoder: QueryEncoder, pairs: Sequence[Pair]) -> np.ndarray:
    """As a query likelihood model reads them: each query once without a product, too."""
    queries = [pair.query for pair in pairs]
    counts = encoder.encode(queries, [pair.product for pair in pairs]).lengths
    first = [queries.index(query) for query in dict.fromkeys(queries)]
    counts[first] += encoder.encode_alone([queries[row] for row in first]).lengths
    return counts


def _text_tokens(tokenizer: Any, template: Template, pairs: Sequence[Pair]) -> np.ndarray:
    """As a bi-encoder reads them: each text once."""
    seen: set[str] = set()
    counts = np.zeros(len(pairs), dtype=np.int64)
    for row, pair in enumerate(pairs):
        for text in (pair.query, template.render_product(pair.product)):
            if text not in seen:
                seen.add(text)
                counts[row] += len(tokenizer(text, truncation=True, max_length=template.max_tokens)["input_ids"])
    return counts


def _gigabytes(sample: pa.Table, num_sampled: int, pairs: int, num_shards: float) -> float:
    """What so many pairs like the sample's take in shards. A file has a head and a dictionary whatever it holds: what half
    the sample takes beyond half of the whole."""
    whole, half = len(table_bytes(sample)), len(table_bytes(sample.slice(0, sample.num_rows // 2)))
    fixed = max(0, 2 * half - whole)
    return ((whole - fixed) / num_sampled * pairs + fixed * max(1.0, num_shards)) / 1e9


def _pairs_labeled(at: StepFolders) -> tuple[int, int]:
    """Pairs in shards that are generated already and have labels, and labeled pairs in others."""
    if not exists(join(at.folder("prepare"), "step.json")):
        return 0, 0
    generated = CommitLog(at.folder("generate"))
    records = CommitLog(at.folder("label")).committed()
    asked = {shard.label_name for shard in shards_to_label(generated, list(generated.committed()))}
    labeled = sum(record["pairs"] for name, record in records.items() if name in asked)
    others = sum(record["pairs"] for name, record in records.items() if name not in asked)
    return min(labeled, at.config.generate.num_pairs), others


class _NoAnswers:
    """In the place of an endpoint that is not to be asked."""

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Generated]:
        raise AssertionError("a plan asks nothing")

    def close(self) -> None:
        pass


class _AnyLogits:
    """Labels of no meaning that take the room of real ones."""

    num_tokens = 0

    def __init__(self, gains: tuple[float, ...]) -> None:
        self.gains = gains

    def label(self, pairs: Sequence[Pair]) -> Labels:
        logits = np.random.default_rng(0).normal(size=(len(pairs), len(self.gains))).astype(np.float32)
        return Labels(logits, [None] * len(pairs), [None] * len(pairs))
