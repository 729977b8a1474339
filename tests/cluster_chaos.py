"""Labeling on a cluster that keeps losing its parts: nodes and drivers are killed at random, and jobs submitted again.

The cluster is the one of `make cluster-test`: a head and nodes as processes of this machine, S3 by moto's server, `ray job
submit`. When the job has ended well, every pair has one label, and it is the one that a single process gives.

    python tests/cluster_chaos.py [--pairs 40000] [--kills 6] [--every 15] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import s3fs
import yaml
from local_cluster import LocalCluster, configuration, labels_at
from tiny_training import build_tiny_encoder

from relevance_ray.quiet import quiet_libraries
from relevance_ray.storage import join, read_json

RUN = "s3://bucket/run"
TEACHER = '{"teacher": 1}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--every", type=float, default=15.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        (work := Path(folder) / "cluster").mkdir()
        encoder = build_tiny_encoder(Path(folder) / "encoder", num_layers=1)
        with LocalCluster(work) as cluster:
            figures = chaos(cluster, encoder, Path(folder) / "alone", given)
    hardware = f"{os.cpu_count()} CPUs {platform.machine()}"
    print(json.dumps({"benchmark": "cluster_chaos", "hardware": hardware, "figures": figures}))


def chaos(cluster: LocalCluster, encoder: Path, alone: Path, given: argparse.Namespace) -> dict[str, Any]:
    config = cluster.work / "config.yaml"
    config.write_text(yaml.safe_dump(configuration(RUN, encoder, given.pairs)))
    os.environ |= {name: value for name, value in cluster.environment.items() if name.startswith("AWS_")}
    s3fs.S3FileSystem().mkdir("bucket")
    cluster.add_node("cpu", 2, '{"cpu_node": 2, "student": 2}')
    alive = [f"teacher-{number}" for number in range(2)]
    for name in alive:
        cluster.add_node(name, 1, TEACHER)
    first = cluster.run("generate", "config.yaml")
    assert first.returncode == 0, first.stdout
    rng, killed, done = random.Random(given.seed), Counter[str](), threading.Event()

    def kill() -> None:
        for number in range(given.kills):
            if done.wait(given.every):
                return
            what = rng.choice(["node", "driver"])
            killed[what] += 1
            print(f"killing a {what}", flush=True)
            if what == "driver":
                cluster.kill_driver("label")
                continue
            cluster.kill_node(alive.pop(rng.randrange(len(alive))))
            alive.append(f"another-{number}")
            cluster.add_node(alive[-1], 1, TEACHER)

    killer, codes, start = threading.Thread(target=kill, daemon=True), [], time.perf_counter()
    killer.start()
    while not codes or codes[-1] == 4:
        said = cluster.run("label", "config.yaml")
        codes.append(said.returncode)
    seconds = time.perf_counter() - start
    done.set()
    killer.join()
    assert codes[-1] == 0, said.stdout
    teacher = read_json(join(RUN, "latest.json"))["teacher"]
    settings = [f"--set=storage.root={alone}", f"--set=label.model={teacher}"]
    command = [sys.executable, "-m", "relevance_ray.cli"]
    subprocess.run([*command, "generate", str(config), *settings], check=True)
    start = time.perf_counter()
    subprocess.run([*command, "label", str(config), *settings], check=True)
    undisturbed = time.perf_counter() - start
    labels, one = labels_at(RUN), labels_at(str(alone))
    return {
        "killed": dict(killed),
        "submissions": len(codes),
        "seconds": round(seconds, 1),
        "seconds_of_one_process_undisturbed": round(undisturbed, 1),
        "pairs": len(labels),
        "pairs_without_a_label": len(one.keys() - labels.keys()),
        "largest_difference_of_a_logit": max(abs(labels[pair] - one[pair]) for pair in one),
    }


if __name__ == "__main__":
    main()
