"""Runs generated programs where they can do no harm: each in a process of its own, watched from here.

The process confines itself (see confined.py) before it looks at the program; this side keeps the clock, watches the
temporary folder and believes only a verdict that carries the job's token. The token guards against programs that leave
early and look like a success; one that searches the interpreter's memory for it can claim to have passed.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tidar.errors import TidarError

RUNNER = Path(__file__).with_name("confined.py")
LONGEST_VERDICT = 1 << 16
FILES, POLL_SECONDS = 256, 0.05


class Bounds(NamedTuple):
    """What a program may use: wall-clock and processor seconds, memory, and space in its folder (each file, and all
    files together)."""

    seconds: float = 10.0
    megabytes: int = 1024
    file_megabytes: int = 16


class Verdict(NamedTuple):
    """Whether a program ran to its end without an exception, and if not, why."""

    passed: bool
    reason: str


def run(program: str, bounds: Bounds = Bounds()) -> Verdict:
    """Run one Python program.

    Raises:
        TidarError: if this machine cannot confine it; nothing of the program has run then.
    """
    with tempfile.TemporaryDirectory(prefix="tidar-") as folder:
        answer = _answer(program, os.path.realpath(folder), bounds)
    if isinstance(answer, str):
        return Verdict(False, answer)
    if "unconfined" in answer:
        raise TidarError(f"generated code is not run: this machine cannot confine it ({answer['unconfined']})")
    return Verdict(bool(answer.get("passed")), str(answer.get("failed", "")))


def run_all(programs: Sequence[str], bounds: Bounds = Bounds(), workers: int | None = None) -> list[Verdict]:
    """Run programs, `workers` at a time (default: one a processor that this process may use)."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: run(program, bounds), programs))


def check() -> None:
    """Raise TidarError unless programs run here, and are confined when they do: tried, not assumed."""
    with tempfile.NamedTemporaryFile(prefix="tidar-") as outside:
        for name, program in PROBES.items():
            verdict = run(program.format(outside=outside.name), Bounds(seconds=30))
            if not verdict.passed:
                raise TidarError(f"generated code is not run: on this machine {name} ({verdict.reason})")


PROBES = {
    "the sandbox runs nothing": "assert sum(range(4)) == 6",
    "a program in the sandbox can start processes": "import os\ntry: os.fork() or os._exit(0)\nexcept OSError: pass\n"
    "else: raise AssertionError('fork')",
    "a program in the sandbox can open sockets": "import socket\ntry: socket.socket()\nexcept OSError: pass\n"
    "else: raise AssertionError('socket')",
    "a program in the sandbox can write to files outside": "try: open({outside!r}, 'r+')\nexcept OSError: pass\n"
    "else: raise AssertionError('open')",
    "a program in the sandbox can change files outside": "import os\ntry: os.chmod({outside!r}, 0o600)\n"
    "except OSError: pass\nelse: raise AssertionError('chmod')",
    "a program in the sandbox can send signals": "import os\ntry: os.kill(os.getppid(), 0)\nexcept OSError: pass\n"
    "else: raise AssertionError('kill')",
}


def _answer(program: str, folder: str, bounds: Bounds) -> dict[str, object] | str:
    """What the runner tells, or why it told nothing."""
    token = secrets.token_hex(16)
    source, sink = os.pipe()
    job = bounds._asdict() | {"program": program, "folder": folder, "sink": sink, "token": token}
    few_threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", str(RUNNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **few_threads},
        pass_fds=[sink],
        start_new_session=True,
    )
    os.close(sink)
    try:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
        except BrokenPipeError:
            return "the sandbox did not start"
        return _watch(source, folder, token, bounds)
    finally:
        process.kill()
        process.wait()
        os.close(source)


def _watch(source: int, folder: str, token: str, bounds: Bounds) -> dict[str, object] | str:
    ends, said = time.monotonic() + bounds.seconds, b""
    while b"\n" not in said:
        left = ends - time.monotonic()
        if left <= 0:
            return f"timed out after {bounds.seconds:g} s"
        if select.select([source], [], [], min(left, POLL_SECONDS))[0]:
            piece = os.read(source, LONGEST_VERDICT)
            if not piece:
                return "ended early"
            said += piece
            if len(said) > LONGEST_VERDICT:
                return "wrote where the verdict is expected"
        if _too_much(folder, bounds):
            return f"kept more than {bounds.file_megabytes} MB or {FILES} files"
    try:
        answer = json.loads(said.partition(b"\n")[0])
    except ValueError:
        return "wrote where the verdict is expected"
    if not isinstance(answer, dict) or answer.get("token") != token:
        return "wrote where the verdict is expected"
    return answer


def _too_much(folder: str, bounds: Bounds) -> bool:
    size = 0
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            try:
                size += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            if count >= FILES or size > bounds.file_megabytes << 20:
                return True
    return False
