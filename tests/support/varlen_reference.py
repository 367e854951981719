"""What varlen kernels compute, sequence by sequence, with the signatures of those that this machine does not have."""

import torch


def sequence_by_sequence(query, key, value, starts_q, starts_k, *, scale, window, softcap=None, sinks=None):
    """What varlen kernels compute: `(T, heads, d)`, causal and aligned at the end of queries and keys."""
    found = []
    bounds = zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
    for q0, q1, k0, k1 in torch.tensor([[int(x) for x in each] for each in bounds]).tolist():
        q, (k, v) = query[q0:q1].transpose(0, 1), (x[k0:k1].transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        seen = (distance >= 0) & (distance < (window or 10**9))
        weights = scores.exp() * seen
        total = weights.sum(dim=2, keepdim=True) + (0.0 if sinks is None else sinks.exp()[:, None, None])
        found.append((weights / total @ v).transpose(0, 1))
    return torch.cat(found)


def own_flash(softmax, query, key, value, attention_mask, **kwargs):
    """A flash implementation of transformers, with what is bound to it."""
    assert attention_mask is None
    assert kwargs["is_causal"]
    assert kwargs["max_length_q"] == int(kwargs["cu_seq_lens_q"].diff().max())
    assert kwargs["max_length_k"] == int(kwargs["cu_seq_lens_k"].diff().max())
    tensors = (x[0].transpose(0, 1) for x in (query, key, value))
    found = sequence_by_sequence(
        *tensors,
        kwargs["cu_seq_lens_q"],
        kwargs["cu_seq_lens_k"],
        scale=softmax.scale,
        window=softmax.reach.window,
        softcap=softmax.softcap,
        sinks=softmax.sinks,
    )
    return found[None], None
