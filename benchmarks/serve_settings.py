"""What Ray Serve's settings give a student, side by side: copies against threads, and Serve's throughput-optimized mode.

Two loads, closed: 8 callers with 100 products whose scores no cache knows (the model is the limit), and 16 callers with 10
products that are all remembered (HTTP is the limit). All variants run, one at a time is asked, and rounds alternate.

    python benchmarks/serve_settings.py MODEL_DIR [--seconds 10] [--rounds 3] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
from pathlib import Path
from typing import Any
from unittest import mock

from servers import CORES, Spell, ask, ours
from serving import read_texts, row_of, show, uniform

VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    f"1 copy, {CORES} threads": ([], {}),
    f"{CORES} copies, 1 thread": ([f"serve.num_replicas={CORES}", "serve.cpus_per_replica=1"], {}),
    f"1 copy, {CORES} threads, throughput-optimized": ([], {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", default="runs/serving")
    given = parser.parse_args()
    model, work = Path(given.model).absolute(), Path(given.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    fields = json.loads((model / "relevance.json").read_text())["template"]["fields"]
    texts = read_texts(fields, work)
    hot = [(texts.queries[place], texts.candidates(place, 10)) for place in range(50)]
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        servers = []
        for name, (settings, environment) in VARIANTS.items():
            with mock.patch.dict("os.environ", environment):
                started = ours(model, work / "variant.log", name, caches=True, settings=settings)
                servers.append(stack.enter_context(started))
        for server in servers:
            for _ in range(4):  # each copy remembers for itself
                ask(server, itertools.cycle(hot), 1, 0.5)
                ask(server, itertools.cycle(hot), 4, 4.0)
        cold: dict[str, list[Spell]] = {}
        warm: dict[str, list[Spell]] = {}
        for number in range(given.rounds):
            for server in servers:
                seed = number * len(servers) + servers.index(server)  # no request is seen twice by a copy
                cold.setdefault(server.name, []).append(ask(server, uniform(texts, 100, seed), 8, given.seconds))
                warm.setdefault(server.name, []).append(ask(server, itertools.cycle(hot), 16, given.seconds))
    for spells, load in ((cold, (8, 100)), (warm, (16, 10))):
        for name, each in spells.items():
            rows.append(row_of(name, *load, each))
            show(rows[-1])
    print(json.dumps({"benchmark": "serve_settings", "hardware": f"{CORES} CPUs {platform.machine()}", "rows": rows}))


if __name__ == "__main__":
    main()
