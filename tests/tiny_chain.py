"""A configuration of the whole chain with tiny models, and its command line."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from relevance_ray.cli import main


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
        "resources": {"train_workers": 0, "cpus_per_label_actor": 1},
    }


def heed_interrupts() -> None:
    """A job in the background, as tests may be, ignores SIGINT and hands that on; someone at a terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def cli(*arguments: str, cwd: Path | str = ".") -> subprocess.CompletedProcess[str]:
    """The command in this process, which has Ray and torch loaded: what it said, and its exit code. An exception that it
    would end with a traceback for is raised."""
    out, error = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command = ["relevance-ray", *arguments]
    code: Any = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", command),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, code, out.getvalue(), error.getvalue())
