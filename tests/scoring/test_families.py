"""Every family of causal language models in transformers: packed exactly, or refused with its reason."""

import pytest
import torch
from families import FAMILIES, OVERRIDES, SKIPPED, compare, compare_aux_loss, make_model, packed_output, padded_output
from peft import LoraConfig, get_peft_model
from streams import collate

from sampo.scoring.interface import install, uninstall

REPRESENTATIVES = {
    "plain": "llama",
    "window": "mistral",
    "window in some layers": "gemma3_text",
    "window in the mask alone": "qwen2_moe",
    "soft-capping and a window": "gemma2",
    "sinks and a window": "gpt_oss",
    "mixture of experts": "qwen3_moe",
    "GPT-2's table of positions": "gpt2",
    "a dense mask": "gptj",
    "values narrower than keys": "deepseek_v3",
    "attention twice in a layer": "longcat_flash",
    "arguments that do not reach the attention": "nemotron",
}
REFUSED = {
    "qwen3_next": "`linear_attention` carry a state",
    "lfm2": "`conv` carry a state",
    "rwkv": "the model is recurrent",
    "glm_moe_dsa": "`indexed_attention` select or compress the keys",
    "bloom": "ALiBi counts positions",
    "doge": "mask depends on the values",
}
# softmax attention with something that a packed row changes
NOT_PACKED = {"bloom", "cpmant", "doge", "gpt_neo", "mpt", "openai-gpt"}


@pytest.mark.parametrize("family", REPRESENTATIVES.values(), ids=REPRESENTATIVES)
def test_each_mechanism_is_exact(family):
    assert compare(make_model(family)).way == "packed"


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_exact_is_refused_before_anything_is_computed(family):
    assert REFUSED[family] in compare(make_model(family)).way


@pytest.mark.filterwarnings(  # of PEFT about its own choices for experts
    "ignore:target_parameters=:RuntimeWarning", "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gptj", "nemotron"])
def test_adapters_and_gradient_checkpointing_are_exact_too(family):
    model = make_model(family)
    batch, losses = collate([(9, 14, 20), (20, 1, 6)]), []
    target = batch["input_ids"][:, 1:]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    causal_lm = adapted.get_base_model()
    for checkpointing in (False, True):
        if checkpointing:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
            causal_lm.train()
        for output in (padded_output(causal_lm, batch, target), packed_output(causal_lm, batch, [target])[0]):
            install(causal_lm)  # as in a run, where it stays; the backward pass computes the attention again
            adapted.zero_grad()
            output.log_probs.pow(2).sum().backward()
            grads = [p.grad.flatten() for p in adapted.parameters() if p.grad is not None]
            uninstall(causal_lm)
            losses.append((output.log_probs, torch.cat(grads)))
    for logps, grads in losses[1:]:
        torch.testing.assert_close(logps, losses[0][0], atol=1e-4, rtol=0)
        assert (grads - losses[0][1]).norm() <= 1e-4 * losses[0][1].norm()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "qwen2_moe"])
def test_the_auxiliary_loss_of_experts_and_its_gradients_are_those_of_padded_rows(family):
    found, expected, gradients = compare_aux_loss(make_model(family))
    assert found == pytest.approx(expected, abs=1e-5)
    assert gradients <= 1e-4


@pytest.mark.parametrize("shapes", [[(1, 1, 1)], [(1, 3, 2), (4, 1, 1)], [(5, 2, 2)] * 2])
def test_the_auxiliary_loss_counts_every_token_of_rows_of_any_shape(shapes):
    found, expected, _ = compare_aux_loss(make_model("mixtral"), shapes)
    assert found == pytest.approx(expected, abs=1e-5)


def test_chunks_are_exact(monkeypatch):
    """Llama 4's; TRL does not find the backbone of its text model, which this does in its place."""
    monkeypatch.setattr("transformers.models.llama4.modeling_llama4.Llama4ForCausalLM.base_model_prefix", "model")
    model = make_model("llama4_text")
    assert set(model.config.layer_types) == {"chunked_attention", "full_attention"}
    assert compare(model).way == "packed"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SKIPPED])
def test_every_family(family):
    outcome = compare(make_model(family))
    if outcome.kind == "softmax attention" and family not in NOT_PACKED:
        assert outcome.way == "packed"
        return
    assert outcome.way != "packed"
    assert outcome.logps is None  # refused, and not found by comparing numbers
    assert "Error" not in outcome.way


def test_every_family_is_in_the_sweep_and_nothing_else():
    assert set(SKIPPED) | set(OVERRIDES) | NOT_PACKED <= set(FAMILIES)
    assert not set(SKIPPED) & set(OVERRIDES)
