"""Preference pairs from scored answers, and subsets of pairs by length.

In: answers of one or several models to each prompt, and a judge. Out: pairs for `load_preferences`, an account of
every prompt, and a card. Read `choice.py` first: a rule of choice is a function of scores and lengths. `scores` asks
the judge, `make` counts what can be used and makes the rows, `card` describes them, and `filters` selects among pairs
that exist.
"""
