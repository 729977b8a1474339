from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from relevance_ray import object_log, storage
from relevance_ray import progress as progress_module
from relevance_ray.chain.run_state import describe
from relevance_ray.cluster.gauges import RunGauges
from relevance_ray.object_log import ObjectLog, newest_lines
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


def test_a_log_on_s3_is_rewritten_now_and_then_and_rolls_over(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_log, "MAX_LINES", 10)
    root = "s3://bucket/logged"
    log = ObjectLog(root)
    with Progress("generate", unit="pairs", log=log, stream=io.StringIO()) as progress:
        progress.update(3)  # the first line is there at once
        assert [json.loads(line)["done"] for line in newest_lines(root).splitlines()] == [3]
        for _ in range(20):
            progress.advance()
            progress._show()
        (first, second) = storage.listdir(f"{root}/log")
    assert len(storage.read_bytes(f"{root}/log/{first}").splitlines()) == 10
    with Progress("label", log=log, stream=io.StringIO()) as progress:
        progress.advance(5)
    assert storage.listdir(f"{root}/log")[0] == first
    names = [json.loads(line)["step"] for line in newest_lines(root).splitlines()]
    assert names[-1] == "label"
    assert second in storage.listdir(f"{root}/log")


def test_status_of_a_root_on_s3_shows_the_last_line(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from relevance_ray.lease import Lease

    root = "s3://bucket/logged-status"
    storage.write_json(f"{root}/run.json", {"folders": {}})
    with Lease(root), Progress("label", total=10, log=ObjectLog(root), stream=io.StringIO()) as progress:
        progress.advance(5, failures=1)
        *_, driver, line = describe(root)
    assert driver.startswith("driver: process")
    assert line.startswith("label: 5 of 10 pairs, ")
    assert ", 1 failed" in line


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(
    s3_server: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(object_log, "WRITE_SECONDS", 0.0)
    with Progress("label", log=ObjectLog("s3://no-such-bucket/run"), stream=io.StringIO()) as progress:
        for _ in range(3):
            progress._show()
    said = capsys.readouterr().err
    assert said.count("the log cannot be written, and the run goes on without") == 1


def test_a_line_that_nobody_updates_is_shown_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "PLAIN_BEAT_SECONDS", 0.05)
    stream = io.StringIO()
    with Progress("generate", stream=stream) as progress:
        progress.update(stage="catalog")
        progress.update(stage="writing 0/9")  # too soon after the first to be shown for itself
        deadline = time.monotonic() + 10
        while "writing 0/9" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    first, second, *_ = stream.getvalue().splitlines()
    assert first.endswith("stage catalog")
    assert second.endswith("stage writing 0/9")


def test_what_is_no_longer_so_leaves_the_line() -> None:
    stream = io.StringIO()
    with Progress("label", stream=stream) as progress:
        progress.update(stage="earlier labels 1/2")
        progress.update(3, stage=None)
    assert "stage" not in stream.getvalue().splitlines()[-1]


def test_gauges_say_nothing_while_ray_is_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    RunGauges("runs/x")({"step": "label", "done": 1}, False)
