"""Evaluation and the odd last step are those of one process, on any number of ranks and at any batch size."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from harness import launch, launch_engines
from tiers import all_differences, chosen, engines_of, slow_rows_unless
from tiny_models import label_tokens, make_rows, sum_of_token_losses
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM
from workers.token_counts import EPOCHS, GLOBAL_BATCH, evaluation_rows

from smt_dist.training.token_counts import StepTokens, TokenMean, mask_repeated_rows, repeated_rows

COUNTS, BATCH_SIZES = [3, 10], [1, 4]
LAUNCHES = {1: ["ddp", "zero3"], 2: ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"], 4: ["ddp"]}
RUNS = [(world_size, engine) for world_size, engines in LAUNCHES.items() for engine in engines]
QUICK = [(1, "ddp"), (2, "ddp"), (2, "fsdp2"), (2, "zero3")]
each_run = pytest.mark.parametrize(("world_size", "engine"), slow_rows_unless(RUNS, lambda *run: run in QUICK))
EVALUATION_TOLERANCE, TRAINING_TOLERANCE = 1e-6, 1e-5
PLANS = [[count, accumulation, "plain"] for count in (5, 7) for accumulation in (1, 2)]
PLANS += [[7, 1, "no token count"], [7, 2, "no token count"], [7, 1, "resumed"], [7, 1, "best"]]


def plans_for(world_size: int) -> list[list]:
    """Those whose global batch the ranks can share."""
    return [plan for plan in PLANS if world_size * plan[1] <= GLOBAL_BATCH]


@pytest.fixture(scope="module")
def evaluated(request, tmp_path_factory, model_folder):
    """(world size, engine) -> each rank's findings."""
    folder = tmp_path_factory.mktemp("evaluated")
    files = {"model": str(model_folder), "counts": COUNTS, "batch_sizes": BATCH_SIZES}
    launches = engines_of(chosen(request, "world_size", "engine"))
    return launch_engines("workers.token_counts:evaluate", launches, folder, **files)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, model_folder):
    """(world size, engine) -> each rank's findings by plan; one process is the reference."""
    folder, found = tmp_path_factory.mktemp("trained"), {}
    runs = {(1, "ddp"): None, (2, "ddp"): None} | dict.fromkeys(chosen(request, "world_size", "engine"))
    for world_size, engines in engines_of(runs).items():
        options = {"model": str(model_folder), "plans": plans_for(world_size), "timeout": 300}
        found |= launch_engines("workers.token_counts:train", {world_size: engines}, folder, **options)
    return found


@pytest.fixture(scope="module")
def means(model_folder):
    """Rows -> the mean loss over their trained tokens, worked out one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    def mean_of(count: int) -> float:
        total, tokens = 0.0, 0
        for row in evaluation_rows(count):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                total += float(sum_of_token_losses(model(input_ids=ids).logits, labels))
            tokens += label_tokens(labels)
        return total / tokens

    return {count: mean_of(count) for count in COUNTS}


@each_run
def test_evaluation_loss_is_the_mean_over_the_sets_trained_tokens(evaluated, means, world_size, engine):
    """At any batch size, packed or not; compute_metrics sees each row once."""
    with all_differences() as check:
        for rank in evaluated[world_size, engine]:
            assert rank["world_size"] == world_size
            assert ("DeepSpeedEngine" in rank["engine"]) == engine.startswith("zero")
            for key, loss in rank["losses"].items():
                count, _, kind = key.split("/")
                with check(key):
                    assert loss == pytest.approx(means[int(count)], rel=EVALUATION_TOLERANCE)
                    assert kind == "packed" or rank["rows"][key] == int(count)


@each_run
def test_predict_gives_each_row_once_and_in_order(evaluated, means, world_size, engine):
    rows = evaluation_rows(COUNTS[0])
    for rank in evaluated[world_size, engine]:
        labels = rank["labels"]
        assert len(labels) == len(rank["logits"]) == len(rows)
        for found, row in zip(labels.tolist(), rows, strict=True):
            assert found[: len(row["labels"])] == row["labels"]
        assert rank["test_loss"] == pytest.approx(means[COUNTS[0]], rel=EVALUATION_TOLERANCE)


@each_run
def test_odd_last_steps_are_those_of_one_process(trained, world_size, engine):
    """Row counts that nothing divides; a step's gradient norm shows one row too many."""
    expected = {(count, kind): found for (count, _, kind), found in zip(PLANS, trained[1, "ddp"][0], strict=True)}
    with all_differences() as check:
        for rank in trained[world_size, engine]:
            for plan, found in zip(plans_for(world_size), rank, strict=True):
                truth = expected[plan[0], plan[2]]
                assert found["world_size"] == world_size
                assert len(truth["gradient_norms"]) >= EPOCHS
                for key in ("gradient_norms", "losses", "eval_losses"):
                    with check(f"{plan}: {key}"):
                        assert found[key] == pytest.approx(truth[key], rel=TRAINING_TOLERANCE)
                for module, blocks in found["blocks"].items():
                    with check(f"{plan}: {module}"):
                        assert torch.allclose(blocks, truth["blocks"][module], rtol=1e-4, atol=1e-6)
                        assert blocks.abs().max() > 0


