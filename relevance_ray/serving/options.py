"""How a student is served; apart from `app.py`, so that a configuration is read without loading Ray."""

from __future__ import annotations

from dataclasses import dataclass

from relevance_ray.options import STRICT, option


@dataclass(frozen=True)
class ServeOptions:
    """Size, limits and doors of the server; none of it but the first stage changes a score. Host and port belong to the
    command line."""

    __pydantic_config__ = STRICT

    num_replicas: int = option(1, "Copies of the model that answer in parallel", operational=True)
    cpus_per_replica: int = option(1, "CPU cores, and torch threads, of each copy", operational=True)
    gpus_per_replica: float = option(0.0, "GPUs, or the share of one, of each copy", operational=True)
    first_stage: str = option(
        "",
        "Model folder of a two-tower, local or s3://, that cuts a request's products to the best `first_stage_keep`, before "
        "the served model scores them; empty: all are scored",
        operational=True,
    )
    first_stage_keep: int = option(100, "Products that the first stage keeps", operational=True)
    max_queued_requests: int = option(
        8, "Requests that may wait for a copy; further ones are answered 429 with Retry-After", operational=True
    )
    max_queued_pairs: int = option(
        2000,
        "Products that waiting requests and the one being scored may hold together, likewise; a request that finds none "
        "waiting is taken, however large",
        operational=True,
    )
    score_cache_mb: float = option(
        64.0,
        "Megabytes of each copy for scores it gave before (of a two-tower: for vectors of texts; a first stage takes as "
        "many again); 0: none",
        operational=True,
    )
    token_cache_mb: float = option(
        32.0, "Megabytes of each copy for tokens of products it read before; 0: none are kept", operational=True
    )
    max_body_mb: float = option(
        10.0, "Megabytes of the largest request; a larger one is answered 413", operational=True
    )
    body_seconds: float = option(
        10.0, "Seconds that a request's body may take to arrive; a slower one is answered 408", operational=True
    )
    tokens_file: str = option(
        "",
        "File of bearer tokens, one a line, on the machine of each copy; with it, all but / and /health ask for one. Read "
        "when a copy starts",
        operational=True,
    )
    cors_origins: list[str] = option(
        [], 'Web origins whose pages may ask, such as "https://shop.example"; none by default', operational=True
    )
    examples: str = option(
        "",
        "JSON lines, local or s3://, each a body of POST /score, offered by the page; with a configuration, judged queries "
        "of the test split by default",
        operational=True,
    )
    shadow_log: str = option(
        "", "Folder, local or s3://, for sampled requests and their answers as Parquet; empty: no log", operational=True
    )
    shadow_share: float = option(0.01, "Share of the requests that the shadow log keeps", operational=True)
    shadow_text: bool = option(
        False, "Whether the shadow log keeps queries and titles; else scores and product ids alone", operational=True
    )

    def __post_init__(self) -> None:
        if self.num_replicas < 1 or self.cpus_per_replica < 1 or self.gpus_per_replica < 0:
            raise ValueError("num_replicas and cpus_per_replica must be at least 1, gpus_per_replica at least 0")
        if self.first_stage_keep < 1:
            raise ValueError("first_stage_keep must be at least 1")
        if self.max_queued_requests < 0 or self.max_queued_pairs < 0:
            raise ValueError("max_queued_requests and max_queued_pairs must be at least 0")
        if self.score_cache_mb < 0 or self.token_cache_mb < 0:
            raise ValueError("score_cache_mb and token_cache_mb must be at least 0")
        if not (self.max_body_mb > 0 and self.body_seconds > 0):
            raise ValueError("max_body_mb and body_seconds must be above 0")
        if not 0 <= self.shadow_share <= 1:
            raise ValueError("shadow_share must be from 0 to 1")
