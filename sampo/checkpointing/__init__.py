"""Checkpoints that are complete or absent, and runs that continue from them to the bit.

In: a trainer that is to be saved or resumed. Out: `checkpoint-N` folders with a manifest, or an error that names what
differs from the run that wrote them. Read first: `files.py` (atomic checkpoints), then `fingerprint.py` (which run a
checkpoint belongs to), then `resume.py` (the trainer class).
"""
