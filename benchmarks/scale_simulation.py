"""What generation and labeling ask of S3 and of Ray at scale, counted on a small run, beside what `relevance-ray plan` says.

The number of shards is what requests, objects, tasks and the head's memory follow, so they are kept many and made small: a
run of 300 million pairs in shards of 20,000 has as many as one of 300,000 in shards of 20. The store is moto's server, whose
log is counted; the teacher is BM25, whose labels take the room of real ones.

    python benchmarks/scale_simulation.py [--shards 1500] [--pairs-per-shard 200] [--actors 4]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import s3fs

from relevance_ray.chain.planning import plan_labeling
from relevance_ray.cluster.session import ray_session
from relevance_ray.config import build_config
from relevance_ray.quiet import quiet_libraries
from relevance_ray.steps import Chain
from relevance_ray.storage import join, listdir

CANDIDATES = 10


def start_store(log: Path) -> subprocess.Popen[bytes]:
    """moto's server with an empty bucket, and the environment that points to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as lines:
        command = [sys.executable, "-c", f"from moto.server import main; main(['-p', '{port}'])"]
        process = subprocess.Popen(command, stdout=lines, stderr=lines)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    s3fs.S3FileSystem().mkdir("bucket")
    return process


def requests(log: Path) -> Counter[str]:
    """How often each kind was asked for since the server was started: a write or a listing, or a read."""
    kinds: Counter[str] = Counter()
    for method, path in re.findall(r'"(?:\x1b\[\d+m)*(GET|PUT|POST|HEAD|DELETE) (\S+)', log.read_text()):
        kinds[
            "put" if method in ("PUT", "POST") or "list-type" in path else "get" if method != "DELETE" else "free"
        ] += 1
    return kinds


def memory_of_head() -> float:
    """Gigabytes of the driver and of Ray's control store."""
    control = [each for each in psutil.process_iter(["name"]) if each.info["name"] == "gcs_server"]
    return sum(each.memory_info().rss for each in [psutil.Process(), *control]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1500)
    parser.add_argument("--pairs-per-shard", type=int, default=200)
    parser.add_argument("--actors", type=int, default=4)
    given = parser.parse_args()
    quiet_libraries()
    work = Path(tempfile.mkdtemp(prefix="scale-"))
    log = work / "store.log"
    store = start_store(log)
    root = "s3://bucket/run"
    values: dict[str, Any] = {
        "data": {"market_size": 20_000},
        "storage": {"root": root},
        "generate": {
            "num_pairs": given.shards * given.pairs_per_shard,
            "groups_per_shard": given.pairs_per_shard // CANDIDATES,
            "source": ["log", "titles"],
            "quotas": {"bm25": 5, "category": 2, "random": 3},
        },
        "teacher": {"kind": "ensemble", "members": [{"kind": "bm25"}]},
        "resources": {
            "num_cpus": max(4, given.actors),
            "generate_workers": 2,
            "label_actors": given.actors,
            "cpus_per_label_actor": 1,
        },
    }
    try:
        config = build_config(values)
        planned = plan_labeling(config).to_dict()
        chain, found = Chain(config), {}
        with ray_session(config.resources.num_cpus):
            chain.run("train-teacher")
            for step in ("generate", "label"):
                before, memory, start = requests(log), memory_of_head(), time.perf_counter()
                chain.run(step)
                asked = requests(log) - before
                folder = next(name for name in listdir(root) if name.startswith(f"{step}-"))
                files = s3fs.S3FileSystem().find(join(root, folder).removeprefix("s3://"), detail=True)
                found[step] = {
                    "seconds": round(time.perf_counter() - start, 1),
                    "put_requests": asked["put"],
                    "get_requests": asked["get"],
                    "objects": len(files),
                    "gigabytes": sum(each["size"] for each in files.values()) / 1e9,
                    "head_kb_a_shard": round((memory_of_head() - memory) * 1e6 / given.shards, 1),
                }
    finally:
        store.terminate()
        shutil.rmtree(work, ignore_errors=True)
    counted = {key: sum(step[key] for step in found.values()) for key in ("put_requests", "get_requests", "objects")}
    counted["generate_gigabytes"], counted["label_gigabytes"] = (
        found[step]["gigabytes"] for step in ("generate", "label")
    )
    for key, value in counted.items():
        print(f"{key:20} {value:12,.4f}  planned {planned.get(key) or 0:12,.4f}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "scale_simulation",
                "hardware": f"{os.cpu_count()} CPUs {platform.machine()}",
                "shards": given.shards,
                "steps": found,
                "planned": {key: planned.get(key) for key in counted},
            }
        )
    )


if __name__ == "__main__":
    main()
