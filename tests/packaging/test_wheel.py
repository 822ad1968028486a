"""The wheel: what it holds, what it asks for, and that it works in a clean environment without torch and vLLM."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_FOLDERS = ("attention_backends", "kernels", "kv_managers", "spec_decode")


def source_folder(package: str) -> str:
    """The folder of a package in the tree: `vllm_ext.kernels.x` lies in `kernels/x`."""
    parts = package.split(".")
    return "/".join(parts[1:] if len(parts) > 1 and parts[1] in TOP_FOLDERS else parts)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that nothing stale and nothing of the checkout's is in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "plugins.yaml"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("vllm_ext", *TOP_FOLDERS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def closure(names):
    """Distribution names with everything they ask for here, transitively."""
    todo, seen = [canonicalize_name(n) for n in names], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(requirement.name))
    return seen


@pytest.fixture(scope="module")
def clean(tmp_path_factory, wheel):
    """The bin folder of an environment with the wheel, its three requirements, and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    # the requirements are copied from the running environment: the test needs no package index
    for name in closure(["pyyaml", "typer", "rich"]):
        for file in metadata.files(name) or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), target)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder / "bin"


def run(*command, cwd):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, check=False)


def test_packages_of_pyproject_are_the_folders_on_disk():
    declared = {source_folder(p) for p in PROJECT["tool"]["setuptools"]["packages"]}
    found = {
        str(init.parent.relative_to(ROOT))
        for top in ("vllm_ext", *TOP_FOLDERS)
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert declared == found


def test_every_python_file_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for top in ("vllm_ext", *TOP_FOLDERS):
        for source in (ROOT / top).rglob("*.py"):
            inside = str(source.relative_to(ROOT))
            assert (inside if top == "vllm_ext" else f"vllm_ext/{inside}") in names


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("vllm_ext/plugins.yaml") == (ROOT / "plugins.yaml").read_bytes()
        # a symbolic link would dangle after installation
        assert archive.getinfo("vllm_ext/plugins.yaml").external_attr >> 28 != 0o12
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vllm_ext"}
    assert "vllm_ext/py.typed" in names
    data = {p for p in (ROOT / "vllm_ext").rglob("*") if p.suffix in (".txt", ".gz", ".json", ".yaml") and p.is_file()}
    assert {str(p.relative_to(ROOT)) for p in data} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_requirements_are_small_and_vllm_is_an_extra(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    requirements = [Requirement(r) for r in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)]
    plain = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert plain == {"pyyaml", "typer", "rich"}
    assert set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE)) == {"cpu", "cuda", "test", "bench"}


def test_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith("/entry_points.txt"))).decode()
    assert text.split() == [
        *("[console_scripts]", "vllm-ext", "=", "vllm_ext.cli:main"),
        *("[vllm.general_plugins]", "vllm_ext", "=", "vllm_ext.plugin:register"),
    ]


def test_command_works_in_a_clean_environment(clean, tmp_path):
    listed = run(clean / "vllm-ext", "list", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "quest" in listed.stdout
    rows = json.loads(run(clean / "vllm-ext", "list", "--json", cwd=tmp_path).stdout)
    assert "budget" in {o["name"] for r in rows if r["name"] == "quest" for o in r["options"]}


def test_clean_environment_has_no_torch_no_vllm_no_top_level_kernels(clean, tmp_path):
    for module in ("torch", "vllm", "triton", "kernels"):
        assert run(clean / "python", "-c", f"import {module}", cwd=tmp_path).returncode == 1
    assert run(clean / "python", "-c", "import vllm_ext.attention_backends.quest", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "smollm3"], "did you mean 'smollm2'"),
        (["demo"], "install vllm-ext[cpu,bench]"),
    ],
)
def test_errors_of_a_clean_environment(clean, tmp_path, arguments, words):
    done = run(clean / "vllm-ext", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
