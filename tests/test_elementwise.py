"""The optimizers that are taken without a trial are those that pass it, whatever their options."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from smt_dist.engines import elementwise
from smt_dist.engines.elementwise import ELEMENTWISE, refuse_unless_elementwise, state_names, try_slices
from smt_dist.errors import SMTError

# Sorted: workers that run side by side must collect the same tests in the same order, and a set has none.
BY_NAME = {optimizer.__name__: optimizer for optimizer in sorted(ELEMENTWISE, key=lambda kind: kind.__name__)}
LR = {"lr": 1e-2}
# What each may be given, and what it then keeps: moments, counters. None: nothing of its own.
KEPT = {
    "ASGD": {"": ("ax", "eta mu step"), "lambd=0.1, alpha=0.5, t0=1.0": ("ax", "eta mu step")},
    "Adadelta": {"": ("acc_delta square_avg", "step"), "rho=0.5, eps=1e-3": ("acc_delta square_avg", "step")},
    "Adagrad": {
        "": ("sum", "step"),
        "lr_decay=0.1, initial_accumulator_value=0.5": ("sum", "step"),
        "fused=True": ("sum", "step"),
    },
    "Adam": {
        "": ("exp_avg exp_avg_sq", "step"),
        "betas=(0.8, 0.9), eps=1e-3": ("exp_avg exp_avg_sq", "step"),
        "decoupled_weight_decay=True": ("exp_avg exp_avg_sq", "step"),
        "amsgrad=True": ("exp_avg exp_avg_sq max_exp_avg_sq", "step"),
        "amsgrad=True, fused=True": ("exp_avg exp_avg_sq max_exp_avg_sq", "step"),
        "fused=True": ("exp_avg exp_avg_sq", "step"),
    },
    "AdamW": {
        "": ("exp_avg exp_avg_sq", "step"),
        "betas=(0.8, 0.9), eps=1e-3": ("exp_avg exp_avg_sq", "step"),
        "amsgrad=True": ("exp_avg exp_avg_sq max_exp_avg_sq", "step"),
        "amsgrad=True, fused=True": ("exp_avg exp_avg_sq max_exp_avg_sq", "step"),
        "fused=True": ("exp_avg exp_avg_sq", "step"),
    },
    "Adamax": {"": ("exp_avg exp_inf", "step"), "betas=(0.8, 0.9)": ("exp_avg exp_inf", "step")},
    "NAdam": {
        "": ("exp_avg exp_avg_sq", "mu_product step"),
        "momentum_decay=0.1, decoupled_weight_decay=True": ("exp_avg exp_avg_sq", "mu_product step"),
    },
    "RAdam": {
        "": ("exp_avg exp_avg_sq", "step"),
        "betas=(0.8, 0.9), decoupled_weight_decay=True": ("exp_avg exp_avg_sq", "step"),
    },
    "RMSprop": {
        "": ("square_avg", "step"),
        "momentum=0.9": ("momentum_buffer square_avg", "step"),
        "centered=True, alpha=0.5": ("grad_avg square_avg", "step"),
        "centered=True, momentum=0.9": ("grad_avg momentum_buffer square_avg", "step"),
    },
    "Rprop": {"": ("prev step_size", "step"), "etas=(0.3, 1.5), step_sizes=(1e-4, 1)": ("prev step_size", "step")},
    "SGD": {
        "": ("", ""),
        "momentum=0.9": ("momentum_buffer", ""),
        "momentum=0.9, dampening=0.5": ("momentum_buffer", ""),
        "momentum=0.9, nesterov=True": ("momentum_buffer", ""),
        "momentum=0.9, fused=True": ("momentum_buffer", ""),
    },
}
CASES = [(name, options, *names) for name, cases in KEPT.items() for options, names in cases.items()]
# What comes on top; nearly every class has these.
DECAY = {"weight_decay": 0.1, "maximize": True}
WAYS = [{}, DECAY, {"foreach": False}, {"foreach": True}, {"foreach": True, **DECAY}]
BAD = {
    "no such option": {"speed": 3},
    "an option's value": {"weight_decay": "much"},
    "options that exclude each other": {"foreach": True, "fused": True},
    "steps that autograd sees": {"differentiable": True},
    "counters on a GPU": {"capturable": True},
    "counters on a GPU, all at once": {"capturable": True, "foreach": True},
}


def read(options: str) -> dict[str, object]:
    return LR | elementwise.parse_options(options)


def test_each_has_its_cases():
    """One without would be taken on trust."""
    assert set(KEPT) == set(BY_NAME)
    assert all("" in cases for cases in KEPT.values())
    for name, cases in KEPT.items():
        given = {key for options in cases for key in read(options)} | {key for way in WAYS for key in way}
        left = set(signature(BY_NAME[name]).parameters) - given - {"params"}
        assert left <= {"capturable", "differentiable", "eps", "betas"}, "the first two are refused"


@pytest.mark.parametrize(("name", "options", "moments", "counters"), CASES)
def test_what_is_taken_without_a_trial_passes_it(name, options, moments, counters, monkeypatch):
    """Wrongly on the list, an optimizer would train something else on every number of ranks, without a word."""
    monkeypatch.setattr(elementwise, "_STEPS", 8)  # RAdam steps otherwise from its sixth on
    for way in WAYS:
        given = read(options) | {key: value for key, value in way.items() if key in signature(BY_NAME[name]).parameters}
        if given.get("fused") and given.get("foreach"):
            continue  # refused, see below
        try_slices(BY_NAME[name], given)
        refuse_unless_elementwise(BY_NAME[name], given)
        assert state_names(BY_NAME[name], given) == (moments.split(), counters.split())


def test_every_optimizer_of_torch_is_on_the_list_or_refused():
    """A failure means that torch has a new one: decide, and say why."""
    found = {
        value
        for value in vars(torch.optim).values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert found > ELEMENTWISE
    for optimizer in found - ELEMENTWISE:
        with pytest.raises(SMTError, match=optimizer.__name__):
            refuse_unless_elementwise(optimizer, LR)


def message(call, name: str, options: dict[str, object]) -> str:
    try:
        call(BY_NAME[name], options)
    except SMTError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", BY_NAME)
def test_wrong_options_are_refused_as_by_the_trial(name, bad):
    """In the same line: before the warm-up, and not in the first step after it."""
    options = LR | BAD[bad]
    refused = message(refuse_unless_elementwise, name, options)
    assert refused == message(try_slices, name, options)
    assert refused.startswith("--optim: torch.optim.")
    assert f".{name} can't step the blocks in slices (" in refused
    assert len(refused.splitlines()) == 1


def test_the_list_spares_the_trial_and_a_subclass_does_not(monkeypatch):
    """What a subclass overrides isn't known."""

    class Other(torch.optim.AdamW):
        pass

    def trial(optimizer_class, _options):
        tried.append(optimizer_class)

    tried = []
    monkeypatch.setattr(elementwise, "try_slices", trial)
    for optimizer in (*ELEMENTWISE, Other):
        refuse_unless_elementwise(optimizer, LR)
    assert tried == [Other]


def test_the_optimizer_of_a_plan_can_be_asked_for_under_fake_tensors():
    """There no result can be compared."""
    with FakeTensorMode():
        refuse_unless_elementwise(torch.optim.AdamW, {"fused": True})
