"""The methods by name, their grids of learning rates, and how large each is at a budget; no weights are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from smt_dist.config import SCORES, SMTConfig
from smt_dist.errors import SMTError, require_peft
from smt_dist.selection.warmup import plan_grids
from smt_dist.selection.weight_scores import diagonal
from smt_dist.sparse.blocks import BlockGrid

FAMILIES = ("base", "full", "smt", "lora", "dora", "shira")
PEFT_FAMILIES = ("lora", "dora", "shira")
REFERENCE_SCORE = SMTConfig().selection.score
# Half a decade apart. Full fine-tuning moves every weight, so it wants smaller steps.
DEFAULT_RATES: dict[str, tuple[float, ...]] = {
    "base": (0.0,),
    "full": (3e-5, 1e-4, 3e-4),
    "smt": (3e-4, 1e-3, 3e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "dora": (3e-4, 1e-3, 3e-3),
    "shira": (3e-4, 1e-3, 3e-3),
}
DEFAULT_METHODS = (
    "base",
    "full",
    *(f"smt:{score}" for score in ("abs_mean", "mean_abs", "grad_x_weight", "activation")),
    *("smt:magnitude", "smt:diagonal", "smt:random"),
    *PEFT_FAMILIES,
)


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: ``base`` (nothing is trained), ``full``, ``lora``, ``dora``, ``shira`` or ``smt:SCORE``.
        family: the name up to the colon.
        score: SMT's ``selection.score``.
    """

    name: str
    family: str
    score: str | None = None

    @property
    def has_budget(self) -> bool:
        """Whether the number of its trainable parameters can be chosen."""
        return self.family not in ("base", "full")


@dataclass(frozen=True)
class Size:
    """What a method trains at a budget.

    Attributes:
        trainable: parameters; 0 where ``problem`` is given.
        amount: rank of an adapter, or number of blocks; None for methods without a budget.
        problem: why the budget can't be reached.
    """

    trainable: int
    amount: int | None = None
    problem: str | None = None


def parse_method(name: str) -> Method:
    """A method by name; ``smt`` alone is SMT with its default score.

    Raises:
        SMTError: an unknown method or score; lists the names.
    """
    family, colon, score = name.partition(":")
    if family not in FAMILIES or (colon and family != "smt"):
        known = [*(each for each in FAMILIES if each != "smt"), "smt:SCORE"]
        raise SMTError(f"--methods: {name!r} is not one of {', '.join(known)}")
    if family != "smt":
        return Method(name, family)
    score = score or REFERENCE_SCORE
    if score not in SCORES and "." not in score:
        raise SMTError(f"--methods: {name!r}: SMT has no score {score!r}; it has {', '.join(SCORES)}, dotted names")
    return Method(f"smt:{score}", family, score)


def check_installed(methods: Sequence[Method]) -> None:
    """Raise SMTError where a method needs a package that isn't there."""
    for method in methods:
        if method.family in PEFT_FAMILIES:
            require_peft(f"--methods {method.name}")


def size_of(method: Method, budget: float, model: nn.Module, config: SMTConfig) -> Size:
    """The size of ``method`` that is nearest to a budget.

    Args:
        method: the method.
        budget: share of all parameters.
        model: may be without weights (on the meta device).
        config: targets and block size; its budget and score aren't looked at.

    Raises:
        SMTError: the targets match nothing, or blocks don't divide them.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if method.family == "base":
        return Size(0)
    if method.family == "full":
        return Size(total)
    _, grids = plan_grids(model, config)
    if method.family == "smt":
        return _blocks(method, budget * total, list(grids.values()))
    return _rank(method, budget * total, [(grid.rows, grid.cols) for grid in grids.values()])


def _blocks(method: Method, wanted: float, grids: list[BlockGrid]) -> Size:
    elements = grids[0].block_rows * grids[0].block_cols
    blocks = max(1, round(wanted / elements))
    per_weight: Callable[[BlockGrid], int] = (
        (lambda grid: len(diagonal(grid)))
        if method.score == "diagonal"
        else (lambda grid: grid.shape[0] * grid.shape[1])
    )
    available = sum(map(per_weight, grids))
    if blocks > available:
        what = "the targets' diagonals have" if method.score == "diagonal" else "the targets have"
        return Size(0, problem=f"{what} {available} blocks, the budget is {blocks}")
    return Size(blocks * elements, blocks)


def _rank(method: Method, wanted: float, shapes: list[tuple[int, int]]) -> Size:
    sides = sum(rows + cols for rows, cols in shapes)
    # DoRA trains the length of every row of a weight besides.
    fixed = sum(rows for rows, _ in shapes) if method.family == "dora" else 0
    rank = max(1, round((wanted - fixed) / sides))
    if method.family == "shira":
        largest = min(rows * cols // (rows + cols) for rows, cols in shapes)
        what = "more elements than a target has"
    else:
        largest, what = min(min(shape) for shape in shapes), "more than a target's short side"
    if rank > largest:
        return Size(0, problem=f"rank {rank} is {what}; at most {largest}")
    return Size(rank * sides + fixed, rank)
