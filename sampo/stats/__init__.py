"""Statistics in numpy and scipy alone: no torch, and nothing of the other packages.

In: arrays with one value per row, and the number of each row's prompt, since the prompt is the unit of every interval.
Out: an `Estimate` (value, bounds, standard error, number of prompts), or coefficients of a logistic regression.
Read `intervals.py` first; then `bootstrap.py` (draws complete prompts) and `logistic.py` (several fits at once).
"""
