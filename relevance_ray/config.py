"""The configuration of a run: one YAML file, validated before anything is spent.

Each part of the package declares its own options (`relevance_ray.options`); here they are put together, validated by
pydantic, and every mistake is told in one sentence that names the key, where it stands, and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from relevance_ray.cluster.workers import Demand, Workers
from relevance_ray.data.source import DataOptions
from relevance_ray.engines.options import EngineOptions
from relevance_ray.errors import UserError
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.generate.options import GenerateOptions
from relevance_ray.options import STRICT, option
from relevance_ray.serving.options import ServeOptions
from relevance_ray.training.options import StudentOptions, TeacherOptions


@dataclasses.dataclass(frozen=True)
class StorageOptions:
    """Where a run keeps everything."""

    __pydantic_config__ = STRICT
    root: str = option("runs/default", "Folder or s3://bucket/prefix that holds the steps of the run", operational=True)

    def __post_init__(self) -> None:
        if "://" in self.root and not self.root.split("://", 1)[1].strip("/"):
            raise ValueError(f"root {self.root} names no bucket; write s3://bucket/prefix")


RAY_RESOURCES, MIN_RESOURCE = ("CPU", "GPU", "memory", "object_store_memory"), 0.0001


@dataclasses.dataclass(frozen=True)
class ResourceOptions:
    """What each step may ask of the Ray cluster: changes speed, never results."""

    __pydantic_config__ = STRICT
    num_cpus: int | None = option(None, "CPUs of the local Ray; unset: all of them", operational=True)
    autoscaling: bool = option(
        False,
        "The cluster starts nodes for what is asked of it (KubeRay, ray up): wait for them. Otherwise what no node can "
        "hold is refused",
        operational=True,
    )
    generate_workers: int = option(2, "Actors, of one CPU each, that generate shards at once", operational=True)
    generate_resources: dict[str, float] = option(
        {},
        "Custom resources that each of these, and each search actor, takes beside its CPU, such as {cpu_node: 0.01}: Ray "
        "puts it on a node that has them (a local Ray has plenty)",
        operational=True,
    )
    search_actors: int = option(
        0,
        "Actors, of one CPU each, that hold the catalog's shards between them for all generate workers; 0: each worker "
        "maps the whole catalog",
        operational=True,
    )
    write_actors: int = option(1, "Actors with a language model that write queries (source llm)", operational=True)
    cpus_per_write_actor: int = option(2, "CPUs of one of these", operational=True)
    gpus_per_write_actor: float = option(0, "GPUs of one of these", operational=True)
    write_resources: dict[str, float] = option({}, "Custom resources of one of these", operational=True)
    label_actors: int = option(1, "Engine actors that label shards, or embed the catalog", operational=True)
    cpus_per_label_actor: int = option(2, "CPUs of one engine actor", operational=True)
    gpus_per_label_actor: float = option(0, "GPUs of one engine actor", operational=True)
    label_resources: dict[str, float] = option(
        {}, "Custom resources of one engine actor, such as {teacher: 1}", operational=True
    )
    train_workers: int = option(
        2,
        "Data-parallel training workers; 0: train in the job's own process (on the GPU it sees, if any), without Ray Train, "
        "which takes longer to start than a short training",
        operational=True,
    )
    cpus_per_train_worker: int = option(1, "CPUs of one training worker", operational=True)
    train_on_gpu: bool = option(False, "Give each training worker a GPU", operational=True)
    train_resources: dict[str, float] = option({}, "Custom resources of one training worker", operational=True)
    no_progress_minutes: float = option(
        30.0,
        "End labeling, to be resumed, after so long without a labeled shard (the first waits for the model); 0: never",
        operational=True,
    )

    def __post_init__(self) -> None:
        for name in (
            "generate_workers",
            "write_actors",
            "cpus_per_write_actor",
            "label_actors",
            "cpus_per_label_actor",
            "cpus_per_train_worker",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in (
            "search_actors",
            "train_workers",
            "gpus_per_write_actor",
            "gpus_per_label_actor",
            "no_progress_minutes",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        for name in ("generate_resources", "write_resources", "label_resources", "train_resources"):
            for resource, amount in getattr(self, name).items():
                own = resource.strip() and resource not in RAY_RESOURCES and not resource.startswith("node:")
                if not own or not MIN_RESOURCE <= amount < math.inf:
                    raise ValueError(
                        f"{name}: {resource} {amount:g} is no amount ({MIN_RESOURCE:g} or more) of a resource you named"
                    )

    @property
    def generators(self) -> Workers:
        """What generates shards."""
        return Workers(self.generate_workers, 1, 0, self.generate_resources)

    @property
    def writers(self) -> Workers:
        """What writes queries."""
        cpus, gpus = self.cpus_per_write_actor, self.gpus_per_write_actor
        return Workers(self.write_actors, cpus, gpus, self.write_resources)

    @property
    def labelers(self) -> Workers:
        """What labels shards, or embeds the catalog."""
        cpus, gpus = self.cpus_per_label_actor, self.gpus_per_label_actor
        return Workers(self.label_actors, cpus, gpus, self.label_resources)

    @property
    def trainers(self) -> Workers:
        """What trains."""
        cpus, gpus = self.cpus_per_train_worker, int(self.train_on_gpu)
        return Workers(self.train_workers, cpus, gpus, self.train_resources)

    def custom(self) -> set[str]:
        """Names of all custom resources that are asked for."""
        return {
            name for each in (self.generators, self.writers, self.labelers, self.trainers) for name in each.resources
        }

    def needed(self, step: str, writes: bool = False) -> list[Demand]:
        """What a step wants at once, one stage after the other; `writes`: generation has a language model write."""
        if step in ("label", "embed"):
            return [Demand(self.labelers, "resources.label_actors", 1)]
        if step == "generate":
            stages = [Demand(self.generators, "resources.generate_workers", 1)]
            if self.search_actors:  # beside them at least one worker
                together = self.generators.of(self.search_actors + 1)
                stages = [Demand(together, "resources.search_actors", together.count)]
            if writes:
                stages.append(Demand(self.writers, "resources.write_actors", 1, self.generators.of(self.search_actors)))
            return stages
        if step in ("train-teacher", "train-student", "evaluate") and self.train_workers:
            return [Demand(self.trainers, "resources.train_workers", self.train_workers)]
        return []


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole of a run."""

    __pydantic_config__ = STRICT
    data: DataOptions = option(DataOptions(), "The catalog, the judgments and the query log")
    storage: StorageOptions = option(StorageOptions(), "Where the run is kept")
    teacher: TeacherOptions = option(TeacherOptions(), "The model that learns from the human judgments")
    generate: GenerateOptions = option(GenerateOptions(), "The pairs for the teacher to label")
    label: EngineOptions = option(EngineOptions(), "How the pairs are labeled")
    student: StudentOptions = option(StudentOptions(), "The small model that learns from the teacher's labels")
    evaluate: EvaluateOptions = option(EvaluateOptions(), "How models are compared on held-out human judgments")
    serve: ServeOptions = option(ServeOptions(), "How the student is served")
    resources: ResourceOptions = option(ResourceOptions(), "What each step may ask of the cluster")

    def given_models(self, steps: Collection[str]) -> dict[str, str]:
        """The finished model folders that some steps are given, by the key that names each."""
        given = {"label.model": self.label.model} if self.label.model and "label" in steps else {}
        others = self.evaluate.models if "evaluate" in steps else {}
        return given | {f"evaluate.models.{name}": path for name, path in others.items()}


