"""Every option of `DPOConfig` (TRL's and transformers'): with the class swapped, a run gives TRL's numbers, or is
refused in one sentence. An option that a later version adds fails here until somebody has thought about it."""

import importlib.util
import math
import os
from dataclasses import fields

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from tiny import PLAIN, make_pairs, save_model, training_options
from trl import DPOConfig, DPOTrainer

from sampo import SamPOConfig, SamPOTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SAVES = {"save_strategy": "steps", "save_steps": 1}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}

# Options that cannot disturb each other share a run. What is not an option's default is under test.
WORKS = {
    "optimiser": {
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2},
        "warmup_steps": 1, "optim": "adamw_torch", "optim_args": "x=1", "optim_target_modules": "all-linear",
        "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 0.1,
        "gradient_accumulation_steps": 2, "average_tokens_across_devices": False, "label_smoothing_factor": 0.1,
    },
    "length of the run": {"max_steps": -1, "num_train_epochs": 0.5, "per_device_train_batch_size": 2},
    "log": {
        "logging_strategy": "steps", "logging_steps": 2, "logging_first_step": True, "log_on_each_node": False,
        "logging_nan_inf_filter": False, "include_num_input_tokens_seen": "non_padding", "log_level": "error",
        "log_level_replica": "error", "disable_tqdm": True, "report_to": "tensorboard", "run_name": "name",
        "project": "project", "trackio_space_id": "a/b", "trackio_bucket_id": "a/b",
        "trackio_static_space_id": "a/b", "debug": "underflow_overflow", "skip_memory_metrics": False,
    },
    "evaluation": {
        **EVALUATES, "per_device_eval_batch_size": 2, "eval_delay": 1, "eval_on_start": True,
        "eval_do_concat_batches": False, "eval_accumulation_steps": 1, "include_for_metrics": ["inputs", "loss"],
        "bf16_full_eval": True, "do_train": True, "do_eval": True, "do_predict": True,
    },
    "evaluation without metrics": {**EVALUATES, "prediction_loss_only": True, "eval_use_gather_object": True},
    "checkpoints": {
        **SAVES, **EVALUATES, "save_total_limit": 1, "save_on_each_node": True, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/margins", "greater_is_better": True,
        "restore_callback_states_from_checkpoint": True, "ignore_data_skip": True,
    },
    "the model of a checkpoint": {**SAVES, "save_only_model": True},
    "hub, not pushed": {
        "hub_token": "t", "hub_private_repo": True, "hub_model_id": "a/b", "hub_strategy": "end",
        "hub_always_push": True, "hub_revision": "r", "push_to_hub": False,
    },
    "data": {
        "max_length": 14, "pad_to_multiple_of": 8, "dataloader_num_workers": 1, "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False,
        "dataloader_drop_last": True, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential",
        "data_seed": 3, "dataset_num_proc": 1, "label_names": ["labels"],
        "accelerator_config": {"even_batches": False, "split_batches": True},
    },
    "columns": {"remove_unused_columns": False, "length_column_name": "n_tokens", "seed": 3},
    "end of the row": {"truncation_mode": "keep_end", "max_length": 10},
    "fp16": {**EVALUATES, "fp16": True, "fp16_full_eval": True},
    "bf16": {"bf16": True, "use_cache": True, "torch_empty_cache_steps": 1, "auto_find_batch_size": True},
    "activations": {
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
        "full_determinism": True,
    },
    "activations by their old name": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "noise": {"neftune_noise_alpha": 5.0, "disable_dropout": False},
    "compiled": {
        "torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default", "max_length": 16,
        "pad_to_multiple_of": 16,  # one shape, or each batch is compiled anew
    },
    "loss": {
        "loss_type": ["sigmoid", "exo_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.5,
        "label_smoothing": 0.1,
    },
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.1},
    "divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "LD-DPO": {"ld_alpha": 0.5}, "WPO": {"use_weighting": True}, "no padding (TRL gave it up)": {"padding_free": True},
    "cache": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "moving reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1},
    "model": {"model_init_kwargs": {"attn_implementation": "eager"}, "trust_remote_code": True, "pad_token": "<eos>"},
}  # fmt: skip
REFUSED = {
    "enable_jit_checkpoint": (True, "`enable_jit_checkpoint` must be off, got true"),
    "optim": ("adamw_bnb_8bit", r"`optim: adamw_bnb_8bit` needs a package .* `pip install bitsandbytes`"),
    "use_liger_kernel": (True, r"`use_liger_kernel: true` needs a package .* `pip install liger-kernel`"),
    "train_sampling_strategy": ("group_by_length", "needs the length of each pair in the column `length`"),
    "truncation_mode": ("middle", "`truncation_mode` must be one of"),
    "f_divergence_type": ("kl", "`f_divergence_type` must be one of"),
    "neftune_noise_alpha": (-1.0, "`neftune_noise_alpha` must be finite and not negative"),
    "report_to": ("wandb", r"`report_to: wandb` needs a package that is not installed. `pip install wandb`"),
    "router_aux_loss_coef": (0.1, "LlamaForCausalLM is not a Mixture-of-Experts model"),  # TRL's own sentence
    "max_length": (1, "`max_length` must be at least 2 tokens"),
    "beta": (0.0, "`beta` must be positive"),
    "activation_offloading": (True, "`activation_offloading` moves activations to the CPU, got a run on the CPU"),
}
ELSEWHERE = {
    "output_dir": "every run", "use_cpu": "every run", "save_steps": "checkpoints",
    "resume_from_checkpoint": "test_resume.py", "batch_eval_metrics": "below, with `compute_metrics`",
    "liger_kernel_config": "needs Triton; TRL calls it deprecated",
    "tf32": "needs a GPU",
    **dict.fromkeys(["deepspeed", "fsdp", "fsdp_config", "parallelism_config"], "tests/training/test_engines.py"),
    **dict.fromkeys(
        ["ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
         "ddp_backend", "ddp_timeout", "local_rank"],
        "tests/training/test_distributed.py",
    ),
}  # fmt: skip


