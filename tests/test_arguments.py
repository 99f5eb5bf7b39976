"""A Trainer flag works with SMT or is refused by name: none is ignored."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from transformers import HfArgumentParser

from smt_dist.cli.program import raise_usage_error
from smt_dist.engines import ENGINES
from smt_dist.engines.fsdp2_units import UNITS
from smt_dist.errors import SMTError
from smt_dist.training.arguments import DTYPES, SMTTrainingArguments, prepare_deepspeed_config
from smt_dist.training.run_arguments import RunArguments

REFUSED = {
    "auto_find_batch_size": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "push_to_hub": True,
    "fp16": True,
    "bf16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 25,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "fsdp": "full_shard",
    "parallelism_config": object(),
    "enable_jit_checkpoint": True,
    "optim_target_modules": "all-linear",
    "save_on_each_node": True,
    "label_smoothing_factor": 0.1,
    "do_predict": True,
}


def make(tmp_path, **flags) -> SMTTrainingArguments:
    return SMTTrainingArguments(output_dir=str(tmp_path), **flags)


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_cannot_be_honoured_is_refused_by_name(tmp_path, name):
    """An ignored flag is a run that isn't what its command line says."""
    with pytest.raises(SMTError, match=f"^--{name} can't be used with SMT: .") as caught:
        make(tmp_path, **{name: REFUSED[name]})
    assert len(str(caught.value).splitlines()) == 1


