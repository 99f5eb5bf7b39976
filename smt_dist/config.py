"""Define ``SMTConfig``, the pydantic model of the ``--smt_config`` JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from smt_dist.errors import SMTError
from smt_dist.files import parse_json, read_text, shorten

# Grouped by what they need: gradients, forwards only, or no batch.
GRADIENT_SCORES = (
    *("abs_mean", "mean_abs", "l1", "l2"),
    *("abs_mean_per_step", "mean_abs_per_step", "l1_per_step", "l2_per_step"),
)
SALIENCY, ACTIVATION = "grad_x_weight", "activation"
DATA_FREE_SCORES = ("magnitude", "random", "diagonal")
SCORES = (*GRADIENT_SCORES, SALIENCY, ACTIVATION, *DATA_FREE_SCORES)
_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
Strategy = Literal["even", "no_restriction", "norm_dist"]

MAX_AUTO_BLOCK_SIZE = 256
MAX_BLOCK_SIDE = 65536
DEFAULT_FRACTION = 0.0084
MAX_SEED = 2**32 - 1  # numpy's and transformers' limit


class _Strict(BaseModel):
    # A field with a former name is saved under that name, so that every version can read the files.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, serialize_by_alias=True)


class GroupConfig(_Strict):
    """Describe one group of target weights and its budget.

    Attributes:
        name: shown in logs and files; unique in the config.
        target_modules: ``"attention"`` (query, key and value projections, fused ones included), ``"mlp"``,
            a module name such as ``"o_proj"``, a regular expression that matches whole module names, or a
            list of such entries, each of which must match a module. A name matches the last parts of a module's
            full name.
        fraction: the budget as a share of the model's 2-D parameters, embeddings and head included, tied
            ones counted once (as the SMT authors count). Default 0.0084.
        blocks: the budget as a number of blocks, instead of ``fraction``.
        lr_multiplier: factor on the learning rate for this group's blocks.
    """

    name: str = Field(default="attention", min_length=1)
    target_modules: str | list[str] = "attention"
    fraction: float | None = Field(default=None, gt=0, le=1, strict=True)
    blocks: int | None = Field(default=None, ge=1, strict=True)
    lr_multiplier: float = Field(default=1.0, gt=0, allow_inf_nan=False, strict=True)

    @field_validator("target_modules")
    @classmethod
    def _targets_not_empty(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all(value):
            raise ValueError("must name at least one module")
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if data.get("fraction") is not None and data.get("blocks") is not None:
                raise ValueError("give 'fraction' or 'blocks', not both")
            if data.get("fraction") is None and data.get("blocks") is None:
                return {**data, "fraction": DEFAULT_FRACTION}
        return data

    def budget(self, parameters_2d: int, block_elements: int) -> int:
        """Return the number of blocks to select, rounded down.

        Args:
            parameters_2d: elements of all 2-D parameters of the model.
            block_elements: elements of one block.

        Raises:
            SMTError: the budget is smaller than one block.
        """
        if self.blocks is not None:
            return self.blocks
        assert self.fraction is not None
        # Without the small term, rounding would take one block off a fraction such as 3 / 10 of 10 blocks.
        count = math.floor(self.fraction * parameters_2d / block_elements + 1e-9)
        if count < 1:
            raise SMTError(
                f"smt config groups[{self.name}].fraction: {self.fraction} of {parameters_2d:,} parameters is less "
                f"than one block of {block_elements:,}; use at least {_round_up(block_elements / parameters_2d)}"
            )
        return count


def _round_up(value: float) -> float:
    """Round up to two significant digits, so that the limit in a message is one that works."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


