"""A Ray cluster of processes on this machine: a head and nodes, each started by `ray start` as on machines of their own.

They share nothing but an S3 (moto's server, a process of its own): each node has a cache of its own. Nodes are killed as
machines are lost, with everything that runs on them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from tiny_chain import values

from relevance_ray.storage import CommitLog, join, listdir

ROOT = Path(__file__).resolve().parents[1]
SECRET = "ThisSecretIsForTheStoreAlone0123456789"
TOKEN = "ThisTokenIsForTheClusterAlone0123456789"


def configuration(root: str, encoder: Path, num_pairs: int) -> dict[str, Any]:
    """A run whose work goes to nodes with the resources cpu_node, teacher and student."""
    resources = {
        "generate_workers": 2,
        "generate_resources": {"cpu_node": 1},
        "label_actors": 2,
        "cpus_per_label_actor": 1,
        "label_resources": {"teacher": 1},
        "train_workers": 2,
        "train_resources": {"student": 1},
    }
    data = {"market_size": 2000}
    return values(Path(root), encoder, num_pairs=num_pairs) | {
        "data": data,
        "storage": {"root": root},
        "resources": resources,
    }


def labels_at(root: str) -> dict[int, float]:
    """The logit of each pair that has one."""
    [folder] = [name for name in listdir(root) if name.startswith("label-")]
    log = CommitLog(join(root, folder))
    rows = [row for shard in log.committed() for row in log.read(shard, columns=["products"])["products"].to_pylist()]
    products = [product for row in rows for product in row]
    found = {product["pair_id"]: product["logit"] for product in products}
    assert len(found) == len(products)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalCluster:
    """A context, in which the head is there; it holds no work.

    Args:
        folder: gets logs, caches, and what jobs are submitted from (`work`).

    Attributes:
        environment: of all processes; holds the credentials of the store.
        jobs: address of the dashboard, which takes jobs.
        metrics: address at which the head, where drivers run, tells its metrics.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.work.mkdir()
        self._session = Path(tempfile.mkdtemp(prefix="rr", dir="/tmp"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        store, self._port, dashboard, metrics = (free_port() for _ in range(4))
        self.jobs, self.metrics = f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics"
        dropped = ("RAY_ADDRESS", "RELEVANCE_RAY_CACHE")
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }
        self._store, self._dashboard, self._metrics = store, dashboard, metrics

    def __enter__(self) -> LocalCluster:
        try:
            self._start("store", [sys.executable, "-c", f"from moto.server import main; main(['-p', '{self._store}'])"])
            _wait_for(self.environment["AWS_ENDPOINT_URL"])
            head = [f"--port={self._port}", f"--dashboard-port={self._dashboard}", "--dashboard-host=127.0.0.1"]
            head += ["--num-cpus=0", f"--ray-client-server-port={free_port()}"]
            self._ray("head", ["--head", *head], self._metrics)
            _wait_for(f"{self.jobs}/api/version")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_node(self, name: str, num_cpus: int, resources: str = "{}") -> None:
        """Start a node, and wait until the head knows it."""
        options = [f"--address=127.0.0.1:{self._port}", f"--num-cpus={num_cpus}", f"--resources={resources}"]
        self._ray(name, [*options, f"--node-name={name}"], 0)
        for _ in range(300):
            nodes = json.loads(asked(f"{self.jobs}/api/v0/nodes"))["data"]["result"]["result"]
            if any(node["node_name"] == name and node["state"] == "ALIVE" for node in nodes):
                return
            time.sleep(0.2)
        raise TimeoutError(f"node {name} does not come")

    def kill_node(self, name: str) -> None:
        """Lose a node with all that runs on it."""
        _kill(self._processes.pop(name))

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """`jobs/submit.py` in the folder `work`."""
        command = [sys.executable, str(ROOT / "jobs" / "submit.py"), "--address", self.jobs, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.work, env=self.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Submit, and wait for the end."""
        process = self.submit(*arguments)
        said, _ = process.communicate(timeout=400)
        return subprocess.CompletedProcess(arguments, process.returncode, said, "")

    def kill_driver(self, step: str) -> None:
        """Kill a job's driver, as if it ran out of memory."""
        for process in psutil.Process(self._processes["head"].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if len(command) > 2 and command[1].endswith("relevance-ray") and command[2] == step:
                    process.kill()

    def logs(self) -> list[Path]:
        """Every file that Ray and the processes wrote."""
        return [path for root in (self._session, self.folder) for path in root.rglob("*") if path.is_file()]

    def close(self) -> None:
        for process in self._processes.values():
            _kill(process)
        shutil.rmtree(self._session, ignore_errors=True)

    def _ray(self, name: str, options: list[str], metrics: int) -> None:
        ports = ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        ports += [f"--metrics-export-port={metrics or free_port()}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        ports += [
            f"--temp-dir={self._session / name}"
        ]  # nodes of one folder would clear each other's working directories
        memory = f"--object-store-memory={200 * 2**20}"
        self._start(name, [*ray, *options, *ports, memory], {"RELEVANCE_RAY_CACHE": str(self.folder / f"cache-{name}")})

    def _start(self, name: str, command: list[str], extra: Mapping[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            environment = self.environment | dict(extra or {})
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def asked(address: str) -> str:
    """What the cluster answers to its own token."""
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"})
    return str(urllib.request.urlopen(request, timeout=10).read().decode())


def _wait_for(address: str) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError):
            asked(address)
            return
        time.sleep(0.2)
    raise TimeoutError(f"{address} does not answer")
