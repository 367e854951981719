"""Evaluation: how long answers are, how often they win, and how sure that is.

The numbers need numpy and scipy alone.
"""