def test_every_refusal_is_tested_here():
    """A flag added to the table without a test could be misspelt, and would then refuse nothing."""
    from smt_dist.training.arguments import _REFUSED

    assert set(_REFUSED) == set(REFUSED)
    assert set(_REFUSED) <= set(SMTTrainingArguments.__dataclass_fields__)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"optim": "adafactor"}, "--optim: 'adafactor'"),
        ({"optim": "sgd"}, "--optim: 'sgd'"),
        ({"dtype": "float16"}, "--dtype: 'float16'"),
        ({"dtype": "bf16"}, "--dtype: 'bf16'"),
        ({"engine": "fsdp"}, "--engine: 'fsdp'"),
        ({"engine": "ddp", "dp_replicate_size": 2}, "--dp_replicate_size belongs to --engine fsdp2"),
        ({"engine": "ddp", "cpu_offload": True}, "--cpu_offload belongs to --engine fsdp2"),
        ({"engine": "fsdp2", "dp_replicate_size": 2}, "--dp_replicate_size: 2 doesn't divide the 1 ranks"),
        ({"engine": "fsdp2", "dp_replicate_size": 0}, "--dp_replicate_size: 0"),
        ({"engine": "fsdp2", "cpu_offload": True}, "--cpu_offload: there is no GPU"),
        ({"engine": "fsdp2", "deepspeed": {"zero_optimization": {"stage": 2}}}, "--engine fsdp2 together with"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}, "reduce_dtype": "bfloat16"}, "communication_data_type"),
        ({"reduce_dtype": "float16"}, "--reduce_dtype: 'float16'"),
        ({"optim": "torch.optim.Muon"}, "--optim: torch.optim.Muon"),
        ({"optim": "torch.optim.SGD", "optim_args": "speed=3"}, "--optim: torch.optim.*speed"),
        ({"optim": "torch.optim.Rprop", "weight_decay": 0.1}, "--weight_decay: torch.optim.Rprop has none"),
        ({"optim": "torch.optim.AdamW", "optim_args": "lr=0.1"}, "--optim_args: 'lr=0.1'.*--learning_rate"),
        (
            {"optim": "torch.optim.AdamW", "optim_args": "capturable=True"},
            "--optim: torch.optim.adamw.AdamW can't step",
        ),
        ({"optim_args": "betas=(0.9, 0.95)"}, "--optim_args: adamw_torch.* takes --adam_beta1"),
        ({"engine": "deepspeed"}, "--engine deepspeed needs --deepspeed"),
        ({"engine": "ddp", "deepspeed": "ds.json"}, "--engine ddp together with --deepspeed"),
        ({"average_tokens_across_devices": False}, "--average_tokens_across_devices"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs",
        ),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": "{"}, "--gradient_checkpointing_kwargs"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": "[]"}, "--gradient_checkpointing_kwargs"),
        ({"lr_scheduler_type": "nonsense"}, "nonsense"),
        ({"report_to": "nonsense"}, "--report_to: 'nonsense'"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size: 0"),
        ({"per_device_eval_batch_size": -1}, "--per_device_eval_batch_size: -1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps: 0"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers: -1"),
        ({"learning_rate": -1.0}, "--learning_rate: -1.0"),
        ({"learning_rate": float("nan")}, "--learning_rate: nan"),
        ({"weight_decay": -0.1}, "--weight_decay: -0.1"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "steps"}, "load_best_model_at_end"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(tmp_path, flags, field):
    """Also what TrainingArguments itself finds wrong."""
    with pytest.raises(SMTError, match=field) as caught:
        make(tmp_path, **flags)
    assert len(str(caught.value).splitlines()) == 1


CHOICES = {
    "engine": ("auto", *ENGINES),
    "fsdp2_units": UNITS,
    "dtype": tuple(DTYPES),
    "reduce_dtype": tuple(DTYPES),
    "prompt_style": ("plain", "chat"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_flag_of_few_values_shows_them_and_refuses_others_in_one_wording(tmp_path, name):
    """On the command line, in --help, and where Python makes the arguments, which checks no type."""
    parser = HfArgumentParser([RunArguments, SMTTrainingArguments])
    parser.error = raise_usage_error
    assert f"--{name} {{{','.join(CHOICES[name])}}}" in " ".join(parser.format_help().split())
    refusal = f"--{name}: 'x' is not one of {', '.join(CHOICES[name])}"
    with pytest.raises(SMTError) as caught:
        parser.parse_known_args([f"--{name}", "x"])
    assert str(caught.value) == f"{refusal} (see --help)"
    flags, of_the_run = {name: "x"}, name == "prompt_style"
    made_by = RunArguments(gguf_file="f", **flags).check if of_the_run else partial(make, tmp_path, **flags)
    with pytest.raises(SMTError) as caught:
        made_by()
    assert str(caught.value) == refusal


def test_the_defaults_are_the_documented_ones(tmp_path):
    """bf16 base, engine chosen by --deepspeed, NaN losses shown, no weight decay (it pulls blocks to zero)."""
    args = make(tmp_path)
    assert (args.engine, args.dtype, args.base_dtype) == ("ddp", "bfloat16", torch.bfloat16)
    assert args.logging_nan_inf_filter is False
    assert args.weight_decay == 0
    assert not args.bf16
    assert args.filled_deepspeed_config() is None


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_never_reentrant(tmp_path, flag):
    """Re-entrant checkpointing gives no gradient where a layer's input is frozen: blocks would never move."""
    args = make(tmp_path, **{flag: True})
    kwargs = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs
    assert kwargs["use_reentrant"] is False
    assert args.activation_checkpointing


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": False}}, "bf16.enabled"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage"),
        ({"zero_optimization": {}}, "zero_optimization.stage"),
        ({"zero_optimization": 2}, "zero_optimization"),
        ({"bf16": True}, "bf16"),
        ({"fp16": False}, "fp16"),
        ({"optimizer": "AdamW"}, "optimizer"),
        ([], "expected a JSON object"),
    ],
    ids=str,
)
def test_a_deepspeed_section_that_contradicts_is_refused_by_file_and_name(tmp_path, content, field):
    """DeepSpeed itself ignores or overrides some of these without a word."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SMTError, match=field) as caught:
        prepare_deepspeed_config(str(path), torch.bfloat16)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [None, "", "{", "{'stage': 2}"], ids=["missing", "empty", "cut", "python"])
def test_a_deepspeed_file_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    """Both a wrong path and a broken file."""
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SMTError) as caught:
        make(tmp_path, deepspeed=str(path))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_deepspeed_config_is_completed_and_the_given_one_left_alone(dtype):
    """fp32 gradients under bf16: without it small block gradients are lost in the reduction."""
    given = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}
    before = json.dumps(given)
    config = prepare_deepspeed_config(given, dtype)
    assert json.dumps(given) == before
    assert config["zero_optimization"]["stage"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["bf16"]["enabled"] is (dtype == torch.bfloat16)
    assert (config.get("data_types", {}).get("grad_accum_dtype") == "fp32") is (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("engine", "form", "refused"),
    [
        ("ddp", "in_place", False),
        ("fsdp2", "in_place", False),
        ("deepspeed", "auto", False),
        ("deepspeed", "additive", False),
        ("deepspeed", "in_place", True),
    ],
)
def test_a_form_that_the_engine_can_not_have_is_refused_by_name(tmp_path, engine, form, refused):
    """DeepSpeed would go on sharing deltas, which nobody writes into the weights."""
    args = SMTTrainingArguments(output_dir=str(tmp_path), engine="ddp")
    args.engine = engine
    if not refused:
        args.refuse_form(form)
        return
    with pytest.raises(SMTError, match=r'form in_place: DeepSpeed .* use "auto", or --engine ddp or fsdp2'):
        args.refuse_form(form)