def test_every_option_has_its_place():
    known = {name for options in WORKS.values() for name in options} | REFUSED.keys() | ELSEWHERE.keys()
    there = {f.name for f in fields(DPOConfig) if f.init}
    assert there - known == set(), "say in this file what the option does"
    assert known - there == set()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    """What options leave behind in the process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state()
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


def run(trainer, config, folder, output_dir, options, **kwargs):
    """The log of a run of two steps, without times."""
    torch._dynamo.reset()
    AcceleratorState._reset_state()
    options = (PLAIN if config is SamPOConfig else {}) | options
    made = trainer(
        model=folder,
        args=config(**training_options(output_dir, **{"max_steps": 2, "logging_steps": 1} | options)),
        train_dataset=make_pairs(16),
        eval_dataset=make_pairs(6, seed=1) if "eval_strategy" in options else None,
        **kwargs,
    )
    made.train()
    names = ("loss", "eval_loss", "grad_norm", "learning_rate", "rewards/margins", "eval_rewards/margins")
    return [{name: entry[name] for name in names if name in entry} for entry in made.state.log_history]


def check(folder, tmp_path, options, **kwargs):
    theirs = run(DPOTrainer, DPOConfig, folder, tmp_path / "trl", options, **kwargs)
    assert len(theirs) > 1
    ours = run(SamPOTrainer, SamPOConfig, folder, tmp_path / "all", {"token_weighting": "all", **options}, **kwargs)
    rounding = 1e-6 if "precompute_ref_log_probs" in options else 0  # the cache is filled in batches of its own
    assert ours == [pytest.approx(entry, abs=rounding, rel=rounding) for entry in theirs]
    subsets = {"token_weighting": "sampo", "pair_stream": "auto"}
    log = run(SamPOTrainer, SamPOConfig, folder, tmp_path / "sampo", subsets | options, **kwargs)
    assert [entry.keys() for entry in log] == [entry.keys() for entry in theirs]
    assert all(math.isfinite(value) for entry in log for value in entry.values())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in WORKS if name != "LD-DPO"])
def test_an_option_does_with_the_class_swapped_what_it_does_in_trl(model_folder, tmp_path, name):
    check(model_folder, tmp_path, WORKS[name])


def test_ld_alpha_is_for_all_tokens(model_folder, tmp_path):
    options = WORKS["LD-DPO"]
    theirs = run(DPOTrainer, DPOConfig, model_folder, tmp_path / "trl", options)
    assert theirs == run(SamPOTrainer, SamPOConfig, model_folder, tmp_path, {"token_weighting": "all", **options})
    with pytest.raises(ValueError, match="`ld_alpha` is itself a token weighting"):
        SamPOConfig(**training_options(tmp_path, **options))


@pytest.mark.parametrize("option", list(REFUSED))
def test_what_cannot_be_is_refused_in_one_sentence(model_folder, tmp_path, option):
    value, sentence = REFUSED[option]
    package = sentence.split("pip install ")[-1].strip("`").replace("-", "_")
    if "pip install" in sentence and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=sentence):
        run(SamPOTrainer, SamPOConfig, model_folder, tmp_path, {option: value})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler at work
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.slow),
        pytest.param({"balance_end_token": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_torch_compile_with_an_adapter(model_folder, tmp_path, options):
    """Each forward is TRL's own call: a hook that comes and goes is not seen by a compiled model."""
    compiled = WORKS["compiled"] | options
    peft = {"peft_config": LoraConfig(**LORA)}
    log = run(SamPOTrainer, SamPOConfig, model_folder, tmp_path / "a", compiled | {"pair_stream": "auto"}, **peft)
    shape = {name: compiled[name] for name in ("max_length", "pad_to_multiple_of")}
    plain = run(SamPOTrainer, SamPOConfig, model_folder, tmp_path / "b", options | shape, **peft)
    assert log[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-6)
    assert log[1]["loss"] == pytest.approx(plain[1]["loss"], abs=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler at work
def test_torch_compile_and_a_strict_stream_exclude_each_other_and_auto_says_why(model_folder, tmp_path, caplog):
    options = WORKS["compiled"]
    with pytest.raises(ValueError, match=r"`pair_stream: true` must be exact for this model, but `torch_compile`"):
        run(SamPOTrainer, SamPOConfig, model_folder, tmp_path, {"pair_stream": "true", **options})
    run(SamPOTrainer, SamPOConfig, model_folder, tmp_path, {"pair_stream": "auto", **options})
    assert "pair_stream: auto takes the plain forward over padded rows, because `torch_compile`" in caplog.text


def test_neftune_and_a_strict_stream_exclude_each_other_whatever_the_noise(model_folder, tmp_path, caplog):
    options = {"neftune_noise_alpha": 1e-9}  # less than the comparison of the first batch could see
    with pytest.raises(ValueError, match=r"`pair_stream: true` must be .* but `neftune_noise_alpha` is noise"):
        run(SamPOTrainer, SamPOConfig, model_folder, tmp_path, {"pair_stream": "true", **options})
    run(SamPOTrainer, SamPOConfig, model_folder, tmp_path, {"pair_stream": "auto", **options})
    assert "pair_stream: auto takes the plain forward over padded rows, because `neftune_noise_alpha`" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler at work
@pytest.mark.parametrize("part", ["", "model", "model.layers.0"])
def test_a_reference_that_the_caller_compiled_is_asked(model_folder, tmp_path, part):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_folder)
    reference.get_submodule(part).compile(backend="eager")
    log = run(SamPOTrainer, SamPOConfig, model_folder, tmp_path, {"pair_stream": "auto"}, ref_model=reference)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("batched", [False, True])
def test_metrics_of_the_caller_get_what_trl_gives_them(model_folder, tmp_path, batched):
    def measure(prediction, compute_result=True):
        return {"shape": float(prediction.predictions.shape[-1])}

    options = {**EVALUATES, "batch_eval_metrics": batched, "eval_accumulation_steps": 1}
    check(model_folder, tmp_path, options, compute_metrics=measure)
