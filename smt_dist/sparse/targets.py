"""Find the weights that a config names, by module type and name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from smt_dist.config import SMTConfig
from smt_dist.errors import SMTError
from smt_dist.sparse.embedding import SparseEmbedding
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.sharded import full_numel, full_shape

ALIASES: dict[str, tuple[str, ...]] = {
    # Query, key and value projections, separate or fused, as the architectures of transformers name them.
    "attention": (
        *("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen2, Gemma, OLMo, OPT, ...
        *(
            "qkv_proj",
            "query_key_value",
            "Wqkv",
            "W_pack",
            "c_attn",
            "att_proj",
        ),  # Phi-3, GPT-NeoX, Falcon, MPT, ...
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # DeepSeek
        *("query", "key", "value", "q_lin", "k_lin", "v_lin", "wq", "wk", "wv"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
        *("dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "w1", "w2", "w3"),
    ),
}


def find_targets(model: nn.Module, config: SMTConfig) -> dict[str, list[str]]:
    """Find the modules that each group trains, in the model's order.

    Args:
        model: before or after :func:`apply_selection`.
        config: gives the groups.

    Returns:
        Group name -> module names, as in the base model: a wrapped layer keeps its name.

    Raises:
        SMTError: a group matches nothing, matches what isn't a 2-D linear weight, or shares a module with
            another group; or a target is tied and ``config.untie`` is off. Names the group and the module.
    """
    groups: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for group in config.groups:
        names = _match(model, group.target_modules, f"smt config groups[{group.name}].target_modules")
        for name in names:
            if name in owner:
                raise SMTError(f"smt config groups: {name} belongs to both {owner[name]!r} and {group.name!r}")
            owner[name] = group.name
            _refuse_if_tied(model, name, config.untie)
        groups[group.name] = names
    return groups


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return the full (out, in) shape of a module's weight, also if ZeRO-3 has partitioned it."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    rows, cols = full_shape(module.weight)
    return rows, cols


def count_parameters_2d(model: nn.Module) -> int:
    """Count the elements of all 2-D parameters of the base.

    Embeddings and head are included; tied parameters count once, blocks don't count.
    """
    return sum(
        full_numel(parameter)
        for name, parameter in model.named_parameters()
        if len(full_shape(parameter)) == 2 and not name.endswith(".delta")
    )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) as in the base model; a ``SparseLayer`` takes the place of its base."""
    inside: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, SparseLayer):
            inside.add(f"{name}.base")
        yield name, module


def may_be_idle(module: str) -> bool:
    """Return whether a module's name is that of an expert, in a list inside a layer.

    An expert can get no token, and so no gradient, on some ranks. A collective that runs during the backward must not
    wait for its gradient.
    """
    return sum(part.isdigit() for part in module.split(".")) > 1


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` computes ``x @ weight^T`` with a 2-D weight of (out, in)."""
    weight = getattr(module, "weight", None)
    # A quantiser's packed weight can have another shape, and has no floating dtype.
    if not isinstance(weight, torch.Tensor) or (weight.is_floating_point() and len(full_shape(weight)) != 2):
        return False
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def is_embedding(module: nn.Module) -> bool:
    """Return whether ``module`` looks up rows of its weight and returns them unchanged."""
    if isinstance(module, SparseEmbedding):
        return True
    # A subclass with another forward can scale rows or shift positions.
    plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return plain and module.max_norm is None


def takes_blocks(module: nn.Module) -> bool:
    """Return whether blocks of ``module``'s weight can be trained."""
    return is_linear(module) or is_embedding(module)


def _match(model: nn.Module, target: str | list[str], field: str) -> list[str]:
    """Return the modules that the entries match, in the model's order; each must match one."""
    entries = [target] if isinstance(target, str) else target
    found = {entry: _match_one(model, _matcher(entry)) for entry in entries}
    for entry, names in found.items():
        if not names:
            raise SMTError(
                f"{field}: {entry!r} matches no linear module of {type(model).__name__}; it has {_examples(model)}"
            )
    wanted = set().union(*found.values())
    return [name for name, _ in base_modules(model) if name in wanted]


def _match_one(model: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    matched = []
    for name, module in base_modules(model):
        if wanted(name):
            if takes_blocks(module):
                matched.append(name)
            elif any(len(full_shape(parameter)) >= 2 for parameter in module.parameters(recurse=False)):
                _refuse_module(name, module)
        for leaf, parameter in module.named_parameters(recurse=False):
            # Fused experts are one parameter [experts, out, in] of one module.
            if len(full_shape(parameter)) > 2 and wanted(f"{name}.{leaf}"):
                _refuse_parameter(f"{name}.{leaf}", parameter)
    return matched


def _matcher(entry: str) -> Callable[[str], bool]:
    if entry not in ALIASES and not re.fullmatch(r"[\w.]+", entry):
        try:
            pattern = re.compile(entry)
        except re.error as error:
            raise SMTError(f"smt config target_modules: {entry!r} is not a regular expression ({error})") from None
        return lambda name: pattern.fullmatch(name) is not None
    names = ALIASES.get(entry, (entry,))
    return lambda name: any(name == wanted or name.endswith(f".{wanted}") for wanted in names)


def _refuse_module(name: str, module: nn.Module) -> None:
    raise SMTError(f"smt config target_modules: {name} {why_no_blocks(module)}; take it out of target_modules")


def why_no_blocks(module: nn.Module) -> str:
    """Return why blocks of ``module`` can't be trained, as text to follow its name in a message."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return f"is a {kind}, which changes the rows that it looks up (scale, norm or position), unsupported for blocks"
    return f"is a {kind}, neither a linear layer with a weight of (out, in) nor an embedding"


def _refuse_parameter(name: str, parameter: torch.Tensor) -> None:
    shape = full_shape(parameter)
    raise SMTError(
        f"smt config target_modules: {name} has {len(shape)} dimensions {shape} (fused experts); only 2-D weights can "
        "be cut into blocks: take it out of target_modules"
    )


def tied_parameter_names(model: nn.Module, module_name: str) -> list[str]:
    """Return the other names of the weight of ``module_name`` (an embedding tied to the head)."""
    weight = model.get_submodule(module_name).weight
    own = {f"{module_name}.weight", f"{module_name}.base.weight", f"{module_name}.base.base.weight"}
    return [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and name not in own
    ]


def _refuse_if_tied(model: nn.Module, name: str, untie: bool) -> None:
    others = [] if untie else tied_parameter_names(model, name)
    if others:
        raise SMTError(
            f'smt config target_modules: {name} is tied to {others[0]}; set "untie": true to cut the tie when the '
            "blocks are merged, or take it out"
        )


def _examples(model: nn.Module) -> str:
    leaves = dict.fromkeys(name.rpartition(".")[2] for name, module in base_modules(model) if is_linear(module))
    return ", ".join(list(leaves)[:12]) or "none"
