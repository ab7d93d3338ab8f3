"""Commands in processes forked from a server that has already imported the package: a third of the CPU time of new processes."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: The server imports these modules, and no command imports them again.
PRELOADED = ["dramatiq_policies.cli", "dramatiq_policies.contrib.django", "sqlalchemy.orm", "dramatiq.brokers.redis"]


def run_forked(
    command: Sequence[str], *, cwd: str | os.PathLike[str], env: Mapping[str, str], timeout: int = 100
) -> subprocess.CompletedProcess[str]:
    """Do as ``subprocess.run([sys.executable, *command], capture_output=True, text=True)``, for ``-m``, ``-c`` and files."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (Path(folder) / name for name in ("stdout", "stderr"))
        request = [list(command), os.fspath(cwd), dict(env), timeout, str(stdout), str(stderr)]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(command), code, stdout.read_text(), stderr.read_text())


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forked"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(_end, server, os.getpid())
    return server


def _end(server: subprocess.Popen[str], starter: int) -> None:
    if os.getpid() == starter:  # Not in a forked test.
        server.communicate()  # Closes stdin, which ends the server.


def serve() -> None:
    """Run each command that comes on stdin, and answer with its exit code. End with the test process, which closes stdin."""
    for module in PRELOADED:
        try:
            __import__(module)
        except ImportError:
            pass  # scripts/release_check.py runs tests with one extra alone.
    gc.freeze()
    for request in sys.stdin:
        command, cwd, env, timeout, *outputs = json.loads(request)
        if (child := os.fork()) == 0:
            signal.alarm(timeout)  # The signal kills a command that hangs.
            _redirect(outputs)
            code = _run(command, cwd, env)
            # As at the end of any process, but without the deletion of all modules: that takes longer than most commands.
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


def _redirect(outputs: list[str]) -> None:
    for descriptor, path in enumerate([os.devnull, *outputs]):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)


def _run(command: list[str], cwd: str, env: dict[str, str]) -> int:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:1] = [cwd, *env.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(command[1], {"__name__": "__main__"})
        elif command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path[0] = str(Path(command[0]).parent)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve()