@each_run
def test_best_model_goes_by_the_mean_over_all_tokens(trained, world_size, engine):
    plan = plans_for(world_size).index([7, 1, "best"])
    for rank in trained[world_size, engine]:
        losses = rank[plan]["eval_losses"]
        assert len(losses) > 2
        assert rank[plan]["best"] == min(losses)


def test_model_without_a_token_count_trains_as_one_with_it(trained):
    """Trainer's mean of micro-batch means would weigh a token by how long its neighbours are."""
    found = dict(zip([tuple(plan) for plan in plans_for(2)], trained[2, "ddp"][0], strict=True))
    for accumulation in (1, 2):
        norms = found[7, accumulation, "no token count"]["gradient_norms"]
        assert norms == pytest.approx(found[7, accumulation, "plain"]["gradient_norms"], rel=TRAINING_TOLERANCE)


def test_losses_of_ones_own_chunked_ones_and_data_without_a_length(tmp_path, model_folder, means):
    """From a fresh reading: each of these crashed, hung, or gave another mean on 2 ranks."""
    for rank in launch("workers.token_counts:edges", 2, tmp_path, model=str(model_folder), count=3):
        with all_differences() as check:
            for key in ("own loss", "chunked, loss alone"):
                with check(key):
                    assert rank[key] == pytest.approx(means[3], rel=EVALUATION_TOLERANCE)
            with check("metrics beside a chunked loss"):
                assert rank["chunked"]["eval_loss"] == pytest.approx(means[3], rel=EVALUATION_TOLERANCE)
                assert rank["chunked"]["eval_rows"] == 3
                assert rank["chunked logits"][0] == 3
            for key in ("iterable", "dispatched"):
                with check(key):
                    assert rank[key] == 2
            with check("refused"):
                assert "dispatch_batches false can't be used with data of unknown length" in rank["refused"]


def test_without_the_mends_ranks_change_the_loss_and_the_step(tmp_path, model_folder, means):
    """Guards the tests above: Trainer's own methods give other figures."""
    options = {"model": str(model_folder), "engines": ["ddp"], "mended": False}
    evaluation = {"counts": [3], "batch_sizes": [1, 2], **options}
    (found, _) = launch("workers.token_counts:evaluate", 2, tmp_path / "evaluate", **evaluation)
    for size in (1, 2):
        assert abs(found["ddp"]["losses"][f"3/{size}/plain"] - means[3]) > 1e-3
    plans = {"plans": [[7, 2, "plain"]], **options}
    (ours, _) = launch("workers.token_counts:train", 2, tmp_path / "train", **plans)
    (alone,) = launch("workers.token_counts:train", 1, tmp_path / "alone", **plans)
    norms, truth = ours["ddp"][0]["gradient_norms"], alone["ddp"][0]["gradient_norms"]
    assert norms[0] == pytest.approx(truth[0], rel=TRAINING_TOLERANCE)
    assert abs(norms[1] - truth[1]) > 1e-3 * truth[1]


