"""ShardedBlockOptimizer steps as plain torch does on the averaged gradients, whatever the number of ranks."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch
from harness import launch
from tiers import all_differences, chosen, slow, slow_unless
from torch import nn
from workers.optimizer import GROUPS, SHAPES, reference

from smt_dist.engines.elementwise import optimizer_class_by_name, parse_options, refuse_unless_elementwise
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer
from smt_dist.errors import SMTError

WORLD_SIZES = (1, 2, 4)
ELEMENTS = 7 + 15 + 1
CASES = {
    f"{name}-{dtype}": {
        "optimizer": f"torch.optim.{name}",
        "options": options,
        "dtype": dtype,
        "reduce_dtype": "float32",
    }
    for name, options, dtype in [
        ("AdamW", {}, "float32"),
        ("AdamW", {"fused": True}, "bfloat16"),
        ("SGD", {"momentum": 0.9, "nesterov": True}, "bfloat16"),
        ("NAdam", {}, "float32"),
        ("Adagrad", {}, "float32"),
    ]
}
# Told as many micro-batches as there are, and more: the last step of an epoch may have fewer.
for _name in ("AdamW-float32", "SGD-bfloat16"):
    CASES |= {f"{_name}, {told} micro-batches told": CASES[_name] | {"told": told} for told in (2, 3)}
CASES |= {
    "bf16 reduction": {"optimizer": "torch.optim.SGD", "options": {}, "dtype": "float32", "reduce_dtype": "bfloat16"}
}
EXACT = [case for case in CASES if case != "bf16 reduction"]
each_size = pytest.mark.parametrize("world_size", slow_unless(WORLD_SIZES, lambda size: size == 2))


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """World size -> each rank's findings, by case."""
    return {
        size: launch("workers.optimizer:run_cases", size, tmp_path_factory.mktemp(f"ranks{size}"), cases=CASES)
        for size in chosen(request, "world_size")
    }


def expected(case: str):
    given = CASES[case]
    return reference(given["optimizer"], given["options"], getattr(torch, given["dtype"]))


@each_size
def test_steps_as_plain_torch_on_the_averaged_gradients(found, world_size):
    """Two groups, clipping, accumulation, a schedule, shapes that no rank's slice fits: a wrong offset shows here."""
    with all_differences() as check:
        for case in EXACT:
            plain = expected(case)
            with check(f"{case}: clipping has to act, or it isn't tested"):
                assert max(plain["norms"]) > 1.5
            for index, rank in enumerate(found[world_size]):
                with check(f"{case}, rank {index}: world size and norms"):
                    assert rank[case]["world_size"] == world_size
                    assert rank[case]["norms"] == pytest.approx(plain["norms"], rel=1e-6)
                for ours, theirs in zip(rank[case]["masters"], plain["masters"], strict=True):
                    with check(f"{case}, rank {index}: master of {tuple(theirs.shape)}"):
                        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@each_size
