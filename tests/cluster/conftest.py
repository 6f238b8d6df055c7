"""One local cluster for the tests of a module."""

from __future__ import annotations

import pytest

from fakes.events import Listener
from softshard.cluster.cluster import open_cluster
from softshard.config import ClusterSettings


@pytest.fixture(scope="module")
def listener():
    """What the cluster of the module told people when it started."""
    return Listener()


@pytest.fixture(scope="module")
def cluster(listener):
    with open_cluster(ClusterSettings(workers=2, max_attempts=3, retry_seconds=0.1), listener) as running:
        yield running
