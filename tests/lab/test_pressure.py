import numpy as np
import pytest
import torch
from oracles import dataset_budget
from oracles import weights as weights_of

from sampo.lab import model as lm
from sampo.lab.methods import STUDY_METHODS
from sampo.lab.pressure import logistic_slope, mean_pressures, mean_weights
from sampo.lab.world import EOS, World
from sampo.weighting import WEIGHTINGS, draw_keys, token_weights


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def start(world):
    rows = [(question.prompt, answer) for question, answer in world.demonstrations(2000)]
    return lm.train_supervised(rows, steps=25, seed=0)


class Shifted(torch.nn.Module):
    """A model whose logit of the end token is higher by a constant."""

    def __init__(self, model, shift):
        super().__init__()
        self.model, self.config, self.shift = model, model.config, shift

    def forward(self, **kwargs):
        output = self.model(**kwargs)
        output.logits[..., EOS] += self.shift
        return output


@torch.no_grad()
def token_logps(model, prompt, answer):
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(dim=1)[range(len(answer)), answer].numpy()


def naive_weights(t_w, t_l, options, end_probs, totals):
    """Weights of the chosen and of the rejected answer, token by token: random ones by their mean."""
    balanced = options.get("balance_end_token", False)
    name, keeps = options["token_weighting"], options.get("keep_end_token", balanced)
    sides = []
    for own, other, is_chosen in ((t_w, t_l, True), (t_l, t_w, False)):
        if name == "all":
            side = [1.0 if t < min(own, other) else options.get("ld_alpha", 1.0) for t in range(own)]
        else:
            end = own - 1 if keeps and name in ("sampo", "expected") else None
            whole = is_chosen and options.get("sampled_sides") == "rejected"
            gamma = options.get("decay_gamma", 1.0)
            mean = "expected" if name == "sampo" else name
            budget = None
            if options.get("token_budget") == "dataset":
                budget = dataset_budget(mean, own, *(totals if is_chosen else totals[::-1]), key=0)
            tail = options.get("ld_tail_weight")
            side = weights_of(mean, own, other, end=end, whole=whole, gamma=gamma, tail=tail, budget=budget)
        if balanced:
            p = end_probs[len(sides)]
            side[-1] = sum(w * q for w, q in zip(side[:-1], p[:-1], strict=True)) / (1 - p[-1])
        sides.append(np.array(side))
    return sides


WITH_PRESSURE = [
    name for name, method in STUDY_METHODS.items() if not WEIGHTINGS[method.options["token_weighting"]].needs_policy
]


@pytest.mark.parametrize("name", WITH_PRESSURE)
def test_the_pressure_is_the_derivative_of_the_weighted_margin_by_the_end_logit(world, start, name):
    options = STUDY_METHODS[name].options
    pairs = world.annotated_pairs(25, bias=0.5)
    rows = [(p.question.prompt, p.chosen) for p in pairs] + [(p.question.prompt, p.rejected) for p in pairs]
    probs = lm.end_probs(start, rows)
    totals = sum(len(p.chosen) for p in pairs), sum(len(p.rejected) for p in pairs)
    found = mean_pressures([p.chosen for p in pairs], [p.rejected for p in pairs], probs, options)
    step = 0.05  # the logits are float32
    for i, pair in enumerate(pairs):
        both = (probs[i], probs[25 + i])
        weights = naive_weights(len(pair.chosen), len(pair.rejected), options, both, totals)
        margins = []
        for shift in (-step, step):
            model = Shifted(start, shift)
            chosen, rejected = (
                token_logps(model, pair.question.prompt, side) for side in (pair.chosen, pair.rejected)
            )
            margins.append((weights[0] * chosen).sum() - (weights[1] * rejected).sum())
        if options.get("balance_end_token"):
            assert found["pressure"][i] == pytest.approx(0, abs=1e-6)
        assert found["pressure"][i] == pytest.approx((margins[1] - margins[0]) / (2 * step), abs=2e-3)
        penalty = options.get("length_penalty", 0.0)
        logit = 0.0 if penalty == "learned" else penalty * pair.length_difference
        assert found["push"][i] == pytest.approx(found["pressure"][i] * 2 / (1 + np.exp(logit)))


def test_the_mean_weight_of_a_random_subset_is_the_mean_over_its_draws():
    lengths = [9, 4, 5, 7]  # two pairs, chosen ones first
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    end = torch.arange(9) == torch.tensor(lengths)[:, None] - 1
    ids = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"keep_end_token": True}, {"sampled_sides": "rejected"}):
        draws = [
            token_weights("sampo", mask, end=end, keys=draw_keys(ids, torch.ones(4, 10), seed=s, epoch=0), **options)
            for s in range(1000)
        ]
        expected = mean_weights(lengths, {"token_weighting": "sampo", **options})
        assert torch.stack(draws).mean(dim=0).numpy() == pytest.approx(
            expected.numpy(), abs=0.065
        )  # four standard errors of a coin


def test_the_logistic_slope_is_the_best_of_a_fine_grid_and_needs_both_signs():
    rng = np.random.default_rng(0)
    for true in (0.0, 0.05, -0.4, 3.0):
        gap = rng.normal(size=400) * 10
        signed = np.where(rng.random(400) < 1 / (1 + np.exp(-true * gap)), gap, -gap)
        if signed.min() > 0:
            continue
        slope = logistic_slope(signed)
        grid = slope + np.linspace(-0.5, 0.5, 1001) * max(abs(slope), 0.1)
        likelihood = [-np.logaddexp(0, -s * signed).sum() for s in grid]
        assert np.argmax(likelihood) == 500
    with pytest.raises(ValueError, match="needs pairs with longer and with shorter chosen answers"):
        logistic_slope([3, 1, 2])
