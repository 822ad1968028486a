"""Compiled code on disk: loaded by the next process, never stale, and never a reason not to start."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ext import spec_decode
from vllm_ext.spec_decode import code_cache

FOLDER = Path(spec_decode.__file__).parent
INIT = """
import json, sys, time
from vllm_ext.spec_decode import automaton, lookup
from vllm_ext.spec_decode.tables import LookupDrafter, LookupSettings

began = time.perf_counter()
drafter = LookupDrafter(LookupSettings(4, 2, 64, 64))
"""
STEP = INIT + "drafter.compile()\n"
REPORT = """
functions = [automaton.clear, lookup.ingest, lookup.step]
counts = {f.__name__: [sum(f.stats.cache_hits.values()), sum(f.stats.cache_misses.values())] for f in functions}
print(json.dumps({"counts": counts, "seconds": time.perf_counter() - began}))
"""


def start(folder: Path, code: str) -> subprocess.Popen[str]:
    """A process with its own cache folder that runs `code` and reports hits, misses and seconds."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", code + REPORT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(process: subprocess.Popen[str]) -> tuple[dict, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out), err


def test_the_second_process_loads_what_the_first_compiled(tmp_path):
    """... and drafts the same with it: `compile` runs the step."""
    cold, _ = report(start(tmp_path, STEP))
    warm, _ = report(start(tmp_path, STEP))
    assert cold["counts"] == {name: [0, 1] for name in ("clear", "ingest", "step")}
    assert warm["counts"] == {name: [1, 0] for name in ("clear", "ingest", "step")}
    assert warm["seconds"] < cold["seconds"] / 4


def test_processes_that_start_at_once(tmp_path):
    for process in [start(tmp_path, INIT) for _ in range(3)]:
        report(process)
    assert report(start(tmp_path, INIT))[0]["counts"]["clear"] == [1, 0]
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "vllm-ext").write_text("a file where the folder should be")
    found, err = report(start(tmp_path, INIT))
    assert found["counts"]["clear"] == [0, 1]
    assert len(err.splitlines()) == 1
    assert "compiled at this start" in err
    assert str(tmp_path / "vllm-ext") in err


def test_the_callback_of_streams_can_be_kept():
    from vllm_ext.spec_decode import stream

    assert not stream._callback._library.has_dynamic_globals


@pytest.mark.parametrize("name", code_cache.SOURCES)
def test_any_change_of_a_source_leads_to_another_folder(tmp_path, name):
    for source in code_cache.SOURCES:
        shutil.copy(FOLDER / source, tmp_path / source)
    before = code_cache.digest(tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    code_cache.digest.cache_clear()
    assert code_cache.digest(tmp_path) != before == code_cache.digest(FOLDER)


def test_the_sources_are_all_that_compiled_code_can_call():
    """Whatever imports numba, and what that imports of this folder, is hashed."""
    wanted = {path.name for path in FOLDER.glob("*.py") if "numba import" in path.read_text()}
    for name in code_cache.SOURCES:
        for node in ast.walk(ast.parse((FOLDER / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "vllm_ext.spec_decode":
                wanted |= {f"{alias.name}.py" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("vllm_ext.spec_decode."):
                wanted.add(node.module.rsplit(".", 1)[1] + ".py")
    assert wanted == set(code_cache.SOURCES)


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Makes a function anew, as another process would: (what it returns for its arguments, whether it was loaded)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code_cache._complain.cache_clear()

    def call(*arguments):
        @code_cache.entry
        def plus(a, b):
            return a + b

        return plus(*arguments), bool(plus._cache_hits)

    return call


@pytest.fixture
def complaints(monkeypatch):
    """Log lines of the cache."""
    lines: list[str] = []
    monkeypatch.setattr(code_cache.logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_each_signature_has_its_own_code(add, complaints):
    assert [add(1, 2), add(1.5, 2.0), add(1, 2), add(1.5, 2.0)] == [(3, False), (3.5, False), (3, True), (3.5, True)]
    assert complaints == []


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
def test_a_damaged_file_is_replaced(add, complaints, tmp_path, pattern):
    add(1, 2)
    [path] = tmp_path.rglob(pattern)
    path.write_bytes(path.read_bytes()[:20])
    assert add(1, 2) == (3, False)
    assert add(1, 2) == (3, True)
    assert len(complaints) == 1


def test_code_that_others_could_have_written_is_not_run(add, complaints, tmp_path):
    add(1, 2)
    folder = next(tmp_path.rglob("*.nbc")).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert add(1, 2) == (3, False)
    [line] = complaints
    assert "writable by others" in line


def test_no_home_directory(add, complaints, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert add(1, 2) == (3, False)
    assert "home directory" in complaints[0]


def test_addresses_of_this_process_are_not_kept(add, complaints):
    import ctypes

    absolute = ctypes.CDLL(None).labs
    absolute.argtypes, absolute.restype = [ctypes.c_long], ctypes.c_long

    @code_cache.entry
    def distance(a):
        return absolute(a)

    assert distance(-3) == 3
    assert "distance holds addresses" in complaints[0]
