"""Runs Python that a model wrote: in a fresh interpreter with limits, without a network, and for a limited time.

The process of a run is a guardian that forks the program. When the program ends, when its time is up or when the caller
is gone, the guardian kills and reaps all that the program started; setsid and setpgid are refused, so nothing escapes.

This keeps a trainer safe from the programs that models write, not from an attacker. A program has the rights of its
user: it reads files, writes where it may, signals that user's processes (the guardian too) and, as root, raises its own
limits. Memory and CPU are limited by process, not in sum. Code shares an interpreter with its tests: those see the
genuine builtins, but code that patches other modules, overloads `==` or looks for the proof of success can pass them.
"""

import builtins
import ctypes
import errno
import linecache
import marshal
import math
import os
import resource
import secrets
import select
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import NamedTuple

OUTPUT_BYTES = 4 << 20  # of stdout, of stderr, and of any file that a program writes
ERROR_CHARACTERS = 2000  # the tail of stderr that is kept
READY = b"+"  # written to the status file once limits and filter hold

# Audit architecture and the numbers of the refused calls: socket, io_uring_setup, setpgid, setsid.
ARCHITECTURES = {"x86_64": (0xC000003E, (41, 425, 109, 112)), "aarch64": (0xC00000B7, (198, 425, 154, 157))}
X32_BIT = 0x40000000  # in the number of an x32 call; no other ABI has numbers this large
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38


class Result(NamedTuple):
    """What became of a program."""

    ok: bool  # code and tests ran to their ends in time, and the exit code is 0
    stdout: str  # the first 4 MiB
    error: str  # why it is not ok, such as the tail of a traceback; else empty
    timed_out: bool
    exit_code: int  # 128 + n if signal n ended it, -n if one ended the guardian


def run(code: str, *, tests: str = "", stdin: str = "", timeout: float = 10.0, memory_mb: int = 1024) -> Result:
    """Run `code`, then `tests` in its namespace. Leaving before the last line of `tests` is no success.

    Args:
        code: Python source, run as `__main__` in an empty directory of its own and an empty environment.
        tests: Python source, compiled apart from `code`, which can therefore not swallow it in an open string.
        stdin: what the program reads.
        timeout: seconds of wall-clock time, the interpreter's start of about 40 ms included.
        memory_mb: limit of the address space of each process.

    Raises:
        RuntimeError: not Linux on x86_64 or aarch64, or limits and filter could not be installed; nothing was run.
    """
    if sys.platform != "linux" or os.uname().machine not in ARCHITECTURES:
        raise RuntimeError(f"the sandbox needs Linux on one of {', '.join(ARCHITECTURES)}")
    proof = secrets.token_bytes(16)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        job, status, source, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(5))
        control, write_end = os.pipe()
        stack.callback(os.close, control)
        lifeline = stack.enter_context(os.fdopen(write_end, "wb", buffering=0))
        marshal.dump((code, tests), job)
        source.write(stdin.encode(errors="replace"))
        lifeline.write(proof)
        job.seek(0)
        source.seek(0)
        arguments = (job.fileno(), status.fileno(), control, math.ceil(timeout) + 1, memory_mb << 20)
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", __file__, *map(str, arguments)],
            stdin=source, stdout=out, stderr=err, pass_fds=arguments[:3],
            cwd=directory, env={}, start_new_session=True,
        )  # fmt: skip
        try:
            timed_out = not _ends(process, timeout)
        finally:
            lifeline.close()  # the guardian kills what is left
            if not _ends(process, 2.0):
                process.kill()  # a program stopped its guardian; it dies with it
            exit_code = process.wait()
        written, stdout, stderr = (os.pread(file.fileno(), OUTPUT_BYTES, 0) for file in (status, out, err))
    tail = stderr.decode(errors="replace")[-ERROR_CHARACTERS:].strip()
    if not written.startswith(READY) and not timed_out:
        raise RuntimeError(f"the sandbox could not be set up (exit code {exit_code}): {tail}")
    ok = written == READY + proof and exit_code == 0 and not timed_out
    if timed_out:
        tail = f"took longer than {timeout:g} s"
    elif exit_code != 1 or not tail:  # no traceback tells why
        tail = f"{tail}\nended with exit code {exit_code} before the last line".strip()
    return Result(ok, stdout.decode(errors="replace"), "" if ok else tail, timed_out, exit_code)


def _ends(process: subprocess.Popen, timeout: float) -> bool:
    """Wait for the end of a process, at once where Popen.wait looks every 50 ms."""
    with os.fdopen(os.pidfd_open(process.pid)) as descriptor:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(timeout * 1000))


def _guard(program: int, control: int) -> None:
    """Wait until the program ends or the caller lets go of its end of `control`; kill, reap, and exit alike."""
    poll = select.poll()
    poll.register(control, 0)  # the end of a pipe is reported unasked
    poll.register(os.pidfd_open(program), select.POLLIN)
    poll.poll()
    os.killpg(program, signal.SIGKILL)
    code = 0
    while True:
        try:
            child, status = os.wait()
        except ChildProcessError:
            os._exit(code if code >= 0 else 128 - code)
        if child == program:
            code = os.waitstatus_to_exitcode(status)


def _prctl(option: int, *values: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0)[:4])):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def _refuse(architecture: int, numbers: tuple[int, ...]) -> None:
    """Answer these system calls with EPERM from now on, and kill a process that makes one of another ABI."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # BPF: ld [k], jeq k, jge k, ret k
    kill, refuse, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
    last = len(numbers)  # each jump counts the instructions that it skips
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 0, last + 3, architecture),
        (load, 0, 0, 0),  # seccomp_data.nr
        (at_least, last + 1, 0, X32_BIT),
        *((equal, last + 1 - i, 0, number) for i, number in enumerate(numbers)),
        (give, 0, 0, allow),
        (give, 0, 0, kill),
        (give, 0, 0, refuse),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, 2, ctypes.addressof(header))


def _confine(seconds: int, memory: int) -> None:
    """Limit the calling process and those it will start, for good; die with the guardian."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    limits = {"CPU": seconds, "AS": memory, "FSIZE": OUTPUT_BYTES, "NOFILE": 256, "CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    _refuse(*ARCHITECTURES[os.uname().machine])


def _execute(code: str, tests: str) -> None:
    """Run both to their ends; a traceback starts at their own frames."""
    sys.modules["__main__"] = module = ModuleType("__main__")
    sys.argv = ["solution.py"]
    genuine = dict(vars(builtins))
    try:
        for name, text in (("solution.py", code), ("tests.py", tests)):
            vars(builtins).update(genuine)
            vars(module)["__builtins__"] = builtins
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
            exec(compile(text, name, "exec"), vars(module))
        sys.stdout.flush()
    except Exception as error:
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        sys.exit(1)


def _main(job: int, status: int, control: int, seconds: int, memory: int) -> None:
    """The fresh interpreter: it stays as the guardian and runs the job in a child."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    program = os.fork()
    if program:
        with suppress(OSError):  # it has done so itself
            os.setpgid(program, program)
        _guard(program, control)
    os.setpgid(0, 0)
    with open(job, "rb") as file:
        code, tests = marshal.load(file)
    _confine(seconds, memory)
    os.write(status, READY)
    _execute(code, tests)
    os.write(status, os.read(control, 16))


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
