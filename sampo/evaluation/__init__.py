"""Evaluation: answers of models, what judges say about them, how long they are, how often they win, how sure that is.

The statistics need numpy and scipy alone.
"""
