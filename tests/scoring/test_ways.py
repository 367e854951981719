"""Which forward computes the batches: what a first batch decides, and what it does not."""

import itertools
import logging
import math
import random
import time

import pytest
import torch
from streams import collate
from tiny import make_model, make_pairs, save_model

from sampo import SamPOConfig, SamPOTrainer
from sampo.scoring.attention import StreamRefused
from sampo.scoring.interface import is_installed
from sampo.scoring.packing import RowsTooLong
from sampo.scoring.scorer import ModelScorer, Rows, Scorer, take_rows
from sampo.scoring.ways import GROUPED, PACKED, PADDED, Ways, group_rows


class Decision:
    """`Ways` of one tiny model, whose first batches are whatever the test says."""

    def __init__(self, mode="auto", **options):
        self.model = make_model()
        self.ways = Ways(mode, [self.model], **options)
        self.asked = []

    def compare(self, other, plain=lambda: torch.zeros(5), everywhere=None):
        """`everywhere`: the largest difference of this process and of others."""

        def largest(numbers):
            difference, *seconds = numbers.tolist()
            self.asked.append(difference)
            return [difference if everywhere is None else everywhere, *seconds]

        self.ways.compare(self.model, other, plain, tolerance=1e-4, largest=largest, tokens=(100, 30))

    @property
    def packs(self):
        self.ways.settle(None)  # as at the start of the next step
        assert (self.ways.way == PACKED) == is_installed(self.model.config)
        return self.ways.way == PACKED

    @property
    def is_on_trial(self):
        return self.ways.is_on_trial(self.model)


def raising(error):
    def raises():
        raise error

    return raises


def taking(seconds, value=0.0):
    def takes():
        time.sleep(seconds)
        return torch.full((5,), value)

    return takes


FAST, SLOW = taking(0.002), taking(0.02)


# --- is it exact? ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "packs"), [(0.0, True), (1e-4, True), (1.1e-4, False), (math.inf, False), (math.nan, False)]
)
def test_the_mean_difference_of_a_token_decides(caplog, difference, packs):
    decision = Decision()
    decision.compare(lambda: torch.tensor([0.0, 0.0, 0.0, 0.0, -5.0]) * difference)
    assert decision.packs == packs
    assert ("of the first batch differ from those of the plain forward by" in caplog.text) == (not packs)


def test_any_error_of_the_other_forward_alone_is_a_reason_and_is_named(caplog):
    error = TypeError("forward() got an unexpected keyword argument 'pair_stream'\nand more")
    decision = Decision()
    decision.compare(raising(error))
    assert (
        "because it failed with TypeError: forward() got an unexpected keyword argument 'pair_stream'." in caplog.text
    )
    assert not decision.packs
    strict = Decision("true")
    with pytest.raises(ValueError, match="must be exact for this model, but it failed with TypeError") as caught:
        strict.compare(raising(error))
    assert caught.value.__cause__ is error


def test_errors_of_the_plain_forward_and_our_own_mistakes_are_not_hidden():
    with pytest.raises(TypeError, match="not the stream's"):
        Decision().compare(lambda: torch.zeros(5), raising(TypeError("not the stream's")))
    with pytest.raises(AssertionError, match="ours"):
        Decision().compare(raising(AssertionError("ours")))


@pytest.mark.parametrize("other", [lambda: torch.zeros(5), raising(StreamRefused("no")), raising(RowsTooLong("no"))])
def test_all_processes_are_asked_once_whatever_happens(other):
    decision = Decision()
    decision.compare(other, everywhere=math.inf)
    assert len(decision.asked) == 1
    assert not decision.packs  # it failed somewhere, if not here


def test_a_failure_in_another_process_is_said(caplog):
    Decision().compare(lambda: torch.zeros(5), everywhere=math.inf)
    assert "because it failed in another process." in caplog.text


def test_a_first_batch_with_too_long_rows_leaves_the_decision_to_the_next():
    decision = Decision()
    plain = []
    decision.compare(raising(RowsTooLong("long")), lambda: plain.append(0) or torch.zeros(5))
    assert decision.packs
    assert decision.is_on_trial
    assert len(plain) == 2  # as many forwards as where the rows are short
    decision.compare(lambda: torch.ones(5))
    assert not decision.packs
    elsewhere = Decision("true")
    elsewhere.compare(raising(RowsTooLong("long")), everywhere=1e-6)  # other processes had short rows
    assert elsewhere.packs
    assert not elsewhere.is_on_trial


def test_after_packed_rows_come_grouped_ones_and_after_these_padded_ones(caplog):
    decision = Decision()
    decision.compare(lambda: torch.ones(5))
    assert decision.ways.way == GROUPED
    assert decision.ways.of(decision.model, None) == PADDED  # nothing has been compared yet
    decision.compare(lambda: torch.ones(5))
    assert decision.ways.way == PADDED
    assert caplog.text.count("pair_stream: auto takes") == 2
    assert Decision(refuse="of a reason").ways.way == GROUPED
    assert Decision(refuse="of a reason", may_group=False).ways.way == PADDED


