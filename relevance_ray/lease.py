"""One driver at a time on a root, and who it is."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from relevance_ray.errors import UserError
from relevance_ray.file_systems import StorageError, is_remote
from relevance_ray.storage import exists, join, read_json, remove_file
from relevance_ray.whole_files import create_exclusive, write_bytes

LEASE_SECONDS = 90.0
"""A lease on S3 whose heartbeat is older than this belongs to a dead driver."""


def lease_holder(root: str) -> dict[str, Any] | None:
    """Who holds the lease on a root now, or None."""
    path = join(root, "lease.json")
    if not exists(path):
        return None
    if is_remote(root):
        try:
            holder = dict(read_json(path))
        except FileNotFoundError:
            return None
        return None if _is_over(holder) else holder
    with open(path.removeprefix("file://")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read()
            return dict(json.loads(text)) if text else {}
    return None


class Lease:
    """One driver at a time on a root. On disk the kernel's file lock, which dies with its process; on S3 an object with
    a heartbeat, taken over once that is older than `LEASE_SECONDS`, and at once from a process that is seen to be gone."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.path = join(root, "lease.json")
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "token": uuid.uuid4().hex,
        }
        self._file: Any = None
        self._stop, self._lost = threading.Event(), threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        if is_remote(self.root):
            self._acquire_remote()
        else:
            self._acquire_local()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        if self._file is not None:
            self._file.close()
            return
        self._heartbeat.join()
        if self._lost.is_set():
            raise UserError(f"another driver took storage.root {self.root} over; see that only one runs")
        try:
            if exists(self.path) and read_json(self.path)["token"] == self._owner["token"]:
                remove_file(self.path)
        except StorageError:
            if kind is None:
                raise
            # What ended the run is told instead, which may be the same store; the lease runs out by itself.

    def _refuse(self, holder: Mapping[str, Any]) -> UserError:
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        return UserError(
            f"storage.root {self.root} is in use by {who}; wait for it or stop it, or choose another storage.root"
        )

    def _acquire_local(self) -> None:
        path = self.path.removeprefix("file://")
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            self._file = open(path, "a+")  # noqa: SIM115 (held until the lease ends)
        except OSError as error:
            raise UserError(
                f"storage.root {self.root} cannot be written to ({error.strerror}); choose another folder"
            ) from error
        try:
            self._lock()
        except BlockingIOError:
            self._file.seek(0)
            text = self._file.read()
            self._file.close()
            raise self._refuse(json.loads(text) if text else {}) from None
        self._file.truncate(0)
        self._file.write(json.dumps(self._owner))
        self._file.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)  # `lease_holder` may be looking
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _acquire_remote(self) -> None:
        if not create_exclusive(self.path, self._stamp()):
            holder = read_json(self.path)
            if not _is_over(holder):
                raise self._refuse(holder)
            self._take_over(holder)
        self._heartbeat.start()

    def _take_over(self, dead: Mapping[str, Any]) -> None:
        """Of several that find the same dead driver one takes its lease: who claims it first."""
        claim = f"{self.path}.{dead['token']}"
        if not create_exclusive(claim, self._stamp()):
            claimed = read_json(claim)
            if time.time() - claimed["heartbeat"] > LEASE_SECONDS:
                remove_file(claim)  # who made it died with it; the next try takes over
            raise self._refuse(claimed)
        try:
            holder = read_json(self.path)
            if holder["token"] != dead["token"]:  # taken over already, and the claim given back
                raise self._refuse(holder)
            write_bytes(self.path, self._stamp())
        finally:
            remove_file(claim)

    def _stamp(self) -> bytes:
        return json.dumps({**self._owner, "heartbeat": time.time()}).encode()

    def _beat(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 4):
            try:
                if read_json(self.path)["token"] != self._owner["token"]:
                    self._lost.set()
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                write_bytes(self.path, self._stamp())
            except (OSError, StorageError):
                continue  # the next beat may get through; until then nobody takes over


def _machine() -> str:
    """Where a process id means the same process: one boot of one machine, and what its container sees of it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
            return f"{socket.gethostname()} {boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_over(holder: Mapping[str, Any]) -> bool:
    """Whether who holds a lease on S3 is dead."""
    if time.time() - holder["heartbeat"] >= LEASE_SECONDS:
        return True
    if not holder.get("machine") or holder["machine"] != _machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
