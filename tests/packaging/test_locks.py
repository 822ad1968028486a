"""The lock files are complete and exact, and name no place to download from."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements-cpu.lock", "requirements-cuda.lock")
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("name", LOCKS)
def test_lock_is_exact_sorted_and_without_places(name):
    text = (ROOT / name).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    assert len(pins(name)) == len(lines)
    assert "://" not in text
    assert "--no-deps" in text


@pytest.mark.parametrize(
    ("name", "extras"), [(LOCKS[0], ("cpu", "test", "bench")), (LOCKS[1], ("cuda", "test", "bench"))]
)
def test_lock_satisfies_the_project(name, extras):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = list(project["project"]["dependencies"]) + project["build-system"]["requires"]
    for extra in extras:
        wanted += project["project"]["optional-dependencies"][extra]
    locked = pins(name)
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), text


def test_cpu_lock_leaves_out_only_what_it_says():
    assert not LEFT_OUT & set(pins(LOCKS[0]))
    assert pins(LOCKS[0])["torch"] == "2.13.0"


def test_cpu_lock_is_complete_here():
    """What a locked package asks for is locked too, in a version that it takes."""
    locked = pins(LOCKS[0])
    missing = set()
    for name in locked:
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: this is not the environment of the lock")
        for text in wanted:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = canonicalize_name(requirement.name)
            version = locked.get(needed)
            # the CPU build carries a local version, which the lock leaves out
            local = Version(f"{version}+cpu") if needed == "torch" else Version(version or "0")
            if version is None or not requirement.specifier.contains(local, prereleases=True):
                missing.add((name, text))
    assert {canonicalize_name(Requirement(text).name) for _, text in missing} <= LEFT_OUT, missing
