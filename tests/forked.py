"""Programs of ours in processes of their own that need not load TensorFlow: their parent has.

That takes half the time of a short run. The start of a process is the user's own only where
`tests.command_line.python` starts it; each of our commands is tested in that way too.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.libraries"])


class Program:
    """A program on its way, in the part of `subprocess.Popen`'s words that is used here.

    Args:
        arguments: as after `python`: a file, or "-m" and a module, and the program's own.
        folder: the current folder.
        package: a folder that holds `maml`, in the place of the checkout.
        environment: on top of that of the tests.
    """

    def __init__(
        self,
        *arguments: str,
        folder: pathlib.Path = ROOT,
        package: pathlib.Path | None = None,
        **environment: str,
    ):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
        self._folder = tempfile.TemporaryDirectory()
        outputs = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        if package:
            environment["PYTHONPATH"] = str(package)
        places = str(folder), package and str(package)
        self._process = _server.Process(
            target=_run, args=(arguments, inherited | environment, outputs, *places), daemon=True
        )
        self._process.start()
        self._outputs = [pathlib.Path(path) for path in outputs]

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; what it wrote to stdout and to stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return tuple(path.read_text() for path in self._outputs)


def run(
    *arguments: str,
    expect: int = 0,
    timeout: float = 300,
    folder: pathlib.Path = ROOT,
    package: pathlib.Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Runs a program to its end, which must be that expected, and no traceback; see `Program`."""
    program = Program(*arguments, folder=folder, package=package, **environment)
    try:
        stdout, stderr = program.communicate(timeout)
    finally:
        program.kill()
    assert program.returncode == expect, stdout + stderr
    assert "Traceback" not in stderr
    return subprocess.CompletedProcess(arguments, program.returncode, stdout, stderr)


def _run(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    outputs: list[str],
    folder: str,
    package: str | None,
) -> None:
    """What a fresh interpreter does with these arguments; in the new process."""
    os.chdir(folder)
    if package:
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
        sys.path[:] = [package, *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ.clear()
    os.environ.update(environment)
    for number, (stream, path) in enumerate(zip(("stdout", "stderr"), outputs, strict=True), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, stream, open(number, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")
