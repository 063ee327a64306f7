"""Seeds on a cluster: fake nodes with 8 GPUs each, real Ray scheduling, no training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from hedgemix.config import RecipeError
from hedgemix.recipes import RECIPES
from pipeline.execution import resources
from pipeline.execution.ray_session import few_processes

pytestmark = pytest.mark.cluster
NODE = {"num_cpus": 160, "num_gpus": 8, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs and two nodes with eight each."""
    assert not ray.is_initialized(), "run cluster tests in a process of their own: pytest -m cluster"
    with few_processes():
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
        made.add_node(**NODE)
        made.add_node(**NODE)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_a_seed_of_the_record_takes_one_node_and_others_wait_for_one(cluster: Cluster) -> None:
    recipe = RECIPES["record"]()
    compute = recipe.compute
    assert resources.training_slots(recipe) == 2
    resources.check_capacity(recipe, 20, Console())
    bundle = {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker}
    groups = [placement_group([bundle] * compute.workers, strategy="STRICT_PACK") for _ in range(3)]
    assert [group.wait(timeout_seconds=5) for group in groups] == [True, True, False]
    remove_placement_group(groups[0])
    assert groups[2].wait(timeout_seconds=20)
    for group in groups[1:]:
        remove_placement_group(group)


def test_cpus_of_a_node_are_shared_by_its_workers(cluster: Cluster) -> None:
    recipe = RECIPES["record"]()
    whole = replace(recipe, compute=replace(recipe.compute, cpus_per_worker=0))
    resolved, evaluate_cpus = resources.resolve_cpus(whole)
    assert resolved.compute.cpus_per_worker == evaluate_cpus == 20
    assert resources.resolve_cpus(recipe) == (recipe, 20)
    more = replace(whole, compute=replace(whole.compute, evaluate_workers=4))
    assert resources.resolve_cpus(more) == (replace(more, compute=replace(more.compute, cpus_per_worker=20)), 40)


def test_a_request_that_fits_no_node_is_refused_with_what_there_is(cluster: Cluster) -> None:
    recipe = RECIPES["record"]()
    split = replace(recipe, compute=replace(recipe.compute, workers=16))  # 16 GPUs there are, but not on one node
    assert resources.training_slots(split) == 0
    with pytest.raises(RecipeError, match=r"16 ranks of 1 GPU and 20 CPU; the largest here has 8 GPU"):
        resources.check_capacity(split, 20, Console())
    gang = replace(recipe, compute=replace(recipe.compute, workers=1, evaluate_workers=9))
    with pytest.raises(RecipeError, match="evaluates a seed on one machine with 9 ranks"):
        resources.check_capacity(gang, 20, Console())
