"""Served models under load while things change or break: a roll-out, a broken folder, a killed replica, too many callers."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema
from tiny_student import build_tiny_student

from relevance_ray.errors import UserError
from relevance_ray.serving import app
from relevance_ray.serving.app import build, running_server
from relevance_ray.serving.config_file import absolute_paths, serve_config, write_serve_config
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "serving_load.py"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    """The benchmark's callers, who know what they should be answered."""
    spec = importlib.util.spec_from_file_location("serving_load", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_load"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: build_tiny_student(folder / name, seed=seed) for name, seed in (("first", 7), ("second", 8))}
    found["broken"] = build_tiny_student(folder / "broken", seed=9)
    weights = found["broken"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    return found


@pytest.fixture
def serving(ray_cluster: None, models: dict[str, Path], load: ModuleType) -> Iterator[Any]:
    """Two replicas of the first model, and callers who know both models."""
    asked = load.make_requests(3)
    scorers = [Scorer(models[name], device="cpu") for name in ("first", "second")]
    expected = {scorer.model_id: load.logits_of(scorer, asked) for scorer in scorers}
    with running_server(models["first"], port=0, options=ServeOptions(num_replicas=2)) as server:
        yield server, load.Callers(server.url, asked, expected), [scorer.model_id for scorer in scorers]


class Background:
    """Four callers at work in a thread for as long as the block, and two seconds on either side; then `seen`."""

    def __init__(self, callers: Any) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(
            target=lambda: setattr(self, "seen", callers.closed(4, 300, self.over.is_set)[1])
        )

    def __enter__(self) -> Background:
        self.thread.start()
        time.sleep(2)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(2)
        self.over.set()
        self.thread.join()


@pytest.mark.slow
def test_a_new_model_takes_over_under_load_without_a_failed_request(serving: Any, models: dict[str, Path]) -> None:
    server, callers, (first, second) = serving
    with Background(callers) as background:
        server.roll_out(models["second"])
    seen = background.seen
    assert set(seen.statuses) <= {200, 429}
    assert seen.wrong == 0
    assert set(seen.models) == {first, second}
    assert requests.get(f"{server.url}/info", timeout=30).json()["model_id"] == second


@pytest.mark.slow
def test_a_broken_folder_never_takes_traffic(
    serving: Any, models: dict[str, Path], load: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, callers, (first, _) = serving
    with Background(callers) as background:
        with pytest.raises(UserError, match=r"broken does not load \(SafetensorError"):
            server.roll_out(models["broken"])
        # And where nobody looked before: its replicas do not start, and the old ones go on.
        monkeypatch.setattr(app, "check_model", lambda folder, on_gpu=False: None)
        with pytest.raises(UserError, match=r"broken did not start \(.*SafetensorError"):
            server.roll_out(models["broken"])
    seen = background.seen
    assert set(seen.statuses) <= {200, 429}
    assert set(seen.models) == {first}
    assert seen.wrong == 0
    for process in load.replica_processes():  # and are started anew where they die
        process.kill()
    deadline = time.monotonic() + 60
    while callers.closed(1, 1)[1].statuses.keys() != {200}:
        assert time.monotonic() < deadline


@pytest.mark.slow
def test_a_killed_replica_takes_along_only_what_was_in_flight_there(serving: Any, load: ModuleType) -> None:
    _, callers, (first, _) = serving
    before = {process.pid for process in load.replica_processes()}
    assert len(before) == 2
    with Background(callers) as background:
        killed = load.replica_processes()[0]
        killed.kill()
        at = time.monotonic()
        while len({p.pid for p in load.replica_processes()} - {killed.pid}) < 2 and time.monotonic() < at + 30:
            time.sleep(0.2)
        back = time.monotonic() - at
    seen = background.seen
    assert back < 30
    assert seen.wrong == 0
    assert set(seen.models) == {first}
    assert len(seen.lost) <= 4  # as many as there are callers
    assert all(moment < at + 15 for moment in seen.lost)
    assert seen.statuses[200] > 100


@pytest.mark.slow
def test_past_capacity_what_is_taken_is_answered_soon_and_right(models: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), str(models["first"]), "--seconds", "40", "--products", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = yaml.safe_load(done.stdout.splitlines()[-1])
    assert figures["wrong"] == figures["other_over"] == figures["refused_without_retry_after"] == 0
    assert figures["refused_over"] > 0
    assert figures["answered_per_second_over"] > 0.6 * figures["capacity"]
    assert figures["p99_over_high"] < 3  # 2 in a quiet hour of ten minutes, as benchmarks/RESULTS.md has it
    assert figures["memory_growth_mb"] < 50
    assert figures["replica_survived"]


def test_the_written_configuration_is_one_that_ray_serve_deploys(models: dict[str, Path], tmp_path: Path) -> None:
    options = ServeOptions(num_replicas=2, shadow_log="s3://bucket/log")
    write_serve_config(str(tmp_path / "serve.yaml"), str(models["first"]), "0.0.0.0", 8123, options)
    found = yaml.safe_load((tmp_path / "serve.yaml").read_text(encoding="utf-8"))
    assert found == serve_config(str(models["first"]), "0.0.0.0", 8123, options)
    schema = ServeDeploySchema.model_validate(found)
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8123)
    [application] = schema.applications
    assert application.import_path == "relevance_ray.serving.app:build"
    assert application.args == {
        "model": str(models["first"]),
        "options": {"num_replicas": 2, "shadow_log": "s3://bucket/log"},
    }
    assert isinstance(build(application.args), serve.Application)
    with pytest.raises(ValueError, match="shadow_share must be from 0 to 1"):
        build({"model": "m", "options": {"shadow_share": 2}})
    named = absolute_paths(ServeOptions(tokens_file="tokens", examples="s3://bucket/e.jsonl"))
    assert (named.tokens_file, named.examples) == (str(Path.cwd() / "tokens"), "s3://bucket/e.jsonl")
    assert named.shadow_log == ""


def test_a_file_among_the_options_that_cannot_be_read_is_named_before_ray_starts(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for options, said in (
        (ServeOptions(tokens_file=str(tmp_path / "absent")), r"cannot read serve\.tokens_file .*absent"),
        (ServeOptions(examples=str(tmp_path)), r"which serve\.examples names, cannot be read \(Is a directory\)"),
        (ServeOptions(shadow_log="/proc/log"), r"serve\.shadow_log /proc/log cannot be made"),
    ):
        with pytest.raises(UserError, match=said), running_server(models["first"], port=0, options=options):
            pass


@pytest.mark.slow
def test_strangers_and_slow_bodies_keep_nobody_from_being_answered(
    ray_cluster: None, models: dict[str, Path], tmp_path: Path
) -> None:
    """150 callers without a token, and as many with one, who send a byte and wait."""
    (tmp_path / "tokens").write_text("right\n", encoding="utf-8")
    options = ServeOptions(tokens_file=str(tmp_path / "tokens"), body_seconds=5)
    bearer = {"Authorization": "Bearer right"}
    with running_server(models["first"], port=0, options=options) as server:
        port = int(server.url.rsplit(":", 1)[1])
        slow = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(300)]
        for number, connection in enumerate(slow):
            connection.putrequest("POST", "/score")
            connection.putheader("Content-Length", "100")
            if number % 2:
                connection.putheader("Authorization", bearer["Authorization"])
            connection.endheaders()
            connection.send(b"{")
        assert requests.get(f"{server.url}/health", timeout=4).status_code == 200
        body = {"query": "red", "products": ["shoes"]}
        assert requests.post(f"{server.url}/score", json=body, headers=bearer, timeout=10).status_code == 200
        statuses = [connection.getresponse().status for connection in slow]
        assert set(statuses[::2]) == {401}
        assert set(statuses[1::2]) == {408}


@pytest.mark.slow
def test_serve_run_takes_the_written_configuration(ray_cluster: None, models: dict[str, Path], tmp_path: Path) -> None:
    """With Ray's own command, on the cluster that runs."""
    import ray

    config = tmp_path / "serve.yaml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    write_serve_config(str(config), str(models["first"]), "127.0.0.1", port, ServeOptions())
    address = ray.get_runtime_context().gcs_address
    command = [str(Path(sys.executable).parent / "serve"), "run", "--address", address, "--non-blocking", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 90
        answer = None
        while (answer is None or answer.status_code != 200) and time.monotonic() < deadline:
            time.sleep(1)
            with contextlib.suppress(requests.RequestException):
                answer = requests.post(
                    f"http://127.0.0.1:{port}/score", json={"query": "red", "products": ["shoes"]}, timeout=5
                )
        assert answer is not None
        assert answer.json()["model_id"] == Scorer(models["first"]).model_id
    finally:
        process.terminate()
        process.wait(30)
        serve.shutdown()
