"""Which tokens end a response."""


def end_token_ids(tokenizer, generation_config=None) -> list[int]:
    """EOS first, then whatever else ends a turn: the model's other EOS ids, and the template's end of a turn."""
    from jinja2 import TemplateError

    eos = getattr(generation_config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    if tokenizer.chat_template:
        answer = "An answer."
        turn = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
        try:
            text = tokenizer.apply_chat_template(turn, tokenize=False)
        except TemplateError:  # a template for other roles: then EOS has to do
            text = answer
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        after = tokenizer(text.rsplit(answer, 1)[-1], add_special_tokens=False)["input_ids"]
        ids += [token for token in after if token in special]
    return list(dict.fromkeys(i for i in ids if i is not None))
