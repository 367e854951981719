"""log π(y|x) − log π_ref(y|x) of answers that the policy has generated: their mean estimates the KL from a reference.

For answers drawn from the policy itself (temperature 1, no top-p, no top-k) the mean over answers is an unbiased
estimate of KL(π ‖ π_ref), in nats per answer, of the distribution that ends at the limit of tokens. For greedy answers
it is the log-ratio of the most likely answer, which is another number. The sum runs over the tokens of the answer's
text, tokenised again, and its end token where the model wrote one.
"""

from collections.abc import Sequence

from ...io.progress import Progress
from ...models.inference import default_device, load_causal
from ...models.load import load_tokenizer
from ..texts import Texts
from .answers import Answer
from .backends import end_tokens


def answer_log_ratios(
    policy: str,
    reference: str,
    answers: Sequence[Answer],
    *,
    prompt_format: str = "auto",
    chat_template: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> list[float]:
    """Σ log π − log π_ref of each answer, in nats.

    Args:
        policy: folder or hub id of a model or an adapter, which has generated the answers.
        reference: the same.
        answers: with `stop`: of an answer that was cut off no end token is scored.
        prompt_format: `chat`, `raw` or `auto`.
        chat_template: replaces the tokenizer's own.
        batch_size: answers at a time.
        device: the first accelerator, else the CPU.
        dtype: of the weights; `auto`: as stored.
        progress: called with (done, of).

    Raises:
        ValueError: policy and reference have different vocabularies.
    """
    from ...scoring.scorer import ModelScorer, Rows

    device = device or default_device()
    tokenizer = load_tokenizer(policy)
    if tokenizer.get_vocab() != load_tokenizer(reference).get_vocab():
        raise ValueError(f"The reference must have the vocabulary of {policy}, got {reference} with another one.")
    models = [load_causal(name, device=device, dtype=dtype).model for name in (policy, reference)]
    texts = Texts(tokenizer, prompt_format, chat_template)
    ends = end_tokens(tokenizer, models[0].generation_config, ())
    rows = [scored_tokens(texts, answer, ends) for answer in answers]
    scorers = [ModelScorer(model, own_head=True) for model in models]
    found = [0.0] * len(rows)
    order = sorted((i for i, (_, answer) in enumerate(rows) if answer), key=lambda i: -len(rows[i][0] + rows[i][1]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = Rows.of([rows[i] for i in batch]).inputs
        ours, theirs = (scorer(inputs)[0].cpu().double().sum(dim=1).tolist() for scorer in scorers)
        for i, p, r in zip(batch, ours, theirs, strict=True):
            found[i] = p - r
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    return found


def scored_tokens(texts: Texts, answer: Answer, ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer, with its first end token unless the answer was cut off."""
    prompt, tokens = texts.row(answer.prompt, answer.answer)
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return prompt, tokens[: end + (answer.stop != "length")]
