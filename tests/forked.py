"""Python code in processes of its own, forked from one that has imported vLLM: the import takes 10 to 20 s."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
IMPORTS = """
import vllm.entrypoints.cli.main, vllm.entrypoints.llm, vllm.v1.engine.core, vllm.v1.worker.gpu_worker
from vllm.platforms import current_platform
if current_platform.is_cpu():
    import vllm.v1.worker.cpu_model_runner, vllm.v1.worker.cpu_worker
"""
PRELOAD = {
    "v1": IMPORTS,
    "v2": f"import sys\nsys.path[:0] = {[str(TESTS), str(TESTS / 'attention_backends')]}\nimport v2_on_cpu\n{IMPORTS}",
}
SERVER = r"""
import gc, json, os, signal, sys, traceback, types

exec(sys.argv[1], {})
gc.collect()
gc.freeze()


def work(job):
    for number, name in enumerate(("/dev/null", job["out"], job["err"])):
        os.dup2(os.open(name, os.O_RDWR), number)
    signal.alarm(job["limit"])
    for name, value in job["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv[:] = ["-c", *job["arguments"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code = 0
    try:
        exec(compile(job["code"], "<string>", "exec"), vars(main))
    except SystemExit as stop:
        code = stop.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


for line in sys.stdin:
    if not (child := os.fork()):
        work(json.loads(line))
    print("RETURNED", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """A process that has run `preload` and forks for every piece of code; nothing of vllm_ext is loaded in it."""

    def __init__(self, preload: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER, preload], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True,
        )  # fmt: skip
        atexit.register(self.close)

    def run(
        self, code: str, *arguments: Any, limit: int = 300, env: dict[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What `python -c CODE ARGUMENTS` would return and print.

        Args:
            code: what to run.
            arguments: sys.argv[1:], as text.
            limit: seconds until the process is killed, with a negative return code.
            env: environment variables to set, or with None to unset. vLLM and Triton were imported without them.
        """
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
            job = {"code": code, "arguments": list(map(str, arguments)), "limit": limit, "env": env or {}}
            print(json.dumps(job | {"out": out.name, "err": err.name}), file=self._process.stdin, flush=True)
            while not (line := self._process.stdout.readline()).startswith("RETURNED "):
                self._log.seek(0)
                assert line, self._log.read()[-3000:]
            return subprocess.CompletedProcess([code, *arguments], int(line.split()[1]), out.read(), err.read())

    def close(self) -> None:
        """End the process, which sees the end of its input."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


@functools.cache
def forks(runner: str = "v1") -> Forks:
    """The process for engines of a model runner, "v1" or "v2" (in Triton's interpreter); one of each in a test run."""
    return Forks(PRELOAD[runner])


def call(runner: str, file: Path, function: str, *arguments: Any, limit: int = 400, **env: str | None) -> Any:
    """The result of a function of `file`, called in a fork; arguments and result are JSON.

    Args:
        runner: see `forks`.
        file: a module; what lies beside it can be imported.
        function: its name.
        arguments: of the function.
        limit: seconds.
        env: see `Forks.run`.
    """
    code = (
        "import importlib, json, sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]); "
        "found = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*json.loads(sys.argv[4])); "
        "print('RESULT ' + json.dumps(found), flush=True)"
    )
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    done = forks(runner).run(
        code, file.parent, file.stem, function, json.dumps(arguments), limit=limit, env={**quiet, **env}
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    [found] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(found.removeprefix("RESULT "))
