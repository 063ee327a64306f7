"""Environment and fixtures that every test shares."""

import os

# Ray reads these when it is imported, so they come before any test module.
os.environ["RAY_AUTH_MODE"] = "disabled"  # no token file in the home folder
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # a report waits for one of these
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ.pop("RAY_ADDRESS", None)

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small local Ray for all tests of a process; tests marked `cluster` must not meet it."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()
