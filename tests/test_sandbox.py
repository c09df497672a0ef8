"""Generated programs are judged right, and whatever they try stays where it is."""

import os
import time
from pathlib import Path

import pytest

from needs import needs_sandbox
from tidar.errors import TidarError
from tidar.evaluate import confined, sandbox
from tidar.evaluate.sandbox import Bounds, run

SMALL = Bounds(seconds=2.0, megabytes=256, file_megabytes=1)


pytestmark = needs_sandbox


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a + b\nassert add(1, 2) == 3",
        "from typing import List\nimport math, re, collections, heapq, itertools\nassert math.gcd(4, 6) == 2",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "open('notes', 'w').write('a')\nassert open('notes').read() == 'a'",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    ],
)
def test_a_right_program_passes(program):
    assert run(program, SMALL) == (True, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("input()", "EOFError"),
        (
            "import os\nfor fd in range(3, 60):\n  try: os.write(fd, b'{\"passed\": true}\\n')\n  except OSError: pass",
            "verdict",
        ),
        ("def f(): return f()\nf()", "RecursionError"),
    ],
)
def test_a_wrong_program_fails_and_says_how(program, reason):
    verdict = run(program, SMALL)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\n"
        "while True: pass",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "try:\n  while True: pass\nexcept BaseException: pass",
    ],
)
def test_time_is_up_for_endless_programs(program):
    started = time.monotonic()
    assert run(program, SMALL._replace(seconds=0.5)).reason == "timed out after 0.5 s"
    assert time.monotonic() - started < 5


DENIED = "except OSError as e: raise SystemExit('denied' if e.errno in (1, 13, 18) else repr(e))"
"""EPERM, EACCES, and EXDEV: what may not be linked here is said to be on another device."""


def attempt(statement: str) -> str:
    return f"import os, signal, socket, subprocess, ctypes\ntry: {statement}\n{DENIED}"


@pytest.mark.parametrize(
    "statement",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.create_connection(('127.0.0.1', 80))",
        "os.kill(os.getppid(), signal.SIGKILL)",
        "os.killpg(os.getpgid(os.getppid()), signal.SIGTERM)",
        "__import__('fcntl').fcntl(0, 8, os.getppid())",
        "__import__('fcntl').fcntl(0, 10, signal.SIGKILL)",
        "os.setsid()",
        "os.listdir('/proc')",
        "open('/etc/passwd')",
        "os.mkdir('deep')",
        "os.symlink('/etc', 'link')",
    ],
)
def test_other_processes_the_network_and_the_machine_are_out_of_reach(statement):
    assert run(attempt(statement), SMALL).reason == "SystemExit: denied"


@pytest.mark.parametrize(
    "statement",
    [
        "os.remove({path!r})",
        "os.truncate({path!r}, 0)",
        "open({path!r}, 'w')",
        "open({path!r})",
        "os.rename({path!r}, 'mine')",
        "os.link({path!r}, 'mine')",
        "os.chmod({path!r}, 0o777)",
        "os.utime({path!r}, (0, 0))",
        "os.chown({path!r}, 1, 1)",
        "os.setxattr({path!r}, 'user.a', b'b')",
        "os.rmdir({folder!r})",
        "open({folder!r} + '/new', 'w')",
        "open('../new', 'w')",
        "__import__('shutil').rmtree({folder!r})",
    ],
)
def test_files_outside_stay_as_they_are(statement, tmp_path):
    path = tmp_path / "precious"
    path.write_text("kept")
    os.chmod(path, 0o600)
    before = path.stat()
    program = attempt(statement.format(path=str(path), folder=str(tmp_path)))
    assert run(program, SMALL).reason == "SystemExit: denied"
    assert path.read_text() == "kept"
    assert path.stat().st_mode == before.st_mode
    assert path.stat().st_mtime == before.st_mtime
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = bytearray(1 << 33)", "MemoryError"),
        ("kept = []\nwhile True: kept.append(bytes(1 << 22))", "MemoryError"),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "can't start"),
        ("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 16))", "File too large"),
        ("for i in range(10 ** 6): open(str(i), 'w').close()", "files"),
        ("import sys\nwhile True: sys.stdout.write('x' * 10 ** 6)", "timed out"),
        ("import os\nwhile True: os.write(1, b'x' * 10 ** 6)", "timed out"),
        ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "Error"),
        ("import os\nfds = [os.memfd_create('a') for _ in range(9)]", "PermissionError"),
        ("raise ValueError('x' * 10 ** 7)", "ValueError"),
    ],
)
def test_memory_disk_and_output_are_bounded(program, reason):
    verdict = run(program, SMALL._replace(seconds=1.5))
    assert not verdict.passed
    assert reason in verdict.reason
    assert len(verdict.reason) < 400


def test_what_a_program_left_is_gone_and_its_environment_holds_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("import os\nassert 'HF_TOKEN' not in os.environ\nopen('left', 'w').write('a')", SMALL).passed
    assert list(tmp_path.iterdir()) == []


def test_system_calls_through_ctypes_are_filtered_too():
    raw = "libc = ctypes.CDLL(None, use_errno=True)\nfor call in (57, 41, 62, 59, 90):\n"
    raw += "  assert libc.syscall(call, 0, 0, 0) == -1"
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    assert run(f"import ctypes\n{raw}\n  assert ctypes.get_errno() == 1", SMALL).passed


def test_programs_run_side_by_side_and_keep_their_order():
    verdicts = sandbox.run_all(["pass", "assert False", "pass"], SMALL, workers=3)
    assert [v.passed for v in verdicts] == [True, False, True]


def test_the_filter_knows_every_machine_and_denies_no_call_twice():
    for column, machine in enumerate(confined.MACHINES):
        numbers = [pair[column] for pair in confined.DENIED.values() if pair[column] >= 0]
        assert len(numbers) == len(set(numbers))
        assert max(numbers) < confined.NEWEST
        assert not {
            confined.CLONE[column],
            confined.CLONE3[column],
            confined.PRLIMIT[column],
            confined.FCNTL[column],
        } & set(numbers)
        assert len(confined.filter_program(machine)) % 8 == 0


def test_without_confinement_nothing_runs(monkeypatch, tmp_path):
    runner = tmp_path / "runner.py"
    source = Path(confined.__file__).read_text()
    runner.write_text(source.replace("libc.syscall(CREATE_RULESET, None", "libc.syscall(9999, None"))
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    with pytest.raises(TidarError, match=r"cannot confine it .*Landlock"):
        run("pass")
    with pytest.raises(TidarError, match="cannot confine it"):
        sandbox.check()


def test_a_sandbox_that_leaks_is_noticed(monkeypatch, tmp_path):
    runner = tmp_path / "runner.py"
    source = Path(confined.__file__).read_text()
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    for step, leak in (
        ("_restrict_calls(libc, machine)", "start processes"),
        ("_restrict_files(libc, folder)", "write"),
    ):
        runner.write_text(source.replace(f"    {step}\n", "    pass\n", 1))
        with pytest.raises(TidarError, match=leak):
            sandbox.check()
