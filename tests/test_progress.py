from __future__ import annotations

import io
import json
import time
from pathlib import Path

from relevance_ray.progress import Progress


def test_the_last_line_and_the_log_tell_the_same(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Progress("label", total=2000, log=tmp_path / "log.jsonl", stream=stream) as progress:
        progress.restart(500)
        progress.advance(100, failures=2, loss=0.123456)
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("label: 600 of 2,000 pairs, ")
    assert "2 failed" in last
    assert "loss 0.1235" in last
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (record["done"], record["total"], record["failures"], record["loss"]) == (600, 2000, 2, 0.123456)


def test_what_an_earlier_run_did_is_no_part_of_the_rate() -> None:
    stream = io.StringIO()
    with Progress("label", total=10**6, stream=stream) as progress:
        progress.restart(10**6 - 1)
        progress.advance()
        time.sleep(0.01)
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("label: 1,000,000 of 1,000,000 pairs, ")
    assert float(last.split(" pairs, ")[1].split("/s")[0].replace(",", "")) <= 100
