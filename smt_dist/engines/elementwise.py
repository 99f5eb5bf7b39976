"""Decide which optimizers may work on slices.

These are those that update each element from that element's own history.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from smt_dist.errors import SMTError, first_line

# More elements than quantised optimizers (bitsandbytes) leave in fp32, cut where no quantisation block ends.
_SHAPE = (64, 128)
_CUT = 4321
_STEPS = 3
_LEARNING_RATE = 1e-2
_TOLERANCE = 1e-4  # of the update; the other order of sums makes 1e-7
_FEW = 2  # elements, for an optimizer whose results aren't compared
# torch's own that are elementwise whatever their options: tests/test_elementwise.py tries each of them out. At run time
# only their options are tried, which also goes under fake tensors, whose values can't be compared.
ELEMENTWISE = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)


def optimizer_class_by_name(name: str) -> type[torch.optim.Optimizer]:
    """Import an optimizer class by its dotted name, such as ``torch.optim.Adagrad``.

    Raises SMTError, naming it.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SMTError(f"--optim: {name} can't be imported ({first_line(error)})") from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise SMTError(f"--optim: {name} is not a torch optimizer class")
    return found


def parse_options(text: str | None) -> dict[str, Any]:
    """Parse ``"momentum=0.9, betas=(0.9, 0.95)"`` as keyword arguments.

    Raises SMTError, naming ``--optim_args``.
    """
    try:
        call = ast.parse(f"f({text or ''})", mode="eval").body
        assert isinstance(call, ast.Call)
        if not isinstance(call.func, ast.Name) or call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError("expected name=value, ...")
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if taken := sorted({"lr", "weight_decay"} & set(options)):
            raise ValueError(f"{taken[0]} has a flag of its own: --learning_rate, --weight_decay")
        return options
    except (SyntaxError, ValueError, TypeError, AssertionError) as error:
        raise SMTError(f"--optim_args: {text!r} can't be read ({first_line(error)})") from None


def refuse_unless_elementwise(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Refuse an optimizer that sharding would change, or that doesn't take its options.

    Those of :data:`ELEMENTWISE` step a few elements, which shows whether they take their options; every other one is
    tried out (:func:`try_slices`).

    Raises:
        SMTError: it isn't elementwise, or doesn't take the options; names the class.
    """
    if optimizer_class in ELEMENTWISE:
        _stepped(optimizer_class, options, [torch.ones(_STEPS + 1, _FEW)])
    else:
        try_slices(optimizer_class, options)


def try_slices(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Try an optimizer on a matrix and on its elements in two flat pieces.

    That is what sharding does to it, and both results must be equal. An optimizer that looks at rows, columns, norms or
    neighbours (Adafactor, LAMB, Muon, Shampoo, quantised states) or can't do without a closure (LBFGS) gives something
    else, or fails. Refused too is one whose state a checkpoint couldn't hold: kept in its parameter groups, or of
    another shape.

    Raises:
        SMTError: as :func:`refuse_unless_elementwise`.
    """
    numbers = torch.randn(_STEPS + 1, *_SHAPE, generator=torch.Generator().manual_seed(0))
    whole = _stepped(optimizer_class, options, [numbers])
    pieces = _stepped(optimizer_class, options, [numbers.flatten(1)[:, :_CUT], numbers.flatten(1)[:, _CUT:]])
    ended, name = whole.values(), _name(optimizer_class)
    if (ended - pieces.values()).norm() > _TOLERANCE * (ended - numbers[0].flatten()).norm():
        raise SMTError(f"{name} needs whole matrices: in slices it gives another result; it can't be sharded")
    if pieces.settings != _settings(pieces.optimizer):
        raise SMTError(f"{name} keeps state in its parameter groups, which a checkpoint wouldn't hold")
    for piece in pieces.parameters:
        for key, value in pieces.optimizer.state[piece].items():
            if not (value is None or is_counter(value) or is_moment(piece, value)):
                raise SMTError(f"{name} keeps {key!r}, which is neither a number nor one for each element")


def state_names(optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the sorted names of the moments and counters that an optimizer keeps after a step."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = optimizer_class([parameter], **options)
    _run(optimizer, [parameter], [[torch.ones(2)]])
    state = optimizer.state[parameter]
    moments = sorted(key for key, value in state.items() if is_moment(parameter, value))
    return moments, sorted(key for key, value in state.items() if is_counter(value))


def is_moment(parameter: torch.Tensor, value: Any) -> bool:
    """Return whether a value of an optimizer's state has one entry per element of ``parameter``."""
    return torch.is_tensor(value) and value.dim() == 1 and value.shape == parameter.shape


def is_counter(value: Any) -> bool:
    """Return whether a value of an optimizer's state is one number for all elements.

    An example is ``step``.
    """
    return isinstance(value, int | float) or (torch.is_tensor(value) and value.dim() == 0)


def counter_value(value: Any) -> int | float:
    """Return a counter as JSON holds it, without losing a bit."""
    return value if isinstance(value, int) else float(value)


def counter_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, counters: dict[str, int | float]
) -> dict[str, Any]:
    """Return counters in the form in which ``optimizer`` keeps them.

    torch's own optimizers keep tensors, DeepSpeed's and others' whole numbers.
    """
    library = type(optimizer).__module__.partition(".")[0]
    # Fused kernels need their counters on the parameter's device, the others on the CPU.
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    device = parameter.device if beside else "cpu"

    def kept(value: int | float) -> Any:
        if library == "deepspeed" or (library != "torch" and isinstance(value, int)):
            return int(value)
        return torch.tensor(value, dtype=torch.float32, device=device)

    return {key: kept(value) for key, value in counters.items()}


class _Stepped(NamedTuple):
    """Hold an optimizer that has made its steps.

    Attributes:
        optimizer: it.
        parameters: what it stepped.
        settings: of its groups, before the first step.
    """

    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    settings: list[dict[str, str]]

    def values(self) -> torch.Tensor:
        """Return all parameters end to end."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])


def _stepped(
    optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any], numbers: list[torch.Tensor]
) -> _Stepped:
    """Step from the first row of each of ``numbers``, with its other rows as gradients."""
    # Steps that rounding can't hide, whatever the learning rate of the run.
    options = options | ({"lr": _LEARNING_RATE} if "lr" in options else {})
    try:
        parameters = [nn.Parameter(rows[0].clone()) for rows in numbers]
        optimizer = optimizer_class(parameters, **options)
        result = _Stepped(optimizer, parameters, _settings(optimizer))
        _run(optimizer, parameters, zip(*(rows[1:] for rows in numbers), strict=True))
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        name = _name(optimizer_class)
        raise SMTError(f"{name} can't step the blocks in slices ({first_line(error)})") from None
    return result


def _name(optimizer_class: type[torch.optim.Optimizer]) -> str:
    return f"--optim: {optimizer_class.__module__}.{optimizer_class.__qualname__}"


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    return [{key: repr(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _run(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: Iterable[Sequence[torch.Tensor]]
) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
