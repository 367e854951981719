"""Evaluation: answers of models, what judges say about them, and how sure that is."""
