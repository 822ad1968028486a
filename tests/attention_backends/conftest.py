"""Fixtures of the engine tests: engines run in this process, one after the other, on one thread.

A tiny model gains nothing from a second thread, and where another process holds that core every small operation waits
a time slice for it: 13 times slower, measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # files of random gates and roles


@pytest.fixture(scope="module", autouse=True)
def _in_process(in_process: None) -> None:
    """Every module of this folder starts engines."""
