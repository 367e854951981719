"""Tiny models of many kinds, batches of pairs, and their log-probs by TRL's padded forward and by the pair stream."""

import copy
import math

import torch
from tiny import make_pairs, make_tokenizer, training_options
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from sampo import SamPOConfig, SamPOTrainer
from sampo.scoring.interface import install, uninstall
from sampo.scoring.packing import lay_out, score_packed

COMMON = {
    "vocab_size": 69,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def make(config):
    """A causal LM in float32 with TRL's fused head."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).float()
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def collate(shapes, seed=0, max_length=None, mode="keep_start"):
    """A collated batch of pairs with the given numbers of prompt, chosen and rejected tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(4, 60, (n,), generator=generator).tolist()

    rows = [{"prompt_ids": tokens(p), "chosen_ids": tokens(c), "rejected_ids": tokens(r)} for p, c, r in shapes]
    return DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)(rows)


def plain_output(model, batch):
    """TRL's own way: padded rows, each by itself."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    masks = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return model(**masks, labels=labels, use_cache=False, fused_lm_head=True)


def streamed_output(model, batch, scored=None, needed=None):
    """The same by the pair stream."""
    stream = lay_out(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], needed)
    scored = batch["completion_mask"][:, 1:].bool() if scored is None else scored
    install(model)
    try:
        return score_packed(model, model.base_model, stream, scored, [batch["input_ids"][:, 1:]])[0]
    finally:
        uninstall(model)


def gradients(model, output, weights=1.0):
    model.zero_grad()
    (output.log_probs * weights).pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(ours, theirs):
    """Within 1e-4 of the norm of all of them."""
    assert theirs.keys() == ours.keys()
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in theirs.values()))
    off = math.sqrt(sum((theirs[n] - ours[n]).pow(2).sum().item() for n in theirs))
    assert off <= 1e-4 * norm


def make_trainer(model, tmp_path, *, pair_stream, data=None, **options):
    kwargs = {name: options.pop(name) for name in ("peft_config", "ref_model", "eval_dataset") if name in options}
    return SamPOTrainer(
        model=model,
        args=SamPOConfig(**training_options(tmp_path, pair_stream=pair_stream, **options)),
        train_dataset=make_pairs(32) if data is None else data,
        processing_class=make_tokenizer(),
        **kwargs,
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
