"""Marks the tests of this folder: they import llvmlite, so their engines run apart from the others (tests/run.sh)."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`speculation` on every test below this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.speculation)
