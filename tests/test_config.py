"""`SamPOConfig`: the paper's defaults, what is refused and how."""

import math
import re
from dataclasses import fields

import pytest
from trl import DPOConfig

from sampo import SamPOConfig
from sampo.config_checks import COUNT_LOSSES, LOSS_TYPES, MARGIN_LOSSES, SIDE_LOSSES, TRAINER_RANGES
from sampo.training.baselines import ORPOConfig, PairsKTOConfig, SimPOConfig
from sampo.weighting import WEIGHTINGS

FRACTIONAL = [name for name, method in WEIGHTINGS.items() if not method.subset]
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none"}


def config(tmp_path, **options):
    return SamPOConfig(output_dir=str(tmp_path), **QUIET, **options)


def test_the_defaults_are_the_papers(tmp_path):
    c = config(tmp_path)
    assert (c.token_weighting, c.length_penalty, c.sampled_sides) == ("sampo", 0.0, "both")
    assert (c.keep_end_token, c.mask_sharing, c.mask_samples) == (False, "shared", 1)
    assert c.loss_type == ["sigmoid"]
    assert not c.has_length_penalty


@pytest.mark.parametrize(("given", "kept"), [("0.02", 0.02), (0.02, 0.02), (None, 0.0), ("learned", "learned")])
def test_a_length_penalty_may_be_a_number_a_text_or_learned(tmp_path, given, kept):
    assert config(tmp_path, length_penalty=given).length_penalty == kept


@pytest.mark.parametrize("name", list(WEIGHTINGS))
@pytest.mark.parametrize("loss", sorted(LOSS_TYPES))
def test_every_loss_is_taken_by_every_subset_method_and_count_losses_by_no_other(tmp_path, name, loss):
    options = {"token_weighting": name, "loss_type": loss, "label_smoothing": 0.01}
    if loss in COUNT_LOSSES and name in FRACTIONAL:
        with pytest.raises(ValueError, match=f"`loss_type: .*{loss}.*` divides by the number of selected tokens"):
            config(tmp_path, **options)
    else:
        assert config(tmp_path, **options).loss_type == [loss]


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_a_divergence_needs_a_likelihood_ratio(tmp_path, name):
    options = {"token_weighting": name, "f_divergence_type": "js_divergence"}
    if name in FRACTIONAL:
        with pytest.raises(ValueError, match="needs a likelihood ratio"):
            config(tmp_path, **options)
    else:
        config(tmp_path, **options)


@pytest.mark.parametrize("loss", sorted(SIDE_LOSSES | COUNT_LOSSES))
def test_a_length_penalty_needs_a_loss_of_the_margin(tmp_path, loss):
    with pytest.raises(ValueError, match=r"`length_penalty: 0\.01` needs a loss that is a function of the margin"):
        config(tmp_path, loss_type=["sft", loss], length_penalty=0.01)


@pytest.mark.parametrize("loss", sorted(SIDE_LOSSES | COUNT_LOSSES))
def test_a_learned_penalty_is_refused_for_the_loss_that_was_asked_for(tmp_path, loss):
    with pytest.raises(ValueError, match=f"needs a loss that is a function of the margin .*, got .'{loss}'") as caught:
        config(tmp_path, loss_type=loss, length_penalty="learned")
    assert "`sft`" not in str(caught.value)
    assert "(2)" not in str(caught.value)


def test_a_learned_penalty_has_nothing_to_learn_from_sft_and_an_unknown_loss_is_named_once(tmp_path):
    with pytest.raises(ValueError, match="got only `sft`"):
        config(tmp_path, loss_type="sft", length_penalty="learned")
    with pytest.raises(ValueError, match="`loss_type` must be among") as caught:
        config(tmp_path, loss_type="dpo", length_penalty="learned")
    assert str(caught.value).count("'dpo'") == 1


@pytest.mark.parametrize("loss", sorted(MARGIN_LOSSES))
def test_a_length_penalty_goes_with_each_loss_of_the_margin_and_sft(tmp_path, loss):
    assert config(tmp_path, loss_type=["sft", loss], length_penalty="learned").learns_length_penalty


