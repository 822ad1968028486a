"""Fixtures of the eviction tests: engines run in this process, one after the other, on one thread."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _in_process(in_process: None) -> None:
    """Every module of this folder starts engines."""