def test_told_gradients_are_given_up_in_the_last_backward(found, world_size):
    """A failure means that every rank holds whole fp32 gradients at the end of a backward: 4 bytes an element."""
    whole, slice_ = (4 * -(-ELEMENTS // world_size) * part for part in (world_size, 1))
    for rank in found[world_size]:
        assert rank["AdamW-float32"]["held_after_backward"] == [whole] * 4
        told = rank["AdamW-float32, 2 micro-batches told"]["held_after_backward"]
        assert told == [slice_] * 4
        assert (told < [whole] * 4) == (world_size > 1)


def test_more_backwards_than_told_are_refused(tmp_path):
    """Their gradients would be lost: the slices are gone already."""
    messages = launch("workers.optimizer:one_backward_too_many", 2, tmp_path)
    assert messages == ["more than the 1 backwards that a step was said to have"] * 2


@each_size
def test_what_computes_is_the_rounded_master(found, world_size):
    """A rank that computed with other values than the rest would train a model of its own."""
    with all_differences() as check:
        for case in EXACT:
            for index, rank in enumerate(found[world_size]):
                for value, master in zip(rank[case]["values"], rank[case]["masters"], strict=True):
                    with check(f"{case}, rank {index}: values of {tuple(master.shape)}"):
                        assert str(value.dtype) == f"torch.{CASES[case]['dtype']}"
                        assert master.dtype == torch.float32
                        assert torch.equal(value, master.to(value.dtype))


@each_size
def test_memory_is_even_to_one_element(found, world_size):
    """12 bytes an element over the ranks; the last share is padded to the others' size."""
    share = -(-ELEMENTS // world_size)
    memory = [rank["AdamW-bfloat16"]["memory"] for rank in found[world_size]]
    for rank in memory:
        assert rank == memory[0]
        assert rank["masters"] + rank["moments"] == 12 * share
        assert rank["values"] == 2 * share * world_size
        assert rank["gradients"] == 4 * share * world_size


@each_size
def test_gradients_are_dropped_as_they_come(found, world_size):
    """A gradient that stays beside its fp32 sum is a third copy of the blocks, for the whole backward."""
    assert all(rank["AdamW-float32"]["gradients_left"] == 0 for rank in found[world_size])


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=slow)])
def test_reduction_in_bf16_is_close_and_isnt_fp32(found, world_size):
    """A --reduce_dtype that were ignored would be exact; one that also added up in bf16 would be further off."""
    plain = expected("bf16 reduction")
    for rank in found[world_size]:
        masters, norms = rank["bf16 reduction"]["masters"], rank["bf16 reduction"]["norms"]
        assert norms == pytest.approx(plain["norms"], rel=2e-2)
        assert norms != pytest.approx(plain["norms"], rel=1e-6)
        for ours, theirs in zip(masters, plain["masters"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@each_size
def test_state_moves_to_a_new_optimizer_bit_for_bit(found, world_size):
    """What checkpoints do. A piece taken from the wrong rank, or put at the wrong place, would be found here."""
    for rank in found[world_size]:
        result = rank["moved to a new optimizer"]
        assert result["counters"] == [{"step": 1.0}, {"step": 1.0}]
        for (master, moments), (master_after, moments_after) in zip(result["before"], result["after"], strict=True):
            assert torch.equal(master, master_after)
            assert set(moments) == set(moments_after) == {"exp_avg", "exp_avg_sq"}
            assert all(torch.equal(moments[key], moments_after[key]) for key in moments)


@each_size
def test_newest_optimizer_of_a_parameter_gets_its_gradients(found, world_size):
    """With the first one's hook still there, a second Trainer on the same model would train nothing."""
    for rank in found[world_size]:
        assert rank["moved to a new optimizer"]["norm_of_first"] == 0
        assert min(rank["moved to a new optimizer"]["moved"]) > 0


@each_size
def test_state_dict_asks_nothing_of_other_ranks(found, world_size):
    """Trainer and accelerate call it on one rank: a collective would hang the job."""
    assert all(rank["state_dict"] for rank in found[world_size])


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=slow)])
def test_ranks_that_miss_a_gradient_reduce_when_the_others_do(found, world_size):
    """An expert that no token of a rank reaches: that rank would reduce later than the others, who would wait for it
    where it waits for them, in one of FSDP2's gathers. Not told of it, the ranks do part.
    """
    told, not_told = ([rank["idle"][name] for rank in found[world_size]] for name in ("told", "not told"))
    assert told == [0] * world_size
    assert not_told[0] < world_size
    assert not_told[1:] == [world_size] * (world_size - 1)


@each_size
def test_clipping_twice_clips_to_the_smaller(found, world_size):
    """The second call measures what the first left; a second reduce-scatter would add the gradients up again."""
    assert all(rank["scaled"] == pytest.approx(1e-3, rel=1e-2) for rank in found[world_size])


# -- which optimizers ------------------------------------------------------------------------------------------


class Lamb(torch.optim.SGD):
    """Scales each parameter's update by the parameter's norm, as LAMB and LARS do."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.norm() * parameter.grad / parameter.grad.norm()


class RowWise(torch.optim.SGD):
    """Needs rows."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad / parameter.grad.norm(dim=1, keepdim=True)


class CountsInItsGroup(torch.optim.SGD):
    """Keeps its step count where a checkpoint doesn't look, as schedule-free optimizers do."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                parameter -= group["lr"] / group["k"] * parameter.grad


class KeepsARing(torch.optim.SGD):
    """Keeps the last two gradients: neither a number nor one for each element."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                ring = self.state[parameter].setdefault("ring", torch.zeros(2, *parameter.shape))
                ring.copy_(torch.stack([parameter.grad, ring[0]]))
                parameter -= group["lr"] * ring.sum(0)


