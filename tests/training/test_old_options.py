"""Options that TRL, transformers and alignment-handbook have dropped are refused with what to write instead."""

import dataclasses
import re

import pytest
import yaml

from sampo import SamPOConfig, SamPOTrainer
from sampo.commands import train
from sampo.commands.options import make_parser
from sampo.config_checks import LOSS_TYPES
from sampo.old_options import OLD_LOSSES, OLD_OPTIONS

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}
HANDBOOK = {
    "model_name_or_path": "model",
    "torch_dtype": "bfloat16",
    "use_flash_attention_2": True,
    "dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0},
    "dataset_splits": ["train_prefs", "test_prefs"],
    "preprocessing_num_workers": 12,
    "beta": 0.01,
    "evaluation_strategy": "steps",
    "hub_model_revision": "v1",
    "max_length": 1024,
    "max_prompt_length": 512,
    "rpo_alpha": 0.5,
    "overwrite_output_dir": True,
    "warmup_ratio": 0.1,
}

# Fields of `DPOConfig` up to TRL 0.28 and of `TrainingArguments` up to transformers 4.57 that are no more.
GONE = """
base_model_attribute_name force_use_ref_model generate_during_eval label_pad_token_id max_completion_length
max_prompt_length model_adapter_name ref_adapter_name ref_model_init_kwargs reference_free rpo_alpha tools
use_logits_to_keep padding_value is_encoder_decoder fp16_backend fp16_opt_level group_by_length half_precision_backend
include_inputs_for_metrics include_tokens_per_second jit_mode_eval logging_dir mp_parameters no_cuda
overwrite_output_dir past_index per_gpu_eval_batch_size per_gpu_train_batch_size push_to_hub_model_id
push_to_hub_organization push_to_hub_token ray_scope save_safetensors tpu_metrics_debug tpu_num_cores torchdynamo
use_legacy_prediction_loop use_mps_device warmup_ratio fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap adafactor
evaluation_strategy
"""


@pytest.fixture(scope="module")
def present() -> set[str]:
    return {field.name for kind in make_parser().dataclass_types for field in dataclasses.fields(kind)}


def test_no_old_option_is_present_and_every_successor_is(present):
    assert len(OLD_OPTIONS) >= 70
    assert not OLD_OPTIONS.keys() & present
    for name, successor in OLD_OPTIONS.items():
        assert set(successor.options) <= present, name
        named = re.findall(r"`(\w+)(?::[^`]*)?`", successor())
        assert set(successor.options) <= set(named), name
        assert not (set(named) - {name}) & OLD_OPTIONS.keys(), name  # nobody is sent from one old option to the next


def test_every_option_of_trl_and_transformers_that_is_now_gone_has_an_entry(present):
    assert set(GONE.split()) <= OLD_OPTIONS.keys() | present


def test_what_is_to_be_written_is_accepted(tmp_path):
    tried = 0
    for name, successor in OLD_OPTIONS.items():
        said = successor(0.1 if name in ("warmup_ratio", "rpo_alpha") else True)
        written = (
            yaml.safe_load("\n".join(re.findall(r"`(\w+: [^`]*)`", said if said.startswith("Write") else ""))) or {}
        )
        if written.keys() <= SamPOConfig.__dataclass_fields__.keys():
            SamPOConfig(output_dir=str(tmp_path), **{**QUIET, "eval_steps": 1, **written})
            tried += bool(written)
    assert tried >= 10


def refusal(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        train.start(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_handbook_recipe_is_refused_once_with_all_successors(tmp_path, capsys):
    path = tmp_path / "dpo.yaml"
    path.write_text(yaml.safe_dump(HANDBOOK))
    said = refusal(["--config", str(path), "--no_cuda", "true"], capsys)
    for name in HANDBOOK.keys() & OLD_OPTIONS.keys():
        assert f"`{name}` in {path} is no option. " in said
    assert said.count(" is no option. ") == 12
    assert "Write `dataset_name: HuggingFaceH4/ultrafeedback_binarized`." in said
    assert "Write `dataset_train_split: train_prefs` and `dataset_test_split: test_prefs`." in said
    assert "Write `loss_type: [sigmoid, sft]` with `loss_weights: [1.0, 0.5]`" in said
    assert "Write `warmup_steps: 0.1`" in said
    assert "It is now `dtype`." in said
    assert "`--no_cuda` is no option. It is now `use_cpu`." in said
    assert "Did you mean" not in said


@pytest.mark.parametrize(
    ("mixer", "written"),
    [
        ({"a": 1}, "`dataset_name: a`"),
        ({"a": 0.5}, "`datasets: [{path: a, split: 'train[:50%]'}]`"),
        ({"a": 1.0, "b": 0.25}, "`datasets: [{path: a}, {path: b, split: 'train[:25%]'}]`"),
        ("a", "or `datasets: [{path: ID}, {path: ID}]` for several"),
        (None, "or `datasets: [{path: ID}, {path: ID}]` for several"),
    ],
)
def test_a_mixer_becomes_the_option_that_loads_the_same_rows(mixer, written):
    said = OLD_OPTIONS["dataset_mixer"](mixer)
    assert written in said
    if (found := re.search(r"`datasets: (.*)`\.$", said)) and isinstance(mixer, dict):
        paths = [part["path"] for part in yaml.safe_load(found[1])]
        assert paths == list(mixer)


def test_in_python_the_config_names_all_old_options(tmp_path):
    with pytest.raises(TypeError, match=r"SamPOConfig: \(1\) `rpo_alpha` is no longer .*1\.0, 2\.0.* \(2\) `no_cuda`"):
        SamPOConfig(output_dir=str(tmp_path), rpo_alpha=2.0, no_cuda=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rpo_alfa'"):
        SamPOConfig(output_dir=str(tmp_path), rpo_alfa=2.0)

    class Mine(SamPOConfig):
        pass

    with pytest.raises(TypeError, match=r"`evaluation_strategy` is no longer an option\. It is now `eval_strategy`"):
        Mine(output_dir=str(tmp_path), evaluation_strategy="steps")
    config = SamPOConfig(output_dir=str(tmp_path), beta=0.2, **QUIET)
    assert dataclasses.replace(config, beta=0.3).beta == 0.3


def test_in_python_the_trainer_names_what_became_an_option_of_the_config(tmp_path):
    with pytest.raises(TypeError, match=r"It is now `processing_class`\. `beta` is an option of `SamPOConfig`"):
        SamPOTrainer("model", tokenizer=object(), beta=0.1)
    with pytest.raises(TypeError, match="`max_prompt_length` is no longer an option"):
        SamPOTrainer("model", max_prompt_length=128)


@pytest.mark.parametrize("name", OLD_LOSSES)
def test_an_old_loss_has_its_successor_named(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape(OLD_LOSSES[name])):
        SamPOConfig(output_dir=str(tmp_path), loss_type=name, **QUIET)
    assert name not in LOSS_TYPES
