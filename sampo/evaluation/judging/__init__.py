"""Judges: which of two answers to a prompt is better.

In: the answers of a system and of a baseline. Out: one `Judgement` per pair and order, with a preference in [0, 1] or
the reason of a failure, and with both lengths.
Read `judges.py` first (protocol, pairs, both orders), then one judge: `rule_judges.py`, `model_judges.py`,
`human_judge.py`, or `endpoint_judge.py` with `templates.py` (what is asked) and `verdict_text.py` (reads the reply).
"""
