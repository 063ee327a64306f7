"""Environment and fixtures that every test shares."""

import os

# Ray reads these when it is imported, so they come before any test module.
os.environ["RAY_AUTH_MODE"] = "disabled"  # no token file in the home folder
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # a report waits for one of these
os.environ["RAY_DEDUP_LOGS"] = "0"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # tests share their cores: threads that spin take them from each other
os.environ.pop("RAY_ADDRESS", None)

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings

from support import fault_costs, faulty_record, s3_server, tiny_record

INTEGRATION = Path(__file__).parent / "integration"

# No example has a time to keep to: on a busy machine one may take seconds. And on CI they are the same every time; new
# ones are for a person to meet.
settings.register_profile("untimed", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that `make test` would not run: it looks for those marked `cluster` in one folder."""
    lost = [
        item.nodeid for item in items if item.get_closest_marker("cluster") and INTEGRATION not in item.path.parents
    ]
    if lost:
        raise pytest.UsageError(f"tests marked cluster belong in tests/integration: {', '.join(lost)}")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more threads, and on a busy machine they wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small local Ray for all tests of a process, as the command starts its own; tests marked `cluster` must not
    meet it."""
    from pipeline.execution.ray_session import ALONE, few_processes, ray

    keys = {**s3_server.KEYS, "AWS_EC2_METADATA_DISABLED": "true"}  # of the one object store of the tests
    # Processes that wait are kept, for the next test's record.
    kept = {**ALONE, **keys, "RAY_num_workers_soft_limit": "-1", "OMP_NUM_THREADS": "1"}
    with few_processes(), patch.dict(os.environ, kept):
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            object_store_memory=150 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> fault_costs.Faults:
    """Where a test of a fault notes what it measured."""
    return fault_costs.Faults(request)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_record.text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A record of seeds 1 and 2, a folder in the way of the second's lock: runs folder, exit code, output."""
    from rich.console import Console

    from pipeline import record
    from pipeline.steps import graph
    from pipeline.storage.store import Storage

    out = tmp_path_factory.mktemp("undisturbed")
    options = tiny_record.arguments(text, out, "--seeds", "1", "2", "--record", "tiny")
    recipe, _ = record.parse(["laptop", *options])
    storage = Storage("", out)
    dataset, data = record.prepare(recipe, storage, Console(quiet=True))
    (graph.plan_record("tiny", recipe, dataset, data, (2,)).seeds[2].train.folder / "step.lock").mkdir(parents=True)
    return out, *tiny_record.run([*options, "--report"], out, tiny_record.SECRETS)


@pytest.fixture(scope="session")
def undisturbed_long(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The same of seed 1 with training that takes long enough to be disturbed from outside."""
    out = tmp_path_factory.mktemp("long")
    told = tiny_record.run(tiny_record.arguments(text, out, *faulty_record.LONG), out)
    assert told[0] == 0, told[1]
    return out, *told
