"""A sweep: one base recipe × methods × a small grid × seeds, and what came out of it.

In: a `Definition`. Out: a folder with one ordinary training run per combination, the answers and scores of each, and a
table, records, figures and a conclusion over all of them.
Read `plan.py` first (the runs, their commands and the state file), then `runs.py` (what is started when), `outcome.py`
(numbers of a run and of several seeds together) and `results.py` (comparisons, records, files).
"""
