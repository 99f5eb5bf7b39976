"""A score function of the user's gets what it takes, runs no more than that, and is told what is wrong with it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, RoutedModel

from smt_dist import SMTConfig, collect_scores, select_blocks
from smt_dist.errors import SMTError


def make_config(function: str) -> SMTConfig:
    group = {"name": "g", "target_modules": ["shared"], "blocks": 3}
    score = f"custom_functions.{function}" if "." not in function else function
    selection = {"score": score, "strategy": "no_restriction"}
    return SMTConfig.model_validate(
        {"block_size": 4, "groups": [group], "selection": selection, "warmup": {"steps": 2}}
    )


def make_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 2, 9), generator=generator)
    return [{"input_ids": batch, "labels": batch} for batch in ids]


class Counted(RoutedModel):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = 0

    def forward(self, input_ids, labels):
        self.forwards += 1
        outputs = super().forward(input_ids, labels)
        if outputs.loss.requires_grad:
            outputs.loss.register_hook(lambda _: setattr(self, "backwards", self.backwards + 1))
        return outputs


@pytest.mark.parametrize(
    ("function", "forwards", "backwards"), [("by_name", 0, 0), ("inputs_only", 2, 0), ("gradient_only", 2, 2)]
)
def test_no_more_runs_than_a_function_takes(function, forwards, backwards):
    """A backward for nothing is most of a warm-up's time and memory."""
    model = Counted()
    scores = collect_scores(model, make_batches(), make_config(function))
    assert (model.forwards, model.backwards) == (forwards, backwards)
    assert scores.score == f"custom_functions.{function}"


def test_a_function_decides_the_choice():
    """The deepest of the three layers has 16 blocks, and the function likes depth."""
    config = make_config("by_name")
    assert list(select_blocks(collect_scores(RoutedModel(), (), config), config).blocks) == ["layers.2.shared"]


def test_the_gradient_is_the_one_that_the_built_in_scores_see():
    """A function and a built-in score of the same formula must agree."""
    config = make_config("gradient_only")
    built_in = config.model_copy(update={"selection": config.selection.model_copy(update={"score": "abs_mean"})})
    ours = collect_scores(RoutedModel(), make_batches(), config).tables
    theirs = collect_scores(RoutedModel(), make_batches(), built_in).tables
    for module, table in ours.items():
        torch.testing.assert_close(table, theirs[module], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (
            "transposed",
            r"custom_functions.transposed, layers.0.shared: the result has shape \(4, 5\), expected \(4, 4",
        ),
        ("not_a_number", r"custom_functions.not_a_number, layers.0.shared: the score of block \(3, 0\) is not finite"),
        ("no_tensor", r"custom_functions.no_tensor, layers.0.shared: the result is not a tensor"),
        ("wants_more", r"custom_functions.wants_more requires an argument 'hessian'; use only module, grid, weight"),
        ("absent", r"custom_functions.absent can't be imported"),
        ("nowhere.at_all", r"nowhere.at_all can't be imported"),
        ("not_a_function", r"custom_functions.not_a_function is not a function"),
    ],
)
def test_a_wrong_function_ends_in_one_line_that_names_it_and_the_module(function, named):
    """Deep inside a warm-up of an hour, a traceback says neither which module nor what was expected."""
    with pytest.raises(SMTError, match=named) as caught:
        collect_scores(RoutedModel(), make_batches(), make_config(function))
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_score_lists_the_names():
    """The commonest mistake is a spelling one."""
    with pytest.raises(SMTError, match=r"selection.score: expected one of abs_mean, .*, grad_x_weight, activation"):
        SMTConfig.from_json('{"selection": {"score": "absmean"}}')


def test_scores_that_are_no_gradients_are_refused_for_full_fine_tuning():
    """That warm-up exists to reproduce the authors', who score gradients; a moved base for nothing is a loss."""
    with pytest.raises(
        SMTError, match=r"warmup.mode full_ft scores its gradients: selection.score 'magnitude' is none"
    ):
        SMTConfig.from_json('{"selection": {"score": "magnitude"}, "warmup": {"mode": "full_ft"}}')


def test_inputs_of_an_embedding_are_refused():
    """Token ids have no columns."""
    group = {"target_modules": ["embedding"], "blocks": 1}
    config = SMTConfig.model_validate({"block_size": 4, "groups": [group], "selection": {"score": "activation"}})
    with pytest.raises(SMTError, match="the input of embedding are token ids, which have no columns"):
        collect_scores(RoutedModel(), make_batches(), config)


def test_tokens_in_an_order_of_their_own_are_refused_where_there_is_padding():
    """Experts see some tokens only: whether one is padding can't be told, and counting it would depend on the batch."""

    class Masked(RoutedModel):
        def forward(self, input_ids, labels, attention_mask):  # noqa: ARG002
            return super().forward(input_ids, labels)

    group = {"target_modules": r"layers\.\d+\.experts\.\d+", "blocks": 1}
    content = {"block_size": 4, "groups": [group], "selection": {"score": "activation"}, "warmup": {"steps": 1}}
    config = SMTConfig.model_validate(content)
    (batch, _), mask = make_batches(), torch.ones(2, 9, dtype=torch.int64)
    collect_scores(Masked(), [{**batch, "attention_mask": mask}], config)
    mask[0, -1] = 0
    with pytest.raises(SMTError, match=r"layers\.0\.experts\.\d gets tokens in another order than the batch"):
        collect_scores(Masked(), [{**batch, "attention_mask": mask}], config)


def test_padding_of_packed_rows_is_the_segment_without_labels():
    """Packed rows have no mask; their padding's positions start over at 0 like any row's."""
    from smt_dist.selection.activations import real_tokens

    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]])
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100, -100], [-100, 8, -100, -100, -100, -100, 9]])
    expected = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    assert torch.equal(real_tokens({"position_ids": positions, "labels": labels}), expected)


def test_a_builtin_that_does_not_name_its_arguments_is_refused():
    """Python can't say what it takes; a traceback wouldn't either."""
    with pytest.raises(SMTError, match=r"math\.hypot has no readable signature"):
        collect_scores(RoutedModel(), make_batches(), make_config("math.hypot"))


@pytest.mark.parametrize("score", ["activation", "custom_functions.inputs_only"])
def test_a_profiler_sees_every_step_of_forwards_too(score):
    """It records some first steps: told of none, it would record them all, and a long warm-up would fill the memory."""
    told: list[int] = []
    config = make_config("inputs_only").model_copy(
        update={"selection": make_config("inputs_only").selection.model_copy(update={"score": score})}
    )
    collect_scores(RoutedModel(), make_batches(), config, observe=lambda _, done: told.append(done))
    assert told == [0, 1, 2]
