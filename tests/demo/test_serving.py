"""The server as a context manager, with small stand-ins for `vllm serve`."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time

import pytest

from vllm_ext import serving
from vllm_ext.serving import Server, ServerError

HEALTHY = """
    import http.server, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b'vllm_ext:pages{a="1"} 2.0\\nvllm_ext:pages{a="2"} 3.0\\nother 1\\n'
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *a): pass
    print("ready soon", flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN = """
    import os, signal, sys, time
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.fork()
    os.write(1, f"pid {os.getpid()}\\n".encode())  # one write: two processes share the log
    time.sleep(300)
"""


class StandIn(Server):
    """Runs a Python program with the port as its argument, in place of vLLM."""

    def __init__(self, program, **options):
        super().__init__("model", **options)
        self.program = textwrap.dedent(program)

    def command(self):
        return [sys.executable, "-c", self.program, str(self.port)]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "server.log"


def test_metrics_are_summed_over_labels_and_filtered():
    text = (
        "# HELP vllm_ext:pages_read_total pages\n"
        'vllm_ext:pages_read_total{engine="0",model_name="a b} c"} 1.5e+03\n'
        'vllm_ext:pages_read_total{engine="1"} 2\n'
        "vllm_ext:attention_density NaN\n"
        "vllm:num_requests 3 1700000000000\n"
        "process_open_fds 7\n"
        "garbage\n"
    )
    found = serving.parse_metrics(text)
    assert set(found) == {"vllm_ext:pages_read_total", "vllm_ext:attention_density", "vllm:num_requests"}
    assert found["vllm_ext:pages_read_total"] == 1502.0
    assert found["vllm_ext:attention_density"] != found["vllm_ext:attention_density"]
    assert found["vllm:num_requests"] == 3.0


def test_command_is_stock_vllm_serve_without_the_working_directory_on_the_path():
    server = Server("dir", ["--plugins", "quest"])
    assert server.command() == [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", "dir"),
        *("--host", "127.0.0.1", "--port", str(server.port), "--plugins", "quest"),
    ]
    server.log_path.unlink()


def test_healthy_server_is_used_and_stopped(log):
    with StandIn(HEALTHY, log=log, timeout=30) as server:
        assert server.startup_seconds < 30
        assert server.alive()
        assert server.metrics() == {"vllm_ext:pages": 5.0}
        assert server.last_line() == "ready soon"
    assert not server.alive()
    with pytest.raises(OSError, match=r"refused|reset"):
        server.get("/health", timeout=1)
    server.stop()


def test_dead_server_is_reported_with_the_tail_of_its_log(log):
    server = StandIn("print('the reason')\nraise SystemExit(3)", log=log)
    with pytest.raises(ServerError, match=r"(?s)exit code 3.*the reason"), server:
        pass
    assert not server.alive()


def test_waiting_is_shown_and_ends_at_the_timeout_and_stubborn_children_are_killed(log):
    seen = []
    wait = lambda seconds, line: seen.append((seconds, line))  # noqa: E731
    server = StandIn(STUBBORN, log=log, timeout=1.5, patience=0.5, on_wait=wait)
    with pytest.raises(ServerError, match="not healthy after"), server:
        pass
    pids = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert len(pids) == 2
    assert not serving.group_alive(server.pid)
    assert seen[0][0] < seen[-1][0]
    assert seen[-1][1].startswith("pid ")


def test_an_error_inside_the_block_stops_the_server_too(log):
    server = StandIn(HEALTHY, log=log)
    with pytest.raises(KeyError), server:
        raise KeyError
    assert not server.alive()


def test_orphaned_child_is_stopped_though_its_parent_is_gone(log):
    forking = "import os\nif os.fork() == 0:\n    import time\n    time.sleep(300)\n" + textwrap.dedent(HEALTHY)
    with StandIn(forking, log=log, patience=0.5) as server:
        os.kill(server.pid, signal.SIGKILL)
        time.sleep(0.3)
        assert server.alive()
    assert not serving.group_alive(server.pid)


def test_temporary_log_stays_only_if_something_goes_wrong():
    with StandIn(HEALTHY) as good:
        assert good.log_path.exists()
    assert not good.log_path.exists()
    bad = StandIn("raise SystemExit(1)")
    with pytest.raises(ServerError), bad:
        pass
    assert bad.log_path.exists()
    bad.log_path.unlink()