REFUSED = [
    ({"token_weighting": "sanpo"}, r"`token_weighting` must be one of .* got 'sanpo'. Plain DPO is `all`"),
    ({"sampled_sides": "chosen"}, "`sampled_sides` must be one of"),
    ({"token_budget": "batch"}, "`token_budget` must be one of"),
    ({"token_budget": "dataset", "token_totals": [5]}, "`token_totals` must be two whole numbers of at least 1"),
    ({"token_budget": "dataset", "token_totals": [5, 0]}, "`token_totals` must be two whole numbers of at least 1"),
    ({"token_totals": [5, 6]}, "`token_totals: \\[5, 6\\]` is for `token_budget: dataset`, got `pair`"),
    (
        {"token_budget": "dataset", "token_weighting": "mean"},
        "`token_budget: dataset` needs a method that downsamples",
    ),
    ({"token_budget": "dataset", "mask_sharing": "independent"}, "`token_budget: dataset` needs one subset"),
    ({"mask_sharing": "none"}, "`mask_sharing` must be one of"),
    ({"mask_samples": 0}, "`mask_samples` must be a whole number of at least 1, got 0"),
    ({"decay_gamma": 0.0}, r"`decay_gamma` must be in \(0, 1\], got 0.0"),
    ({"decay_gamma": math.nan}, "`decay_gamma`"),
    ({"otpo_reg": 0.0}, "`otpo_reg` must be positive, got 0.0"),
    (
        {"otpo_mass_reg": 101.0},
        r"`otpo_mass_reg` must be positive and at most 100 times `otpo_reg` \(1.0\)",
    ),
    ({"ld_tail_weight": 1.5}, r"`ld_tail_weight` must be in \[0, 1\], got 1.5"),
    ({"length_penalty": "auto"}, "`length_penalty` must be a finite number or `learned`, got 'auto'"),
    ({"length_penalty": math.inf}, "`length_penalty` must be a finite number"),
    ({"length_penalty_scale": -1.0}, "`length_penalty_scale` must be a positive number"),
    ({"length_penalty_lr": 0.0}, "`length_penalty_lr` must be positive"),
    ({"length_penalty": "learned", "length_penalty_start": "slope"}, "`length_penalty_start` must be a finite number"),
    (
        {"length_penalty": 0.1, "length_penalty_start": 0.1},
        "`length_penalty_start: 0.1` is for `length_penalty: learned`",
    ),
    ({"length_penalty": True}, "`length_penalty` must be a finite number or `learned`, got True"),
    ({"token_weighting": "all", "ld_alpha": 3.0}, r"`ld_alpha` must be in \[0, 1\], got 3.0"),
    ({"label_smoothing": 0.5, "loss_type": ["robust"]}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, math.nan]}, "`loss_weights` must be finite numbers"),
    ({"adam_beta2": 1.0}, r"`adam_beta2` must be in \[0, 1\), got 1.0"),
    ({"max_grad_norm": -1.0}, "`max_grad_norm` must be finite and not negative, got -1.0"),
    ({"seed": -1}, r"`seed` must be between 0 and 2\^32 - 1, got -1"),
    ({"dataset_num_proc": 0}, "`dataset_num_proc` must be at least 1, got 0"),
    ({"ref_model_mixup_alpha": 2.0}, r"`ref_model_mixup_alpha` must be in \[0, 1\], got 2.0"),
    ({"ref_cache_dtype": "float64"}, "`ref_cache_dtype` must be one of .* got 'float64'"),
    ({"ref_cache_check": -1}, "`ref_cache_check` must be a whole number of at least 0, got -1"),
    ({"beta": 0.0}, "`beta` must be positive and finite, got 0.0"),
    ({"loss_type": ["sigmoid", "sigmoyd"]}, r"`loss_type` must be among .* got \['sigmoyd'\]"),
    (
        {"token_weighting": "mean", "sampled_sides": "rejected"},
        "`sampled_sides: rejected` needs a method that downsamples",
    ),
    ({"token_weighting": "prefix", "keep_end_token": True}, "`keep_end_token` is for"),
    (
        {"balance_end_token": True, "max_tokens_per_forward": 99},
        "a live reference for complete batches, got `max_tokens_per_forward: 99`. Set `precompute_ref_log",
    ),
    (
        {"balance_end_token": True, "loss_type": "ipo"},
        "fractional weights of `token_weighting: sampo with balance_end",
    ),
    ({"balance_end_token": True, "use_weighting": True}, r"`use_weighting` \(WPO\) has no meaning"),
    (
        {"balance_end_token": True, "token_weighting": "all", "ld_alpha": 0.5},
        "with `token_weighting: all` and `balance_end_token`. Unset it, use `all` alone, or `ld` with",
    ),
    ({"token_weighting": "expected", "mask_sharing": "independent"}, "`mask_sharing: independent` needs random"),
    ({"token_weighting": "top_k", "mask_samples": 2}, "`mask_samples: 2` needs random"),
    ({"token_weighting": "decay", "use_weighting": True}, r"`use_weighting` \(WPO\) has no meaning"),
    ({"use_weighting": True, "loss_type": ["sigmoid", "sft"]}, "is defined for `token_weighting: all` without"),
    ({"ld_alpha": 0.5}, "`ld_alpha` is itself a token weighting"),
    ({"length_penalty": 0.1, "f_divergence_type": "forward_kl"}, "needs `f_divergence_type: reverse_kl`"),
    ({"length_penalty": 0.1, "use_weighting": True}, "no source that defines it"),
    ({"length_penalty": "learned", "loss_type": "sft"}, "needs a preference loss to learn from"),
    ({"dpop_lambda": -1.0}, "`dpop_lambda` must be finite and at least 0, got -1.0"),
    ({"dpop_lambda": math.nan}, "`dpop_lambda` must be finite"),
    ({"dpop_lambda": 5.0, "loss_type": "ipo"}, "`dpop_lambda: 5.0` needs a loss that is a function of the margin"),
    ({"dpop_lambda": 5.0, "loss_type": ["sft"]}, "`dpop_lambda: 5.0` needs a preference loss to learn from"),
    (
        {"dpop_lambda": 5.0, "f_divergence_type": "forward_kl"},
        "`dpop_lambda: 5.0` needs `f_divergence_type: reverse_kl`",
    ),
    ({"dpop_lambda": 5.0, "use_weighting": True}, r"`dpop_lambda: 5.0` with `use_weighting` \(WPO\) has no source"),
    ({"dpop_lambda": 5.0, "mask_sharing": "independent"}, "`dpop_lambda: 5.0` needs policy and reference on one"),
    ({"tdpo": "tdpo3"}, r"`tdpo` must be one of \['none', 'tdpo1', 'tdpo2'\], got 'tdpo3'"),
    ({"tdpo": "tdpo2", "tdpo_alpha": -0.5}, "`tdpo_alpha` must be finite and at least 0, got -0.5"),
    ({"tdpo": "tdpo1", "precompute_ref_log_probs": True}, "`tdpo: tdpo1` needs a live reference for its distribution"),
    ({"tdpo": "tdpo2", "dpop_lambda": 5.0}, "`tdpo: tdpo2` with `dpop_lambda: 5.0` has no source"),
    ({"tdpo": "tdpo2", "loss_type": "ipo"}, "`tdpo: tdpo2` needs a loss that is a function of the margin"),
    ({"tdpo": "tdpo2", "mask_sharing": "independent"}, "`tdpo: tdpo2` needs policy and reference on one subset"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_has_no_meaning_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


OF_THE_TRAINER = {f.name for f in fields(SamPOConfig)} & set(TRAINER_RANGES)


@pytest.mark.parametrize("name", sorted(OF_THE_TRAINER))
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
def test_no_number_of_the_trainer_may_be_undefined(tmp_path, name, value):
    with pytest.raises((ValueError, OverflowError), match=rf"`?{name}`?"):
        config(tmp_path, token_weighting="all", **{name: value})


def test_every_float_of_the_trainers_has_a_range_or_a_reason():
    """A new option of TRL or transformers fails here, until its range is written down."""
    of_steps = {"logging_steps", "save_steps", "eval_steps"}  # a share of all steps below 1; not positive switches off
    own = {f.name for f in fields(SamPOConfig)} - {f.name for f in fields(DPOConfig)}
    numbers = {
        f.name
        for kind in (SamPOConfig, SimPOConfig, ORPOConfig, PairsKTOConfig)
        for f in fields(kind)
        if re.search(r"\bfloat\b", str(f.type)) and "list" not in str(f.type)
    }
    assert numbers - own - set(TRAINER_RANGES) == {*of_steps, "num_train_epochs"}


@pytest.mark.parametrize("name", list(WEIGHTINGS))
@pytest.mark.parametrize("keep_end", [False, True])
def test_a_precomputed_reference_serves_every_method(tmp_path, name, keep_end):
    keep_end = keep_end and WEIGHTINGS[name].can_keep_end
    assert config(tmp_path, token_weighting=name, precompute_ref_log_probs=True, keep_end_token=keep_end)


def test_all_faults_come_in_one_error(tmp_path):
    with pytest.raises(ValueError, match="SamPOConfig") as error:
        config(tmp_path, mask_samples=-1, decay_gamma=2.0, ld_alpha=0.5, loss_type="ipo", length_penalty=1.0)
    named = {name for _, name in re.findall(r"\((\d)\) `(\w+)", str(error.value))}
    assert named == {"mask_samples", "decay_gamma", "ld_alpha", "length_penalty"}


def test_each_option_has_a_help_text_that_argparse_can_print():
    for name in set(SamPOConfig.__dataclass_fields__) - set(SamPOConfig.__mro__[1].__dataclass_fields__):
        text = SamPOConfig.__dataclass_fields__[name].metadata["help"]
        assert len(text) > 30, name
        assert "%" not in text, name
