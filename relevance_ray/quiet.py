"""Keep libraries' own bars and banners off the terminal, where the live line of a step stands alone.

Warnings of ours and every exception still come through; Ray's and its workers' full logs stay in Ray's log folder.
"""

from __future__ import annotations

import os

_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


def quiet_libraries() -> None:
    """Set what the environment does not set already; to be called before the libraries are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
