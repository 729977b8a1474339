"""Submit a step to a Ray cluster and wait for it: its log here, its own exit code, for cron, Airflow or a Kubernetes Job.

    python jobs/submit.py --address http://HEAD:8265 [--id NAME] STEP CONFIG.yaml [--set KEY=VALUE]
    python jobs/submit.py --address http://HEAD:8265 retry-failed ROOT

The configuration is sent along, and nothing else: what it names must be where the job runs. Of an `--id` only one job runs
at a time: called again while it does, this follows it; called again after it ended, it submits the next. Ctrl-C, or SIGTERM,
stops the job; called again it goes on where it was.

Exit codes: those of the step (0 done, 2 what you must mend, 3 done with failed rows, 130 stopped, 1 our fault); 4: the
cluster does not answer, or lost the job's driver; try again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

TIMEOUT_SECONDS = 10.0
STEPS = (
    "run",
    "prepare",
    "train-teacher",
    "generate",
    "label",
    "compact",
    "embed",
    "train-student",
    "evaluate",
    "diversity",
)
EXIT_USER, EXIT_STOPPED, EXIT_TRY_AGAIN = 2, 130, 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address", default=os.environ.get("RAY_API_SERVER_ADDRESS"), help="of the cluster's dashboard"
    )
    parser.add_argument("--id", default="", help="name of the job; by default STEP and the configuration's name")
    parser.add_argument("--entrypoint-num-gpus", type=float, default=0, help="GPUs of the job's own process (evaluate)")
    parser.add_argument("step", choices=[*STEPS, "retry-failed"], metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("config", metavar="CONFIG.yaml", help="of retry-failed the ROOT of a run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    of_root = given.step == "retry-failed"
    name = given.id or f"{given.step}-{Path(given.config).stem}"
    mistake = ""
    if not given.address:
        mistake = "give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS"
    elif not of_root and not Path(given.config).is_file():
        mistake = f"{given.config}: there is no such configuration file"
    elif not re.fullmatch(r"[\w.-]+", name):
        mistake = f"{name!r} is no name of a job; give an --id of letters, digits, dots, - and _"
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return EXIT_USER
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = given.config if of_root else Path(given.config).name
    settings = [part for value in given.set for part in ("--set", value)]
    entrypoint = shlex.join(["relevance-ray", given.step, config, *settings])
    try:
        answers(given.address)
        client = JobSubmissionClient(given.address)
        for part in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{part}").setLevel(logging.WARNING)
        with tempfile.TemporaryDirectory() as folder:
            if not of_root:
                shutil.copy(given.config, folder)
            job = submit(client, name, entrypoint, folder, given.entrypoint_num_gpus)
        return wait(client, job)
    except AuthenticationError as error:
        print(
            f"error: {given.address} refuses the token: {first_line(error)}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
            file=sys.stderr,
        )
        return EXIT_USER
    except (TakenError, ValueError) as error:
        print(f"error: {given.address}: {first_line(error)}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("stopped before the job was submitted", file=sys.stderr)
        return EXIT_STOPPED
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        print(f"error: {given.address} does not answer, or not as it should: {first_line(error)}", file=sys.stderr)
        return EXIT_TRY_AGAIN


class TakenError(Exception):
    """A name under which another job runs."""


def answers(address: str) -> None:
    """Raise `OSError` where nothing answers at an address within a few seconds; Ray's own client waits for ever."""
    found = urlsplit(address)
    if found.hostname:
        port = found.port or (443 if found.scheme == "https" else 80)
        socket.create_connection((found.hostname, port), timeout=TIMEOUT_SECONDS).close()
        request = urllib.request.Request(f"{address.rstrip('/')}/api/version")
        with contextlib.suppress(urllib.error.HTTPError):  # one that wants a token answers, too
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).read()


def first_line(said: object) -> str:
    return str(said).strip().split("\n")[0][:300]


def submit(client: JobSubmissionClient, name: str, entrypoint: str, folder: str, num_gpus: float = 0) -> str:
    """The id of the job that runs under a name; it is submitted, with a folder to run in, if none does."""
    number, running = jobs_of(client, name, entrypoint)
    if running:
        return running
    try:
        submitted = client.submit_job(
            entrypoint=entrypoint,
            submission_id=f"{name}-{number + 1}",
            runtime_env={"working_dir": folder},
            entrypoint_num_gpus=num_gpus or None,
        )
    except RuntimeError:
        number, running = jobs_of(client, name, entrypoint)  # somebody may have submitted it at the same instant
        if not running:
            raise
        return running
    print(f"submitted {submitted}: {entrypoint}", file=sys.stderr)
    return submitted


def jobs_of(client: JobSubmissionClient, name: str, entrypoint: str) -> tuple[int, str]:
    """The number of the last job under a name (0: there was none), and the id of the one that runs, or ""."""
    numbered, last = re.compile(rf"{re.escape(name)}-(\d+)"), 0
    for job in client.list_jobs():
        if not (found := numbered.fullmatch(job.submission_id or "")):
            continue
        last = max(last, int(found[1]))
        if not job.status.is_terminal():
            if job.entrypoint != entrypoint:
                raise TakenError(f"{job.submission_id} runs already, and is another ({job.entrypoint}); give an --id")
            print(f"{job.submission_id} runs already", file=sys.stderr)
            return last, str(job.submission_id)
    return last, ""


def wait(client: JobSubmissionClient, job: str) -> int:
    """Follow a job to its end, or stop it."""
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it is being stopped
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal():
            time.sleep(0.5)
        print(f"stopped {job}; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's log until it ends, and return its exit code."""
    shown = 0

    async def copy() -> None:
        nonlocal shown
        at = 0
        async for lines in client.tail_job_logs(job):
            print(lines[max(0, shown - at) :], end="", flush=True)
            at += len(lines)
            shown = max(shown, at)

    while True:  # a proxy may close the connection that the log comes by
        asyncio.run(copy())
        if (info := client.get_job_info(job)).status.is_terminal():
            break
        time.sleep(0.5)
    if info.status is JobStatus.SUCCEEDED:
        return 0
    if info.status is JobStatus.STOPPED:
        return EXIT_STOPPED
    code = info.driver_exit_code
    if code is None or code < 0 or (code > 128 and code != EXIT_STOPPED):
        print(f"{job} lost its driver: {first_line(info.message)}", file=sys.stderr)
        return EXIT_TRY_AGAIN
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