@pytest.mark.parametrize("learning_rate", [1e-2, 1e-7])
@pytest.mark.parametrize(
    "optimizer_class",
    [
        *(torch.optim.Adafactor, torch.optim.Muon, torch.optim.LBFGS, torch.optim.SparseAdam),
        *(Lamb, RowWise, CountsInItsGroup, KeepsARing),
    ],
    ids=lambda c: c.__name__,
)
def test_optimizer_that_cannot_be_sharded_or_saved_is_refused_by_name(optimizer_class, learning_rate):
    """Sharded, it would silently be another optimizer; at a small learning rate rounding must not hide that."""
    with pytest.raises(SMTError, match=optimizer_class.__name__):
        refuse_unless_elementwise(optimizer_class, {"lr": learning_rate})


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adamax", "RAdam", "Adadelta", "Rprop", "ASGD"])
def test_elementwise_optimizer_is_taken(name):
    """A refusal that were too broad would leave nothing but AdamW."""
    refuse_unless_elementwise(getattr(torch.optim, name), {"lr": 1e-2})


@pytest.mark.parametrize("name", ["nosuch.module.Adam", "torch.optim.NoSuch", "torch.nn.Linear", "math.pi", ".Adam"])
def test_what_is_no_optimizer_is_refused(name):
    """One line, before the warm-up, instead of a traceback after it."""
    with pytest.raises(SMTError, match="--optim"):
        optimizer_class_by_name(name)


def test_options_are_read_as_python_values():
    """``betas`` holds a comma, and booleans aren't strings that are always true."""
    assert parse_options("momentum=0.9, betas=(0.9, 0.95),nesterov=True") == {
        "momentum": 0.9,
        "betas": (0.9, 0.95),
        "nesterov": True,
    }
    assert parse_options(None) == {}


@pytest.mark.parametrize(
    "text", ["momentum", "a=b", "a=1)(", "**{'a': 1}", "a=__import__('os')", "lr=0.1", "weight_decay=0.1"]
)
def test_options_that_are_no_values_are_refused(text):
    """Nothing in a flag may run, and nothing that has a flag of its own may be dropped."""
    with pytest.raises(SMTError, match="--optim_args"):
        parse_options(text)


# -- one process -----------------------------------------------------------------------------------------------


def make_one() -> tuple[nn.Parameter, ShardedBlockOptimizer]:
    parameter = nn.Parameter(torch.ones(4, 2))
    return parameter, ShardedBlockOptimizer([{"params": [parameter], "lr": 0.25}], torch.optim.SGD)


def test_dead_optimizer_leaves_gradients_alone():
    """Its hook would take them from whatever trains the parameter next: nothing would move, without a word."""
    parameter, optimizer = make_one()
    del optimizer
    gc.collect()
    plain = torch.optim.SGD([parameter], lr=1.0)
    parameter.sum().backward()
    plain.step()
    assert torch.equal(parameter.detach(), torch.zeros(4, 2))


def test_parameter_with_an_optimizer_can_be_pickled():
    """``torch.save(model)`` and multiprocessing do it; a hook that hangs on the parameter can't be pickled."""
    parameter, _optimizer = make_one()
    assert torch.equal(pickle.loads(pickle.dumps(parameter)), parameter)


def test_moved_parameter_is_noticed():
    """After ``model.to`` steps would go to the old buffer: training would stop silently."""
    parameter, optimizer = make_one()
    parameter.data = parameter.data.double().float()
    parameter.sum().backward()
    with pytest.raises(RuntimeError, match="moved"):
        optimizer.step()


def test_backward_after_clipping_is_refused():
    """Its gradient would be in neither this step nor the next."""
    parameter, optimizer = make_one()
    parameter.sum().backward()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="between clip_grad_norm_ and step"):
        parameter.sum().backward()


def test_loaded_learning_rate_is_the_one_that_steps():
    """The outer groups are copied over the inner ones before each step: loading only the inner ones is undone."""
    _, optimizer = make_one()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 1.0
    parameter, other = make_one()
    other.load_state_dict(state)
    parameter.sum().backward()
    other.step()
    assert torch.equal(parameter.detach(), torch.zeros(4, 2))


def test_whole_counters_of_other_libraries_stay_whole(monkeypatch):
    """An optimizer that indexes with its step count can't do so with a tensor of floats."""
    _, optimizer = make_one()
    monkeypatch.setattr(type(optimizer.inner), "__module__", "elsewhere.optimizers")
    optimizer.set_counters({"step": 3, "product": 0.5})
    state = optimizer.inner.state[next(iter(optimizer.inner.state))]
    assert state["step"] == 3
    assert isinstance(state["step"], int)
    assert optimizer.counters == {"step": 3, "product": 0.5}


def test_groups_cover_all_kinds():
    """Guards the tests above: groups differ, and their sizes don't divide."""
    assert len(GROUPS) == len(SHAPES) == 2
    assert GROUPS[0] != GROUPS[1]
    assert all(ELEMENTS % size for size in WORLD_SIZES if size > 1)
