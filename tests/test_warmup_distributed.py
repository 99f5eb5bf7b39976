"""The warm-up on several ranks: experts that a rank never reaches, the memory it promises, and input that is wrong."""

from __future__ import annotations

import pytest
from harness import launch
from tiers import all_differences, chosen, slow
from tiny_models import save_tiny_llama
from workers.warmup import ROUTED_SCORES

LAUNCHES = {1: [], 2: ["ddp", "zero3"], 4: []}
each_size = pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=slow)])


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """World size -> each rank's findings."""
    asked = {1, 2, *chosen(request, "world_size")}
    model = str(save_tiny_llama(tmp_path_factory.mktemp("model")))
    return {
        world_size: launch(
            "workers.warmup:everything",
            world_size,
            tmp_path_factory.mktemp(f"ranks{world_size}"),
            model=model,
            engines=engines,
        )
        for world_size, engines in LAUNCHES.items()
        if world_size in asked
    }


# -- routing that differs by rank ------------------------------------------------------------------------------


@each_size
def test_expert_that_one_rank_never_reaches_counts_as_zero_there(found, world_size):
    """Were collectives issued as gradients come, ranks would pair different experts' gradients, or hang."""
    with all_differences() as check:
        for score in ROUTED_SCORES:
            expected = found[1][0]["routed"][score]
            largest = max(table.max() for table in expected.values())
            with check(f"{score}: there is something to compare"):
                assert any(table.any() for table in expected.values())
            for index, rank in enumerate(found[world_size]):
                with check(f"{score}, rank {index}: modules"):
                    assert list(rank["routed"][score]) == list(expected)
                for module, table in rank["routed"][score].items():
                    with check(f"{score}, rank {index}: {module}"):
                        assert (table - expected[module]).abs().max() <= 1e-5 * largest


@each_size
def test_ranks_of_the_toy_reach_different_experts(found, world_size):
    """Guards the test above: a whole layer and single experts are missing on rank 0 and present elsewhere."""
    first, last = (set(found[world_size][rank]["unreached"]) for rank in (0, -1))
    assert {"layers.0.experts.1", "layers.1.shared", "layers.1.experts.0", "layers.2.experts.2"} <= first
    assert not last


# -- the memory promise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", LAUNCHES[2])
def test_scoring_holds_no_more_than_a_layers_gradients_and_a_shard_of_the_scores(found, engine):
    """Otherwise the warm-up, not training, would set the run's peak memory.

    A queue that grows with depth would hold the full model's gradient at the end of a backward; an accumulator on each
    rank would be as large as the fp32 weights that are scored.
    """
    with all_differences() as check:
        for index, rank in enumerate(found[2]):
            memory = rank["memory"][engine]
            with check(f"rank {index}: looked at in each of the steps, micro-batches and targets"):
                assert memory["calls"] == 2 * 2 * 6
                assert memory["world_size"] == 2
            with check(f"rank {index}: weight gradients and optimizers"):
                assert memory["weight_gradients"] == memory["weight_gradients_after"] == memory["optimizers"] == 0
            with check(f"rank {index}: one layer's gradients"):
                assert 0 < memory["most_gradient_elements"] <= memory["layer_elements"] < memory["target_elements"]
            with check(f"rank {index}: 4 bytes x targets / ranks"):
                assert memory["shard_bytes"] == [4 * memory["target_elements"] // 2] * 2


def test_zero3_scoring_leaves_the_base_partitioned(found):
    """Scoring that leaves weights gathered would need the memory that ZeRO-3 was chosen to save."""
    for rank in found[2]:
        memory = rank["memory"]
        assert memory["zero3"]["base_elements_held"] == memory["ddp"]["base_elements_held"] // 2


# -- faults ----------------------------------------------------------------------------------------------------

EXPECTED = {
    "one rank has fewer micro-batches": ("SMTError", "step 2", "different numbers of micro-batches"),
    "one rank has fewer steps": ("SMTError", "step 2", "different numbers of micro-batches"),
    "one rank has no batch": ("SMTError", "step 1", "different numbers of micro-batches"),
    "one rank has a batch without labels": ("SMTError", "no 'labels'"),
    "nothing but masked labels": ("SMTError", "step 1", "masked"),
    "NaN on one rank, elementwise": ("SMTError", "step 1", "layers.2.shared", "not finite"),
    "NaN on one rank, streamed": ("SMTError", "step 1", "layers.2.shared", "not finite"),
    "the last rank differs": ("RuntimeError", "the selection differs between ranks"),
    "the last rank fails": ("SMTError", "row 3 is malformed"),
    "rank 0 fails first": ("SMTError", "model.gguf: damaged"),
}


@each_size
def test_fault_on_one_rank_is_raised_on_every_rank(found, world_size):
    """A rank that fails alone leaves the others waiting in a collective until the time-out, without a reason."""
    with all_differences() as check:
        for fault, expected in EXPECTED.items():
            for index, rank in enumerate(found[world_size]):
                for words in expected:
                    with check(f"{fault}, rank {index}"):
                        assert words in rank["faults"][fault]


@each_size
def test_ranks_are_still_in_step_after_faults(found, world_size):
    """A collective that one rank skipped would pair with another one later and give silently wrong numbers."""
    for index, rank in enumerate(found[world_size]):
        total = world_size * (world_size + 1) / 2
        assert rank["without faults"] == {
            "raise_on_any_rank": index * 10,
            "main_process_first": index + 1,
            "sum": total,
        }
