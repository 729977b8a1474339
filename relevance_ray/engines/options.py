"""The options of labeling: which engine, and what each may be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from relevance_ray.options import STRICT, option
from relevance_ray.templates import Template


@dataclass(frozen=True)
class EndpointOptions:
    """A language model behind an endpoint that speaks OpenAI's chat protocol."""

    __pydantic_config__ = STRICT

    model: str = option("", "the model's name at the endpoint")
    base_url: str = option(
        "",
        "address of the endpoint, such as http://host:8000/v1; empty: OpenAI's own. Another address must serve the same "
        "model",
        operational=True,
    )
    api_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the key", operational=True)
    concurrency: int = option(32, "requests of one actor under way at once", operational=True)
    requests_per_minute: float = option(0.0, "most requests one actor sends a minute; 0: no limit", operational=True)
    timeout_seconds: float = option(60.0, "for one request", operational=True)
    max_retries: int = option(
        8, "of a request refused for load or lost on the way, with growing pauses", operational=True
    )
    extra_body: dict[str, Any] = option({}, "more for the body of each request, as the endpoint takes it")

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if self.base_url and (address.scheme not in ("http", "https") or not address.hostname):
            raise ValueError(f"base_url {self.base_url} is no address such as http://host:8000/v1")
        if "@" in address.netloc:
            raise ValueError(f"base_url of {address.hostname} holds credentials; put the key into {self.api_key_env}")
        for name in ("concurrency", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")
        for name in ("requests_per_minute", "max_retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")


@dataclass(frozen=True)
class OpenAIOptions(EndpointOptions):
    """An endpoint's model that is asked for grades."""

    fields: list[str] = option(
        ["title", "brand", "color", "category", "description", "attributes"], "what the model reads of a product"
    )
    guidelines: str = option("", "the shop's own rules for judging, told to the model")

    def __post_init__(self) -> None:
        EndpointOptions.__post_init__(self)
        Template(fields=tuple(self.fields))  # refuses unknown ones


VLLM_OPERATIONAL_ARGS = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "block_size", "enable_prefix_caching"),
    *("max_num_batched_tokens", "max_num_seqs", "max_num_partial_prefills", "enable_chunked_prefill", "enforce_eager"),
    *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "disable_log_stats"),
)
"""Arguments of vLLM that decide where and how fast a model runs. Raised after a job ran out of memory, they must not cost
the labels that it has."""


_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size")


@dataclass(frozen=True)
class VllmOptions:
    """What engine `vllm` hands on."""

    __pydantic_config__ = STRICT

    engine_args: dict[str, Any] = option(
        {},
        "arguments of `vllm.LLM`, over our defaults; those of memory, batches and parallelism do not enter fingerprints",
        operational_keys=VLLM_OPERATIONAL_ARGS,
    )

    def __post_init__(self) -> None:
        for name in _PARALLEL:
            size = self.engine_args.get(name, 1)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"engine_args.{name} {size!r} must be a whole number of devices")

    def num_workers(self) -> int:
        """Over how many devices one model is shared out."""
        return math.prod(self.engine_args.get(name, 1) for name in _PARALLEL)