_ADAPTER = TypeAdapter(Config)


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win without a word; here they are a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML configuration and apply `a.b=value` overrides (values are YAML too)."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path} is a folder; name the configuration file in it")
    if not file.is_file():
        raise UserError(f"{path}: there is no such configuration file; jobs/ holds ones to start from")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold sections such as `data:`, not {type(values).__name__}; see jobs/ for examples"
        )
    return build_config(values, overrides, where=path)


def build_config(values: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "configuration") -> Config:
    """Validate plain values; `where` is named in errors. The first mistake is told as a `UserError`."""
    merged: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }
    overridden = [_apply(merged, text) for text in overrides]
    try:
        return _ADAPTER.validate_python(merged)
    except ValidationError as error:
        raise UserError(_explain(error, where, overridden)) from error


def _apply(values: dict[str, Any], text: str) -> str:
    key, separator, raw = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"--set {text!r} must be key=value, such as --set generate.num_pairs=20000")
    try:
        value = yaml.safe_load(raw) if raw else ""
    except yaml.YAMLError as error:
        raise UserError(f"--set {text!r}: the value is no valid YAML; quote it") from error
    node = values
    for part in parts[:-1]:
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise UserError(f"--set {text!r}: {part} is a value, not a section")
        node[part] = node = dict(below)
    node[parts[-1]] = value
    return ".".join(parts)


def _explain(error: ValidationError, where: str, overridden: list[str]) -> str:
    errors = error.errors(include_url=False)
    place = errors[0]["loc"][:2]
    # Of a value that may be this or that, pydantic tells what is wrong with it as either; the deepest knows most.
    first = max((each for each in errors if each["loc"][:2] == place), key=lambda each: len(_location(each["loc"])))
    location = _location(first["loc"])
    key = ".".join(str(part) for part in location)
    from_set = any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in overridden)
    where = f"--set {key}" if from_set else f"{where}: {key}" if key else where
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = _keys_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.0)
        section = ".".join(str(part) for part in location[:-1])
        inside = f"a key of {section}" if section else "a section"
        others = f"; its keys are {', '.join(valid)}" if len(valid) <= 12 else ""
        return f"{where} is not {inside}; did you mean {near[0] if near else '?'}{others}"
    if first["type"] == "dataclass_type":
        return f"{where} must be a section of keys, not {first['input']!r}"
    given = first.get("input")
    shown = f" (it is {given!r})" if not isinstance(given, dict | list) else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{shown}"


def _location(parts: tuple[str | int, ...]) -> list[str | int]:
    """Keys and places in lists, without pydantic's names for the kinds that a value may have."""
    return [part for part in parts if isinstance(part, int) or not ("[" in part or part.endswith(")"))]


def _keys_at(location: list[Any]) -> list[str]:
    """Names of the fields at a place of the configuration."""
    kind: Any = Config
    for part in location:
        kind = typing.get_args(kind)[0] if isinstance(part, int) else typing.get_type_hints(kind)[part]
    for candidate in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(candidate):
            return [field.name for field in dataclasses.fields(candidate)]
    return []


def _one_line(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0]


def describe(kind: Any = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key with its default and description, for the documentation."""
    hints = typing.get_type_hints(kind)
    rows: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            rows += describe(hints[field.name], f"{prefix}{field.name}.")
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "" if default is dataclasses.MISSING else _one_line(default)
        rows.append((prefix + field.name, shown, field.metadata["description"]))
        for item in typing.get_args(hints[field.name]):
            if dataclasses.is_dataclass(item):
                rows += describe(item, f"{prefix}{field.name}[].")
    return rows
