"""The parts around a training run: checks before it, the work of a step, and what is written after it.

In: a `SamPOConfig`, tokenised pairs, a model. Out: micro-batches and sums for the trainer; merged models, rounds of
Iterative SamPO and model cards for the commands. Read first: `run_state.py`, then `micro_batches.py`; `rounds.py` and
`merge.py` stand alone.
"""
