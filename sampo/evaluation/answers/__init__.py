"""Answers of models to prompts.

In: a model (in this process or behind a URL) and a source of prompts. Out: a JSONL file with one `Answer` per prompt
and sample, and with all that it depends on; an interrupted run continues the file.
Read `answers.py` first (the record and its file), then `generate.py` (the loop over prompts and the backend's
protocol), `backends.py` (transformers, vLLM, endpoint) and `prompts.py` (where prompts come from).
"""
