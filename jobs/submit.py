"""Submit a step to a Ray cluster and wait for it: its log here, its own exit code, for cron, Airflow or a Kubernetes Job.

    python jobs/submit.py --address http://HEAD:8265 [--id NAME] STEP CONFIG.yaml [--set KEY=VALUE]

STEP is a command of relevance-ray: run, generate, label, ... The folder it is called from is sent along, without what
.gitignore names. Of an `--id` only one job runs at a time: called again while it does, this follows it; called again after
it ended, it submits the next. Ctrl-C, or SIGTERM, stops the job; called again it goes on where it was.

Exit codes: those of the step (0 done, 2 what you must mend, 3 done with failed rows, 130 stopped, 1 our fault); 4: the
cluster does not answer, or lost the job's driver; try again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

EXIT_USER, EXIT_STOPPED, EXIT_TRY_AGAIN = 2, 130, 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address", default=os.environ.get("RAY_API_SERVER_ADDRESS"), help="of the cluster's dashboard"
    )
    parser.add_argument("--id", default="", help="name of the job; by default STEP and the configuration's name")
    parser.add_argument("step")
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    if not Path(given.config).is_file():
        print(f"error: {given.config}: there is no such configuration file", file=sys.stderr)
        return EXIT_USER
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = given.id or f"{given.step}-{Path(given.config).stem}"
    settings = [part for value in given.set for part in ("--set", value)]
    entrypoint = shlex.join(["relevance-ray", given.step, Path(given.config).as_posix(), *settings])
    cluster = given.address or "the cluster"
    try:
        client = JobSubmissionClient(given.address)
        logging.getLogger("ray").setLevel(logging.WARNING)
        job = submit(client, name, entrypoint)
        return wait(client, job)
    except AuthenticationError as error:
        print(f"error: {cluster} refuses the token: {first_line(error)}", file=sys.stderr)
        return EXIT_USER
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except (OSError, RuntimeError) as error:
        print(f"error: {cluster} does not answer, or not as it should: {first_line(error)}", file=sys.stderr)
        return EXIT_TRY_AGAIN


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def submit(client: JobSubmissionClient, name: str, entrypoint: str) -> str:
    """The id of the job that runs under a name; it is submitted if none does."""
    tried = [job for job in client.list_jobs() if (job.submission_id or "").rpartition("-")[0] == name]
    for job in tried:
        if not job.status.is_terminal():
            if job.entrypoint != entrypoint:
                raise ValueError(f"{job.submission_id} runs already, and is another ({job.entrypoint}); give an --id")
            print(f"{job.submission_id} runs already", file=sys.stderr)
            return str(job.submission_id)
    number = 1 + max((int(job.submission_id.rpartition("-")[2]) for job in tried), default=0)
    submitted = client.submit_job(
        entrypoint=entrypoint, submission_id=f"{name}-{number}", runtime_env={"working_dir": "."}
    )
    print(f"submitted {submitted}: {entrypoint}", file=sys.stderr)
    return submitted


def wait(client: JobSubmissionClient, job: str) -> int:
    """Follow a job to its end, or stop it."""
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal():
            time.sleep(0.5)
        print(f"stopped {job}; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's log until it ends, and return its exit code."""

    async def copy() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(copy())
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.5)
    if info.status is JobStatus.SUCCEEDED:
        return 0
    if info.status is JobStatus.STOPPED:
        return EXIT_STOPPED
    code = info.driver_exit_code
    if code is None or code < 0 or (code > 128 and code != EXIT_STOPPED):
        print(f"{job} lost its driver: {info.message}", file=sys.stderr)
        return EXIT_TRY_AGAIN
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
