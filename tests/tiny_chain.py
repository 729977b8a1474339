"""A configuration of the whole chain with tiny models, and its command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def values(root: Path, encoder: Path, **generate: Any) -> dict[str, Any]:
    """A run on a market of 300 products with models of one random layer: everything real but the size."""
    model = {"model": str(encoder), "max_tokens": 32}
    return {
        "data": {"market_size": 300},
        "storage": {"root": str(root)},
        "teacher": {**model, "fit": {"epochs": 1, "batch_size": 256}},
        "generate": {
            "num_pairs": 800,
            "groups_per_shard": 25,
            "quotas": {"bm25": 4, "category": 2, "random": 2},
            **generate,
        },
        "student": model,
        "evaluate": {
            "baselines": ["bm25", "random"],
            "num_resamples": 50,
            "human_fit": {"epochs": 1, "batch_size": 64},
        },
        "resources": {"train_workers": 1, "cpus_per_label_actor": 1},
    }


def heed_interrupts() -> None:
    """A job in the background, as tests may be, ignores SIGINT and hands that on; someone at a terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def cli(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "relevance_ray.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False, **kwargs)
