"""Per-token log-probabilities of the reference, computed once and kept on disk.

In: a reference model and tokenised pairs. Out: two columns of log-probabilities beside the pairs, which later runs
with the same reference, data and truncation read. Read first: `key.py` (what the numbers depend on), then `store.py`
(shards and manifest), `fill.py` (the loop that computes what is missing) and `trainer.py` (the trainer class).
"""
