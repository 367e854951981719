"""Diagnostics of a model: the length pressure of every weighting, and how much of its margins length explains.

In: a policy, a reference if there is one, and pairs. Out: scores of each pair in files that a later run continues, and
findings with intervals.
"""