# --- is it faster? ---------------------------------------------------------------------------------------------------


def test_a_forward_that_is_clearly_faster_is_settled_by_the_second_batch():
    decision = Decision()
    decision.compare(FAST, SLOW)
    assert decision.is_on_trial  # the first calls of a process are slower
    assert decision.ways.settle(None) is None
    decision.compare(FAST, SLOW)
    assert not decision.is_on_trial
    assert decision.ways.settle(None) == PACKED


def test_a_slower_forward_is_given_up_after_three_timed_batches(caplog):
    decision = Decision()
    with caplog.at_level(logging.INFO, logger="sampo"):
        for _ in range(4):
            assert decision.packs
            decision.compare(SLOW, FAST)
    assert not decision.packs
    assert decision.ways.settle(None) == decision.ways.way == PADDED
    assert "auto takes the plain forward over padded rows, which took" in caplog.text


def test_one_slow_batch_does_not_decide():
    decision = Decision()
    for other in (FAST, SLOW, FAST, FAST):
        decision.compare(other, taking(0.01))
    assert decision.packs


def test_calls_of_more_than_a_second_are_no_warm_up():
    decision = Decision()
    decision.compare(taking(1.01), taking(1.4))
    assert not decision.is_on_trial
    assert decision.packs


def test_true_is_not_timed():
    decision = Decision("true")
    decision.compare(SLOW, FAST)
    assert not decision.is_on_trial
    assert decision.packs


@pytest.mark.parametrize("way", [PACKED, PADDED])
def test_a_resumed_run_takes_the_way_of_its_checkpoint(way):
    decision = Decision()
    assert decision.ways.settle(way) == way
    if way == PADDED:
        assert not decision.packs
        return
    decision.compare(SLOW, FAST)  # still compared, but not timed
    assert not decision.is_on_trial
    assert decision.packs


def test_the_way_is_in_the_checkpoint_and_is_not_timed_again(tmp_path, monkeypatch):
    options = {"save_steps": 6, "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2}

    def train(max_steps, resume):
        args = SamPOConfig(output_dir=str(tmp_path / "run"), max_steps=max_steps, **options)
        trainer = SamPOTrainer(save_model(tmp_path / "model"), args=args, train_dataset=make_pairs(40))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.run_state.way

    way = train(6, None)
    assert way in (PACKED, PADDED)
    monkeypatch.setattr(Ways, "_judge_seconds", raising(AssertionError("must not be timed")))
    assert train(7, str(tmp_path / "run" / "checkpoint-6")) == way


# --- rows grouped by length ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_groups_take_the_fewest_tokens_of_all_divisions(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 7))]
    n_groups = rng.randint(1, len(lengths))
    groups = group_rows(lengths, n_groups)
    assert len(groups) == n_groups
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    found = sum(len(group) * max(lengths[row] for row in group) for group in groups)
    ordered, n = sorted(lengths), len(lengths)
    fewest = min(
        sum((stop - start) * ordered[stop - 1] for start, stop in zip((0, *cuts), (*cuts, n), strict=True))
        for cuts in itertools.combinations(range(1, n), n_groups - 1)
    )
    assert found == fewest


@pytest.mark.parametrize("head", ["positions", "labels"])
def test_grouped_rows_have_the_log_probs_statistics_and_gradients_of_padded_ones(head):
    batch = collate([(3, 4, 7), (1, 9, 2), (6, 1, 1), (2, 20, 3)], seed=3)
    rows, found = Rows(batch), []
    other = torch.randint(4, 60, rows.mask.shape, generator=torch.Generator().manual_seed(0))
    for options in ({"pair_stream": "auto", "refuse": "of a test"}, {"pair_stream": "false"}):
        model = make_model(seed=1)
        ModelScorer(model, pair_stream="false")
        widths = []
        model.model.embed_tokens.register_forward_hook(lambda _, args, __, widths=widths: widths.append(args[0].shape))
        scorer = Scorer([model], head=head, **options)
        scorer(model, rows, rows.mask, batch["input_ids"][:, 1:], other)
        scorer.ways.settle(GROUPED)
        widths.clear()
        scores = scorer(model, rows, rows.mask, batch["input_ids"][:, 1:], other)
        scores.log_probs[0].sum().backward()
        output = scores.output
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([*scores.log_probs, output.entropy, output.mean_logits, output.is_top1, *gradients])
        found[-1].append(sum(shape.numel() for shape in widths))
    *grouped, grouped_tokens = found[0]
    *padded, padded_tokens = found[1]
    for a, b in zip(grouped, padded, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert grouped_tokens < 0.7 * padded_tokens


def test_what_has_no_row_for_each_row_cannot_be_grouped():
    options = {"input_ids": torch.zeros(4, 6), "pixel_values": torch.zeros(9, 3)}
    with pytest.raises(ValueError, match="`pixel_values` must have a row for each of the batch's 4, got 9"):
        take_rows(options, [0, 2], 3)
