"""A compaction to be killed: run as a script, it compacts ROOT/label into ROOT/compact, file after file.

python tests/compaction_job.py ROOT TARGET_BYTES SECONDS_A_FILE
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from relevance_ray.labeling.compaction import Do, Part, compact
from relevance_ray.storage import CommitLog, join


def main() -> None:
    root, target_bytes, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    labels = CommitLog(join(root, "label"))

    def slowly(do: Do, parts: Sequence[Part]) -> Iterator[int]:
        for part in parts:
            yield do(part)
            time.sleep(seconds)

    folder = join(root, "compact")
    print(compact(labels, list(labels.committed()), folder, "c", target_bytes=target_bytes, run=slowly))


if __name__ == "__main__":
    main()