@dataclass(frozen=True)
class EngineOptions:
    """Who labels the groups."""

    __pydantic_config__ = STRICT

    engine: Literal["transformers", "vllm", "openai", "oracle", "file"] = option(
        "transformers",
        "who labels: `transformers` or `vllm` (the trained teacher), `openai` (a model behind an endpoint that speaks "
        "OpenAI's protocol, asked for a grade), `file` (labels you have), `oracle` (the market's truth)",
    )
    model: str = option(
        "", "a teacher's model folder that labels, local or s3://; empty: one is trained here", operational=True
    )
    path: str = option(
        "", "file engine: a Parquet, CSV or JSON-lines file with query, product_id and grade or logit", operational=True
    )
    noise: float = option(0.0, "oracle engine: chance that a label is a neighbouring grade instead of the true one")
    max_batch_tokens: int | None = option(
        None, "padded tokens in one forward pass; none: 8192, or 2048 of `transformers` on a CPU", operational=True
    )
    compile: bool = option(
        False, "run the teacher through torch.compile; pays after some minutes of labeling", operational=True
    )
    device: str = option("auto", 'a torch device, or "auto": the GPU where there is one', operational=True)
    openai: OpenAIOptions = option(OpenAIOptions(), "openai engine: the endpoint and what it is asked")
    compact_mb: float = option(
        128.0, "size of a file that `relevance-ray compact` packs label shards into, in MiB", operational=True
    )
    num_threads: int = option(0, "CPU threads of one engine; 0 leaves its library's own choice", operational=True)
    vllm: VllmOptions = option(VllmOptions(), "what engine `vllm` hands on")

    def __post_init__(self) -> None:
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens {self.max_batch_tokens} must be at least 1")
        if self.compact_mb <= 0:
            raise ValueError(f"compact_mb {self.compact_mb} must be more than 0")
        if self.num_threads < 0:
            raise ValueError(f"num_threads {self.num_threads} must not be negative")
        if not 0.0 <= self.noise < 1.0:
            raise ValueError(f"noise {self.noise} must be in [0, 1)")
        if (self.engine == "file") != bool(self.path):
            raise ValueError("`path`, the file of labels, goes with engine `file`: give both or neither")
        if self.noise and self.engine != "oracle":
            raise ValueError(f"noise {self.noise} is only read with engine `oracle`; remove it")
        if self.vllm.engine_args and self.engine != "vllm":
            raise ValueError("vllm.engine_args are only read with engine `vllm`; remove them")
        if self.compile and self.engine != "transformers":
            raise ValueError("compile is only read with engine `transformers`; remove it")
        if self.model and not self.runs_teacher:
            raise ValueError(f"model {self.model} is not read with engine `{self.engine}`; remove it")
        if self.engine != "openai" and self.openai != OpenAIOptions():
            raise ValueError("`openai` is only read with engine `openai`; remove the section or set the engine")
        if (self.engine == "openai") != bool(self.openai.model):
            raise ValueError("`openai.model`, the name of a model, goes with engine `openai`: give both or neither")

    @property
    def runs_teacher(self) -> bool:
        """Whether the engine runs a model folder of ours."""
        return self.engine in ("transformers", "vllm")


DEFAULT_WRITER = "smollm2-135m"


@dataclass(frozen=True)
class GeneratorOptions:
    """Which language model writes, and where it runs."""

    __pydantic_config__ = STRICT

    engine: Literal["transformers", "vllm", "openai"] = option(
        "transformers",
        "who writes: `transformers` or `vllm` (a causal language model run here), `openai` (a model behind an endpoint that "
        "speaks OpenAI's protocol)",
    )
    model: str = option(
        DEFAULT_WRITER, "transformers, vllm: the model that writes, a short name, a folder, local or s3://, or a hub id"
    )
    device: str = option("auto", 'a torch device, or "auto": the GPU where there is one', operational=True)
    max_batch_tokens: int = option(8192, "transformers: padded tokens of a batch, answers included", operational=True)
    num_threads: int = option(0, "CPU threads of one model; 0 leaves its library's own choice", operational=True)
    openai: EndpointOptions = option(EndpointOptions(), "openai engine: the endpoint")
    vllm: VllmOptions = option(VllmOptions(), "what engine `vllm` hands on")

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens {self.max_batch_tokens} must be at least 1")
        if self.num_threads < 0:
            raise ValueError(f"num_threads {self.num_threads} must not be negative")
        if self.vllm.engine_args and self.engine != "vllm":
            raise ValueError("vllm.engine_args are only read with engine `vllm`; remove them")
        if self.engine != "openai" and self.openai != EndpointOptions():
            raise ValueError("`openai` is only read with engine `openai`; remove the section or set the engine")
        if (self.engine == "openai") != bool(self.openai.model):
            raise ValueError("`openai.model`, the name of a model, goes with engine `openai`: give both or neither")
        if self.engine == "openai" and self.model != DEFAULT_WRITER:
            raise ValueError(f"model {self.model!r} is not read with engine `openai`, but openai.model is; remove it")
        if self.engine != "openai" and not self.model:
            raise ValueError(f"engine `{self.engine}` needs a model, such as {DEFAULT_WRITER}")
