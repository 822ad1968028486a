"""Fixtures of the tests with two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    """`ranks.run(model, 2, {"quest": {}}, prompts=..., count=8)`; see rank_engines."""
    from rank_engines import Ranks

    started = Ranks()
    yield started
    started.close()
