"""Opening models, tokenizers and adapters.

In: a folder or hub id. Out: a model with every weight from its files, or one `ModelError` that names what is wrong.
Nothing of a model runs code without `trust_remote_code`. Read first: `load.py` (the one way to open a model), then
`checks.py` (what can be found wrong before weights are read).
"""
