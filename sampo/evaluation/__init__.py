"""Evaluation: how long answers are, how often they win, and how sure that is. numpy and scipy alone for the numbers."""
