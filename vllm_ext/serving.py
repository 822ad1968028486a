"""A `vllm serve` process as a context manager: started, waited for, asked for metrics, and stopped for certain."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

Waiting = Callable[[float, str], None]
"""Called while the server starts, with the seconds since the start and the last line of its log."""

SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{.*\})?\s+(?P<value>\S+)(?:\s+\d+)?$")
TAIL_LINES = 30


class ServerError(RuntimeError):
    """The server did not start, or died; the text ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse_metrics(text: str, prefixes: Sequence[str] = ("vllm_ext:", "vllm:")) -> dict[str, float]:
    """Name -> value of a Prometheus text page, summed over labels, for the names that begin with a prefix."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match and match["name"].startswith(tuple(prefixes)):
            totals[match["name"]] = totals.get(match["name"], 0.0) + float(match["value"])
    return totals


def group_alive(pgid: int) -> bool:
    """Whether a process of the group still runs (zombies that only wait to be collected do not count)."""
    import psutil

    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return False


class Server:
    """`vllm serve MODEL ARGS...` on a free loopback port, in a process group of its own.

    Use it as a context manager: entering waits until the server is healthy, leaving stops it and all its children.

    Args:
        model: model directory or name.
        args: further arguments of `vllm serve`, e.g. `["--plugins", "quest"]`.
        env: environment variables on top of this process's.
        log: file for the server's output; by default a temporary one, which stays only if something goes wrong.
        timeout: seconds to wait for health.
        patience: seconds for an orderly end after SIGINT, and half of that after SIGTERM, before SIGKILL.
        on_wait: called about twice a second while waiting.
    """

    def __init__(
        self,
        model: str | Path,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        timeout: float = 600.0,
        patience: float = 10.0,
        on_wait: Waiting = lambda seconds, line: None,
    ) -> None:
        self.model = str(model)
        self.args = [str(a) for a in args]
        self.env = dict(env or {})
        self.timeout = timeout
        self.patience = patience
        self.on_wait = on_wait
        self.port = free_port()
        self.startup_seconds = float("nan")
        self._temporary = log is None
        if log is None:
            handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
            os.close(handle)
            log = Path(name)
        self.log_path = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`; the OpenAI API is under `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server, which is the id of its process group too; 0 before it was started."""
        return self._process.pid if self._process else 0

    def command(self) -> list[str]:
        """The command line, as a list."""
        # -P: a folder of the working directory must not shadow an installed package (Hugging Face's `kernels`)
        launch = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        return [*launch, "--host", "127.0.0.1", "--port", str(self.port), *self.args]

    def __enter__(self) -> Server:
        begun = time.monotonic()
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        try:
            self._wait_for_health(begun)
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - begun
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        if kind is None and self._temporary:
            self.log_path.unlink(missing_ok=True)

    def _wait_for_health(self, begun: float) -> None:
        assert self._process is not None
        while True:
            elapsed = time.monotonic() - begun
            if (code := self._process.poll()) is not None:
                raise ServerError(f"vllm serve ended with exit code {code} before it was healthy:\n{self.log_tail()}")
            if elapsed > self.timeout:
                raise ServerError(f"vllm serve was not healthy after {self.timeout:.0f} s:\n{self.log_tail()}")
            with contextlib.suppress(OSError):
                self.get("/health", timeout=2.0)
                return
            self.on_wait(elapsed, self.last_line())
            time.sleep(0.5)

    def get(self, path: str, timeout: float = 30.0) -> str:
        """The body of `GET path`; raises OSError (urllib's errors are) when there is no good answer."""
        # no proxy for the loopback address, whatever the environment says
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=timeout) as answer:
            return str(answer.read().decode())

    def metrics(self) -> dict[str, float]:
        """Values of `/metrics` whose names begin with `vllm_ext:` or `vllm:`, summed over labels."""
        return parse_metrics(self.get("/metrics"))

    def log(self) -> str:
        """The server's output so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of the server's output."""
        return "\n".join(self.log().splitlines()[-lines:])

    def last_line(self) -> str:
        """The last line of the server's output that is not blank, or ""."""
        return next((line for line in reversed(self.log().splitlines()) if line.strip()), "")

    def alive(self) -> bool:
        """Whether the server or a child of it still runs."""
        return self._process is not None and group_alive(self.pid)

    def stop(self) -> None:
        """Stop the server and every process of its group; harmless when it is stopped already."""
        if self._process is None:
            return
        stages = ((signal.SIGINT, self.patience), (signal.SIGTERM, self.patience / 2), (signal.SIGKILL, 30.0))
        for number, seconds in stages:
            if not self.alive():
                break
            # SIGINT is for the parent, which asks its engine to end; the sterner two are for everybody
            with contextlib.suppress(ProcessLookupError):
                (os.kill if number is signal.SIGINT else os.killpg)(self.pid, number)
            self._wait_for_end(seconds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)

    def _wait_for_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            assert self._process is not None
            self._process.poll()
            time.sleep(0.1)
