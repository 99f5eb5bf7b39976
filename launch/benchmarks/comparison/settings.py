"""What a comparison is asked to do, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from comparison.methods import DEFAULT_RATES, Method, parse_method

from smt_dist.config import MAX_SEED, SMTConfig
from smt_dist.errors import SMTError

DTYPES = ("float32", "bfloat16")
TUNE = ("each", "family")
MIN_TEST_ITEMS = 2  # an accuracy of one item is no figure


@dataclass(frozen=True)
class Settings:
    """All that the figures depend on, but the model's and the data's files.

    Attributes:
        methods: to compare, in the order of the table.
        budgets: trainable parameters as shares of all parameters, ascending, each in (0, 1).
        seeds: of data order, initial adapters and random blocks; the first one tunes the rates.
        rates: family or method, or either at one budget (``lora@0.08``) -> its grid of learning rates, ascending.
        tune: ``each`` method has its own rate; ``family``: all of SMT's scores share the first one's.
        targets: modules that adapters and blocks may train, as in the SMT config.
        block_size: side of SMT's blocks.
        selection_steps: batches that SMT scores.
        strategy: SMT's ``selection.strategy``.
        steps: optimizer steps of every method.
        batch_size: rows a step.
        max_seq_length: tokens; longer rows are cut.
        prompt_style: ``plain`` or ``chat``.
        dtype: of the base, for all methods; what is trained is kept in fp32.
        test_items: questions to answer, at most.
        max_new_tokens: of an answer.
        eval_batch_size: rows of a forward pass in evaluation.
    """

    methods: tuple[Method, ...]
    budgets: tuple[float, ...] = (0.005, 0.02, 0.08)
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(DEFAULT_RATES))
    tune: str = "each"
    targets: tuple[str, ...] = ("attention", "o_proj", "mlp")
    block_size: int = 64
    selection_steps: int = 20
    strategy: str = SMTConfig().selection.strategy
    steps: int = 200
    batch_size: int = 16
    max_seq_length: int = 256
    prompt_style: str = "chat"
    dtype: str = "float32"
    test_items: int = 1000
    max_new_tokens: int = 16
    eval_batch_size: int = 32

    def __post_init__(self) -> None:
        """Raise SMTError for the first value that can't be right."""
        if len({method.name for method in self.methods}) < len(self.methods):
            raise SMTError("--methods: a method is given twice")
        for share in self.budgets:
            if not 0 < share < 1:
                raise SMTError(f"--budgets: {share:g} is not in (0, 1), a share of the model's parameters")
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise SMTError("--budgets: give one share or more, each once")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SMTError("--seeds: give one seed or more, each once")
        if not all(0 <= seed <= MAX_SEED for seed in self.seeds):
            raise SMTError(f"--seeds: must be from 0 to {MAX_SEED}")
        if self.test_items < MIN_TEST_ITEMS:
            raise SMTError(f"--test_items: at least {MIN_TEST_ITEMS}, not {self.test_items}")
        known = [repr(budget) for budget in self.budgets]
        for name in self.rates:
            if "@" in name and name.partition("@")[2] not in known:
                raise SMTError(f"--learning_rates: {name}: not one of the budgets {', '.join(known)}")
        for name, allowed in (("dtype", DTYPES), ("tune", TUNE), ("prompt_style", ("plain", "chat"))):
            if getattr(self, name) not in allowed:
                raise SMTError(f"--{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def tuning_budget(self) -> float:
        """The budget in the middle."""
        return self.budgets[len(self.budgets) // 2]

    def grid_name(self, method: Method, budget: float) -> str:
        """Which of ``rates`` a method takes: one for the budget before any other, its own before its family's."""
        names = (_at(method.name, budget), _at(method.family, budget), method.name)
        return next((name for name in names if name in self.rates), method.family)


def parse_methods(names: Sequence[str]) -> tuple[Method, ...]:
    """Methods by name. Raises SMTError for an unknown one, listing the names."""
    return tuple(parse_method(name) for name in names)


def parse_rates(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """``["lora=1e-4,3e-4", "smt:random=1e-3", "lora@0.08=1e-4"]`` over the default grids.

    Raises:
        SMTError: an unknown family or method, a budget of one that has none, a grid given twice, no rate, or one that
            isn't a finite number above 0.
    """
    grids: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name, at, budget = name.partition("@")
        method = parse_method(name)
        name = method.name if ":" in name else name  # "smt:" is its default score's
        try:
            rates = tuple(sorted({float(value) for value in values.split(",")}))
            name = _at(name, float(budget)) if at else name
        except ValueError:
            raise SMTError(f"--learning_rates: {text!r}: expected such as lora=3e-4,1e-3 or lora@0.08=1e-4") from None
        if at and not method.has_budget:
            raise SMTError(f"--learning_rates: {text!r}: {method.family} has no budget")
        if not all(0 < rate < math.inf for rate in rates):
            raise SMTError(f"--learning_rates: {text!r}: a learning rate is finite and above 0")
        if name in grids:
            raise SMTError(f"--learning_rates: {text!r}: {name} has a grid already")
        grids[name] = rates
    return DEFAULT_RATES | grids


def _at(name: str, budget: float) -> str:
    return f"{name}@{budget!r}"


def as_json(settings: Settings) -> dict[str, Any]:
    """Plain values, for ``comparison.json``."""
    names = {"methods": [method.name for method in settings.methods]}
    return {**{key: value for key, value in vars(settings).items() if key != "methods"}, **names}
