"""Evaluation: answers of models, verdicts of judges, and measures of quality and length.

In: a model and prompts, or files of answers. Out: files of answers, of judgements, and records with intervals.
`answers/` generates, `judging/` compares two answers to a prompt, `results/` turns verdicts and lengths into numbers;
`harness.py` runs benchmarks, `endpoint.py` is the client of an OpenAI-compatible server.
Read `answers/answers.py` first, then `judging/judges.py` and `results/summary.py`.
"""
