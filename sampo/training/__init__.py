"""The parts of a training run: one step, the checks before it, and what is written after it.

In: a `SamPOConfig`, tokenised pairs, policy and reference. Out: the loss and metrics of each step; merged models,
rounds of Iterative SamPO and model cards. Read first: `batch.py` (the tensors of a step), then `weigher.py`,
`passes.py` and `objective.py` in the order of the step; `rounds.py`, `merge.py` and `memory.py` are independent.
"""