class SelectionConfig(_Strict):
    """Choose how blocks are ranked and selected.

    Attributes:
        score: one of :data:`SCORES`, or the dotted name of your own function
            (:mod:`smt_dist.selection.custom_scores`). From the gradient ``G`` summed over the warm-up: ``mean_abs``,
            ``abs_mean``, ``l1``, ``l2``. The mean over steps of the score of each step's gradient: the same names with
            ``_per_step``. The mean of ``|G * weight|``: ``grad_x_weight``. From the layers' inputs: ``activation``.
            From the weight alone: ``magnitude``. From neither data nor weights: ``random`` and ``diagonal``.
        strategy: ``even`` takes equally many blocks from every weight, or all of a smaller one, and the rest by
            score. ``no_restriction`` takes the budget's best blocks over all its weights (as the paper does).
            ``norm_dist`` takes equally many from every weight and the rest from the first weights; it fails if a
            weight has too few.
        budget: ``separate``: each group has its own budget. ``joint``: the groups' budgets are added up, and the
            strategy applies to the weights of all groups together.
        floor: the least number of blocks of each layer that has targets, within each budget. It needs the strategy
            ``no_restriction``, which is the default if a floor or a ceiling is given.
        ceiling: the largest number of blocks of each layer, likewise.
        bounds_per: what ``floor`` and ``ceiling`` apply to: a decoder ``layer`` (the modules whose names are equal up
            to the first number; any other module is a layer by itself), or a ``weight``.
        seed: seeds random choices (the ``random`` score, dropout while scoring).
    """

    score: str = "abs_mean"
    strategy: Strategy = "even"
    budget: Literal["separate", "joint"] = "separate"
    floor: int | None = Field(default=None, ge=1, strict=True)
    ceiling: int | None = Field(default=None, ge=1, strict=True)
    bounds_per: Literal["layer", "weight"] = "layer"
    seed: int = Field(default=0, ge=0, le=MAX_SEED, strict=True)

    @field_validator("score")
    @classmethod
    def _is_a_score(cls, value: str) -> str:
        if value not in SCORES and not _DOTTED_NAME.fullmatch(value):
            raise ValueError(f"expected one of {', '.join(SCORES)}, or a function's dotted name")
        return value

    @model_validator(mode="before")
    @classmethod
    def _bounds_choose_among_all(cls, values: Any) -> Any:
        """Make ``no_restriction`` the default strategy if ``floor`` or ``ceiling`` is given."""
        if not isinstance(values, dict) or (values.get("floor") is None and values.get("ceiling") is None):
            return values
        return {"strategy": "no_restriction", **values}

    @model_validator(mode="after")
    def _bounds_fit(self) -> SelectionConfig:
        bounded = self.floor is not None or self.ceiling is not None
        if bounded and self.strategy != "no_restriction":
            raise ValueError(
                f"'floor' and 'ceiling' need strategy no_restriction: {self.strategy} fixes each weight's number"
            )
        if self.floor is not None and self.ceiling is not None and self.floor > self.ceiling:
            raise ValueError(f"'floor' {self.floor} is above 'ceiling' {self.ceiling}")
        return self

    @property
    def is_custom(self) -> bool:
        """Return whether ``score`` is a function's dotted name."""
        return self.score not in SCORES

    @property
    def needs_batches(self) -> bool:
        """Return whether the score needs batches; True for every custom function."""
        return self.score not in DATA_FREE_SCORES


class WarmupConfig(_Strict):
    """Choose how blocks are scored before the selection; this isn't the learning-rate warm-up.

    Attributes:
        steps: global steps to score.
        mode: ``scoring`` (saved in files under its former name, ``probe``) changes no weight; ``full_ft`` runs real
            full fine-tuning, as the authors do.
        passes: how many times the batches are run, each time for another part of the layers. The accumulator
            of the elementwise scores shrinks by this factor and the time grows by it. ``scoring`` only.
    """

    steps: int = Field(default=100, ge=1, strict=True)
    mode: Literal["scoring", "full_ft"] = "scoring"
    passes: int = Field(default=1, ge=1, strict=True)

    @field_validator("mode", mode="before")
    @classmethod
    def _read_former_name(cls, value: Any) -> Any:
        return "scoring" if value == "probe" else value

    @field_serializer("mode")
    def _write_former_name(self, value: str) -> str:
        return "probe" if value == "scoring" else value

    @model_validator(mode="after")
    def _passes_need_still_weights(self) -> WarmupConfig:
        if self.mode == "full_ft" and self.passes > 1:
            raise ValueError("'passes' above 1 needs mode 'scoring': 'full_ft' changes the weights between passes")
        return self


