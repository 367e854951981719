"""From tokens to per-token log-probabilities.

In: a model and batches of tokenised pairs. Out: one log-probability for each completion token, from a plain forward
pass or from a packed row in which each prompt is computed once. Read first: `scorer.py`, then `packing.py` (the packed
layout); `attention.py` and `lm_head.py` serve them.
"""
