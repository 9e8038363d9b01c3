"""The ranks live as long as the test session."""

from collections.abc import Iterator

import pytest

from tests.distributed.workers import close_pools


@pytest.fixture(scope="session", autouse=True)
def rank_pools() -> Iterator[None]:
    yield
    close_pools()
