"""`trainers.sandbox`: what a program may do, what it may not, and that nothing of it is left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import no_kernel

from trainers import sandbox

pytestmark = [no_kernel, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")]

ROOT = Path(__file__).parent.parent


def running(marker):
    """Command lines of the processes that name `marker`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return [line for line in found if marker in line]


def comes_true(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pids):
    """Those that are there and no zombies, which are init's to reap."""
    return [pid for pid in pids if Path("/proc", pid).exists() and Path("/proc", pid, "cmdline").read_bytes()]


def sleeper(marker):
    return f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}])"


def test_a_program_that_is_right():
    code = "print(input()[::-1])\ndef twice(x):\n    return 2 * x"
    result = sandbox.run(code, tests="assert twice(2) == 4", stdin="abc\n")
    assert result == sandbox.Result(ok=True, stdout="cba\n", error="", timed_out=False, exit_code=0)


def test_it_is_a_main_module():
    code = """
import dataclasses, pickle, sys
@dataclasses.dataclass
class Point:
    x: "int"
if __name__ == "__main__":
    print(pickle.loads(pickle.dumps(Point(3))), sys.argv)
"""
    assert sandbox.run(code).stdout == "Point(x=3) ['solution.py']\n"


def test_a_failing_test_shows_its_line_alone():
    result = sandbox.run("def f(x):\n    return x", tests="assert f(1) == 1\nassert f(2) == 3")
    assert not result.ok
    assert 'File "tests.py", line 2, in <module>\n    assert f(2) == 3' in result.error
    assert "sandbox.py" not in result.error


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(x):\n    return x / 0\nf(1)", "ZeroDivisionError"),
        ("def f(x:", "SyntaxError"),
        ("f = 1\nx = '\ud800'", "surrogates not allowed"),
        ("while True: print('ü' * 100_000)", "File too large"),
        ("open('file', 'wb').write(bytes(5 << 20))", "File too large"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("x = []\nwhile True: x.append(x * 2 + [0])", "MemoryError"),
        ("import socket; socket.socket()", "Operation not permitted"),
        ("import socket; socket.socket(socket.AF_UNIX)", "Operation not permitted"),
        ("import os; os.setsid()", "Operation not permitted"),
        ("import os; os.setpgid(0, 0)", "Operation not permitted"),
        ("files = [open('/dev/null') for _ in range(300)]", "Too many open files"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with exit code 139"),
    ],
)
def test_what_ends_a_program(code, error):
    result = sandbox.run(code)
    assert (result.ok, result.timed_out) == (False, False)
    assert error in result.error
    assert len(result.stdout.encode()) <= sandbox.OUTPUT_BYTES
    assert len(result.error) <= sandbox.ERROR_CHARACTERS + 100


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import sys; sys.exit()",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os, threading; threading.Timer(0.2, os._exit, [0]).start()",
        "import os\nif os.fork(): os._exit(0)",
        "import os; os.execv('/bin/true', ['true'])",
        "import builtins; builtins.wrong = lambda: 1",
        "import builtins; builtins.abs = builtins.len = lambda x: 7",
        "__builtins__ = {'abs': lambda x: 7, 'len': lambda x: 7, '__import__': __import__}",
        "text = '''",
        "if False: \\",
        "AssertionError = None",
    ],
)
def test_what_does_not_pass_the_tests(code):
    tests = "import time\ntime.sleep(0.4)\nassert len('') == 7 and abs(1) == 7"
    result = sandbox.run(code, tests=tests)
    assert not result.ok
    assert result.error


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(600)", "sum(iter(int, 1))"])
def test_time(code):
    start = time.monotonic()
    result = sandbox.run(code, timeout=0.5)
    assert (result.ok, result.timed_out, result.error) == (False, True, "took longer than 0.5 s")
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("end", ["", "while True: pass", "import os; os._exit(0)", "1 / 0"])
def test_a_process_that_it_leaves_is_killed(end, tmp_path):
    marker = f"left-{tmp_path.name}-{os.getpid()}"
    code = f"import subprocess, sys, time\nprocess = {sleeper(marker)}\ntime.sleep(0.1)\nprint(process.poll())\n{end}"
    result = sandbox.run(code, timeout=1.0)
    assert end == "import os; os._exit(0)" or result.stdout == "None\n" or result.timed_out
    assert not running(marker)