class ReselectConfig(_Strict):
    """Drop and grow while training: freeze the weakest blocks and train as many new ones.

    The method follows RigL (arXiv 1911.11134) and SpIEL (arXiv 2401.16405). The weakest blocks have the smallest mean
    \\|delta\\|. The new ones have the best gradient score, in the current model, of all blocks that aren't trained.

    Attributes:
        every: optimizer steps between two re-selections; none happens at the last step.
        fraction: share of each budget's trained blocks to drop and grow, rounded down.
        steps: global steps whose gradients are scored.
        score: ranks the blocks to grow; one of :data:`GRADIENT_SCORES`.
    """

    every: int = Field(ge=1, strict=True)
    fraction: float = Field(gt=0, le=1, strict=True)
    steps: int = Field(default=4, ge=1, strict=True)
    score: str = "abs_mean"

    @field_validator("score")
    @classmethod
    def _is_a_gradient_score(cls, value: str) -> str:
        if value not in GRADIENT_SCORES:
            raise ValueError(f"expected one of {', '.join(GRADIENT_SCORES)}")
        return value


class NonFiniteConfig(_Strict):
    """Choose what happens after a step with NaN or infinity; its update is never applied.

    Attributes:
        policy: ``stop`` ends the run with an error; ``skip`` goes on with the next step's data.
        limit: with ``skip``, the most such steps in a row that are skipped; one more ends the run.
    """

    policy: Literal["stop", "skip"] = "stop"
    limit: int = Field(default=3, ge=1, strict=True)


