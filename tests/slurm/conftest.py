"""A Slurm of two nodes for the tests in this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, cluster, is_installed


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """One that runs."""
    if not is_installed():
        pytest.skip("needs Slurm and munge: make system-deps")
    with cluster("node1", "node2") as running:
        yield running
