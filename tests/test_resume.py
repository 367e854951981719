"""Interrupted and resumed runs against runs that were not; checkpoints that are whole or absent."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_worker import Interrupted, make_run, outcome
from tiny import make_model, make_pairs, make_tokenizer, save_model

from sampo import checkpoints
from sampo.checkpoints import MANIFEST, STAGING, CheckpointNotSavedError, find_whole_checkpoint
from sampo.resuming import Preempted, ResumeRefusedError
from sampo.run_identity import FREE, ROUNDING, data_hash, weights_hash


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(model, folder, *, resume=None, **options):
    """What a launch saw, micro-batch by micro-batch, and what came out; None where it was interrupted."""
    seen = []
    trainer = make_run(model, folder, see=seen.append, **options)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Interrupted:
        return seen, None
    return seen, outcome(trainer)


def is_continued_by(before, after, whole):
    """Whether the micro-batches of the steps that count, of both launches, are those of the whole run."""
    first = after[0]["step"] if after else math.inf
    return [line for line in before if line["step"] < first] + after == whole


# --- exactness -------------------------------------------------------------------------------------------------------

KINDS = {
    "full": {"eval_strategy": "steps", "eval_steps": 3},
    "LoRA with dropout": {"lora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_interrupted_in_any_micro_batch_goes_on_to_the_same_bits(model, tmp_path, kind):
    """Weights, theta, data order, subsets, losses and the whole log; 2.5 steps an epoch, so over epoch borders too."""
    options = KINDS[kind]
    whole, end = run(model, tmp_path / "whole", **options)
    assert len(whole) == 13  # of every third step, which ends an epoch, one micro-batch
    assert len({line["rows"] for line in whole}) == 13
    for stop_at in range(13):
        folder = tmp_path / str(stop_at)
        before, nothing = run(model, folder, stop_at=stop_at, **options)
        assert nothing is None
        after, resumed_end = run(model, folder, resume="auto", **options)
        assert len(before) == stop_at
        assert is_continued_by(before, after, whole), stop_at
        assert resumed_end == end, stop_at
        shutil.rmtree(folder)