def test_forks_of_forks_are_killed_and_reaped():
    code = "import os, time\nfor _ in range(4): os.fork()\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    result = sandbox.run(code, timeout=1.0)
    pids = result.stdout.split()
    assert result.timed_out
    assert len(pids) == 16
    assert not any(Path("/proc", pid).exists() for pid in pids)


@pytest.mark.parametrize("signal", ["SIGSTOP", "SIGKILL"])
def test_a_program_that_attacks_its_guardian(signal):
    code = (
        f"import os, signal\nprint(os.getpid(), flush=True)\nos.kill(os.getppid(), signal.{signal})\nwhile True: pass"
    )
    result = sandbox.run(code, timeout=0.5)
    assert not result.ok
    assert comes_true(lambda: not alive(result.stdout.split()))


def test_a_grandchild_has_no_network():
    code = """
import subprocess, sys
for code in ("import socket; socket.socket()", "import socket; print(*socket.socketpair())"):
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr)
"""
    result = sandbox.run(code)
    assert result.ok
    assert result.stdout.count("PermissionError: [Errno 1]") == 1


def test_asyncio_works():
    assert sandbox.run("import asyncio; print(asyncio.run(asyncio.sleep(0, 3)))").stdout == "3\n"


def test_io_uring_is_refused():
    code = "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nprint(c.syscall(425, 1, None), ctypes.get_errno())"
    assert sandbox.run(code).stdout == "-1 1\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is of x86_64")
@pytest.mark.parametrize(
    "code",
    [
        "ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0)",  # socket of x32
        # mov eax, 20; int 0x80; ret: getpid of i386
        "page = mmap.mmap(-1, 4096, prot=7); page.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
    ],
)
def test_another_abi_kills(code):
    assert sandbox.run(f"import ctypes, mmap\n{code}").exit_code == 128 + 31  # SIGSYS


def test_environment_and_directory_are_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    code = "import os; print('SECRET' in os.environ, len(os.environ) < 3, os.listdir(), os.getcwd())"
    words = sandbox.run(code).stdout.split()
    assert words[:3] == ["False", "True", "[]"]
    assert not Path(words[3]).exists()


def test_limits():
    code = """
import resource
for name in ("CPU", "AS", "FSIZE", "NOFILE", "CORE"):
    print(*resource.getrlimit(getattr(resource, "RLIMIT_" + name)))
"""
    limits = [5, 256 << 20, sandbox.OUTPUT_BYTES, 256, 0]
    assert sandbox.run(code, timeout=3.5, memory_mb=256).stdout == "".join(f"{x} {x}\n" for x in limits)


def test_output_is_kept_when_time_is_up():
    assert sandbox.run("print('half', flush=True)\nwhile True: pass", timeout=0.5).stdout == "half\n"


def test_the_caller_dies(tmp_path):
    marker = f"orphan-{tmp_path.name}-{os.getpid()}"
    code = f"import subprocess, sys, time\n{sleeper(marker)}\ntime.sleep(600)"
    script = f"from trainers import sandbox; sandbox.run({code!r}, timeout=60)"
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    assert comes_true(lambda: len(running(marker)) == 2)  # the caller's command line holds it too
    caller.kill()
    caller.wait()
    assert comes_true(lambda: not running(marker))


def test_another_machine(monkeypatch):
    monkeypatch.setattr(sandbox, "ARCHITECTURES", {"none": (0, ())})
    with pytest.raises(RuntimeError, match="needs Linux on one of none"):
        sandbox.run("print(1)")


def test_without_the_filter_nothing_runs(tmp_path):
    script = f"""
import os
from trainers import sandbox
machine = os.uname().machine
prctl = {{"x86_64": 157, "aarch64": 167}}[machine]
sandbox._refuse(sandbox.ARCHITECTURES[machine][0], (prctl,))
try:
    sandbox.run("open({str(tmp_path / "ran")!r}, 'w')")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "the sandbox could not be set up (exit code 1)" in done.stdout
    assert "prctl" in done.stdout
    assert not list(tmp_path.iterdir())