class SMTConfig(_Strict):
    """Configure an SMT run, except for model, data and training arguments.

    Attributes:
        block_size: side of the square blocks, ``[rows, columns]``, or ``"auto"``: the largest size up to 256
            that divides both sides of every target.
        groups: the target weights and their budgets.
        selection: how blocks are ranked and selected.
        warmup: how blocks are scored before the selection.
        reselect: drop and grow blocks while training; None: never.
        form: where blocks lie. ``in_place``: inside the base's weight, which then computes them; only their gradients
            cost anything. ``additive``: beside it, for weights that can't be written. ``auto``: in place under ``ddp``
            and ``fsdp2`` wherever the weight is dense, floating and used by one module, else additive. It may differ
            from launch to launch.
        untie: allow a target whose weight is tied to another (an output head tied to the embedding). The
            tie is cut when the blocks are merged.
        non_finite: what happens after NaN or infinity in training; saved in files under its former name,
            ``bad_numbers``. It can differ between launches of one run. In the warm-up, NaN or infinity always ends
            the run.
    """

    block_size: int | tuple[int, int] | Literal["auto"] = 256
    groups: Annotated[list[GroupConfig], FailFast()] = Field(default_factory=lambda: [GroupConfig()], min_length=1)
    selection: SelectionConfig = SelectionConfig()
    warmup: WarmupConfig = WarmupConfig()
    reselect: ReselectConfig | None = None
    form: Literal["auto", "in_place", "additive"] = "auto"
    untie: bool = Field(default=False, strict=True)
    non_finite: NonFiniteConfig = Field(
        default=NonFiniteConfig(),
        validation_alias=AliasChoices("non_finite", "bad_numbers"),
        serialization_alias="bad_numbers",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, values: Any) -> Any:
        if isinstance(values, dict) and {"non_finite", "bad_numbers"} <= values.keys():
            raise ValueError("'non_finite' and 'bad_numbers' are two names of one key: give one of them")
        return values

    @model_validator(mode="after")
    def _full_ft_scores_gradients(self) -> SMTConfig:
        if self.warmup.mode == "full_ft" and self.selection.score not in GRADIENT_SCORES:
            raise ValueError(
                f"warmup.mode full_ft scores its gradients: selection.score {shorten(self.selection.score)!r} is none "
                f"of {', '.join(GRADIENT_SCORES)}; use mode scoring"
            )
        return self

    @field_validator("block_size", mode="before")
    @classmethod
    def _is_a_block_size(cls, value: Any) -> Any:
        def is_side(side: Any) -> bool:
            return isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= MAX_BLOCK_SIDE

        is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_side, value))
        if value != "auto" and not is_side(value) and not is_pair:
            raise ValueError(f'expected a side from 1 to {MAX_BLOCK_SIDE} such as 256, [rows, columns], or "auto"')
        return value

    @field_validator("groups")
    @classmethod
    def _names_are_unique(cls, value: list[GroupConfig]) -> list[GroupConfig]:
        seen: set[str] = set()
        for group in value:
            if group.name in seen:
                raise ValueError(f"two groups have the name {group.name!r}")
            seen.add(group.name)
        return value

    @classmethod
    def from_json_file(cls, path: str | Path) -> SMTConfig:
        """Load a config file.

        Raises:
            SMTError: the file is missing or isn't JSON, or a value is wrong; names the file and the field.
        """
        return cls.from_json(read_text(path), str(path))

    @classmethod
    def from_flag(cls, value: str | dict[str, Any]) -> SMTConfig:
        """Load the value of ``--smt_config``.

        Args:
            value: the path of a file, JSON text, or a mapping (from a recipe).

        Raises:
            SMTError: as :meth:`from_json_file`.
        """
        text = value if isinstance(value, str) else json.dumps(value)
        return cls.from_json(text, "--smt_config") if text.lstrip().startswith("{") else cls.from_json_file(text)

    @classmethod
    def from_json(cls, text: str, source: str = "smt config") -> SMTConfig:
        """Parse a config.

        Args:
            text: JSON.
            source: its name in messages.

        Raises:
            SMTError: ``text`` isn't JSON, or a value is wrong; names the source and the field.
        """
        return parse_model(cls, text, source)

    def to_json(self) -> str:
        """Return the config as JSON text, without fields that are None."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2) + "\n"

    def first_difference(self, other: SMTConfig) -> str | None:
        """Describe the first field that differs from ``other``, and both values; None if equal."""
        ours, theirs = (dict(_fields(config.model_dump(mode="json"))) for config in (self, other))
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                return f"{name} is {json.dumps(ours.get(name))}, was {json.dumps(theirs.get(name))}"
        return None


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every leaf; an empty section or list is a leaf."""
    if isinstance(value, dict) and value:
        for name, one in value.items():
            yield from _fields(one, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value:
        for index, one in enumerate(value):
            yield from _fields(one, f"{path}[{index}]")
    else:
        yield path, value


def parse_model(model: type[Any], text: str, source: str) -> Any:
    """Parse JSON ``text`` as the pydantic ``model``.

    Raises:
        SMTError: ``text`` isn't JSON or doesn't fit the model; one line with the source, the first wrong field, its
            value and what is accepted.
    """
    content = parse_json(text, source)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise SMTError(f"{source}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Describe the first problem of a pydantic error in one line: field, reason, value."""
    first = error.errors(include_url=False)[0]
    # A key can contain line breaks, which repr escapes.
    place = ".".join(shorten(repr(str(part))[1:-1]) for part in first["loc"]) or "top level"
    reason = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = "" if isinstance(value, dict) else f" (got {shorten(repr(value))})"
    if first["type"] == "extra_forbidden":
        reason, shown = "unknown key", ""
    return f"{place}: {reason}{shown}"
