"""Fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import threads


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread, but where a test says otherwise: on a busy machine waking others takes most of the time."""
    with threads(1):
        yield