def test_every_row_is_left_once_for_any_rows_batch_and_ranks():
    """Against accelerate's own sampler: what isn't masked is the data set, resumed or not."""
    for count in range(1, 24):
        for size in (1, 2, 3, 4):
            for ranks in (2, 3, 4):
                for drop_last in (False, True):
                    check_one_pass(count, size, ranks, drop_last)


def check_one_pass(count: int, size: int, ranks: int, drop_last: bool) -> None:
    for skipped in (0, 1):
        seen: list[int] = []
        for rank in range(ranks):
            batches = BatchSampler(SequentialSampler(range(count)), size, drop_last)
            shard = BatchSamplerShard(batches, ranks, rank)
            sampler = SkipBatchSampler(shard, skipped) if skipped else shard
            own = [*iter(sampler)]
            if own:
                loader = SimpleNamespace(batch_sampler=sampler, dataset=range(count))
                own[-1] = own[-1][: len(own[-1]) - repeated_rows(loader, len(own[-1]))]
            seen += chain.from_iterable(own)
        first = skipped * size * ranks
        whole = count - count % (size * ranks) if drop_last else count
        assert sorted(seen) == list(range(min(first, whole), whole)), (count, size, ranks, drop_last, skipped)


def test_only_the_last_batch_is_masked():
    sampler = BatchSamplerShard(BatchSampler(SequentialSampler(range(3)), 2, False), 2, 1)
    loader = SimpleNamespace(batch_sampler=sampler, dataset=range(3))
    batch = {"labels": torch.ones(2, 4, dtype=torch.int64), "input_ids": torch.ones(2, 4)}
    middle = SimpleNamespace(end_of_dataloader=False, active_dataloader=loader)
    assert mask_repeated_rows(batch, middle) is batch
    masked = mask_repeated_rows(batch, SimpleNamespace(end_of_dataloader=True, active_dataloader=loader))
    assert masked["labels"].tolist() == [[1] * 4, [-100] * 4]
    assert batch["labels"].min() == 1, "the caller's batch has changed"


def test_mean_weighs_batches_by_tokens_and_ignores_empty_ones():
    mean = TokenMean()
    for loss, tokens in ((2.0, 3), (float("nan"), 0), (4.0, 1)):
        mean.add(torch.tensor(loss), torch.tensor(tokens))
    assert mean.value() == 2.5


def test_non_finite_loss_is_not_left_out_of_the_mean():
    """Trainer would leave such a batch out, and call the model better than it is."""
    mean = TokenMean()
    mean.add(torch.tensor(float("nan")), torch.tensor(2))
    mean.add(torch.tensor(1.0), torch.tensor(2))
    assert mean.value() != mean.value()


def test_micro_batch_without_tokens_adds_a_zero_gradient():
    logits = torch.ones(2, 3, requires_grad=True)
    step = StepTokens()
    step.begin([{"labels": torch.tensor([[1, 2, 3]])}])
    batch = {"labels": torch.full((1, 3), -100)}
    step.share(torch.tensor(float("nan")), {"logits": logits}, batch, world_size=1).backward()
    assert logits.grad.abs().max() == 0


def test_rows_are_uneven():
    """Guards the tests above: equal rows would hide a wrong weight."""
    tokens = [label_tokens(torch.tensor([row["labels"]])) for row in evaluation_rows(7)]
    assert tokens[-1] == 1
    assert max(tokens) > 4
    assert len({len(row["input_ids"]) for row in make_rows(7, seed=7)}) > 3
