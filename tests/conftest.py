"""Fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rules of the tests' own are compiled into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread, but where a test says otherwise: on a busy machine waking others takes most of the time."""
    with threads(1):
        yield
