"""The OpenAPI document, held against the server: schemathesis makes requests from it, valid ones and broken ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from on_a_socket import on_a_socket
from tiny_student import build_tiny_student, build_tiny_two_tower

from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer

# A text that fits the schema may still be blank, or longer than this model reads: 422, with a sentence. And of what does not
# fit, some is too large before anybody looks at it: 413.
SETTINGS = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "413", "422"]
negative_data_rejection.expected-statuses = ["400", "404", "405", "406", "413", "415", "422"]
"""


@pytest.mark.parametrize(
    ("build", "selected", "num_selected"),
    [(build_tiny_student, [], 9), (build_tiny_two_tower, ["--include-path", "/embed"], 1)],
    ids=["cross-encoder", "vectors of a two-tower"],
)
def test_schemathesis_finds_nothing(
    tmp_path: Path, build: Callable[[Path], Path], selected: list[str], num_selected: int
) -> None:
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(SETTINGS, encoding="utf-8")
    options = ServeOptions(max_queued_requests=100, max_queued_pairs=1_000_000)
    with on_a_socket(create_app(Scorer(build(tmp_path / "student")), options)) as (host, port):
        command = [Path(sys.executable).parent / "schemathesis", "--config-file", settings, "run"]
        command += [f"http://{host}:{port}/openapi.json", "--checks", "all", "--max-examples", "40", "--seed", "1"]
        command += selected
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
        document = requests.get(f"http://{host}:{port}/openapi.json", timeout=30).json()
    assert done.returncode == 0, f"{done.stdout[:3000]} ... {done.stdout[-2000:]}"
    assert f"{num_selected} selected / 9 total" in done.stdout
    asked = {path: how["post"] for path, how in document["paths"].items() if "post" in how}
    assert sorted(asked) == ["/embed", "/rerank", "/score", "/v1/rerank", "/v2/rerank"]
    for path, how in asked.items():
        assert {"401", "408", "413", "415", "422", "429"} <= set(how["responses"]), path
