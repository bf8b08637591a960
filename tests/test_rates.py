"""Which characters are missing from a text: the estimate, and its use."""

import math

import pytest
import torch
from helpers import seeded

from lib.rates import missing_rates, weighted


def knowing(tokens, V, block_size, odds):
    """A predictor that reads tokens (T,) in parts of block_size, one per call, and gives each right
    answer odds times the probability of any other."""
    parts = iter(tokens.split(block_size))

    def model(x):
        right = torch.nn.functional.one_hot(next(parts), V + 1)[None]      # (1, T, V + 1)
        assert right.shape[:2] == x.shape
        return right * math.log(odds)
    return model


def rate(missing, left, share, smoothing):
    """The documented estimate: besides the tokens that are missing or left, so many more missing
    occurrences are counted, at the average rate."""
    return (missing + smoothing) / (missing + left + smoothing / share)


@pytest.mark.parametrize("smoothing", [0.5, 2, 300])
def test_a_model_that_is_certain_gives_the_counts(smoothing):
    """Then what is missing can be counted: 40 of 50 zeros and 5 of 30 ones are, and none of 20
    twos; so 45 of 100 tokens."""
    tokens = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    x = tokens.clone()
    x[:40] = x[50:55] = 3
    model = knowing(tokens, 3, 100, odds=1e15)
    rates = missing_rates(model, x, 3, block_size=100, smoothing=smoothing)
    expected = [rate(missing, left, 0.45, smoothing)
                for missing, left in ((40, 10), (5, 25), (0, 20))]
    assert rates.tolist() == pytest.approx(expected, rel=1e-9)


def test_by_default_two_more_missing_occurrences_of_each_token_are_counted():
    """Half of the text is missing, so these are two of four."""
    tokens = torch.tensor([0] * 8 + [1] * 2)
    x = tokens.clone()
    x[:5] = 2
    rates = missing_rates(knowing(tokens, 2, 10, odds=1e15), x, 2, block_size=10)
    assert rates.tolist() == pytest.approx([(5 + 2) / (8 + 4), (0 + 2) / (2 + 4)], rel=1e-9)


def em_by_hand(p, left, length, smoothing, rounds=10):
    """Expectation maximization in plain loops. p: the model's probabilities, a list for each
    hole."""
    share = len(p) / length
    rates = [share] * len(left)
    for _ in range(rounds):
        missing = [0.0] * len(left)
        for hole in p:
            total = sum(q * r for q, r in zip(hole, rates))
            for token, q in enumerate(hole):
                missing[token] += q * rates[token] / total
        rates = [rate(m, n, share, smoothing) for m, n in zip(missing, left)]
    return rates


@pytest.mark.parametrize("block_size", [5, 7, 12, 60])
def test_rates_are_those_of_expectation_maximization_by_hand(block_size):
    """With probabilities that differ from hole to hole, and holes in several blocks."""
    g = seeded(3)
    x = torch.randint(3, (60,), generator=g)
    x[torch.rand(60, generator=g) < 0.4] = 3
    logits = torch.randn(60, 4, generator=g, dtype=torch.float64)
    parts = iter(logits.split(block_size))
    rates = missing_rates(lambda _: next(parts)[None], x, 3, block_size, smoothing=2)
    p = logits[x == 3][:, :3].softmax(dim=-1).tolist()
    left = [int((x == token).sum()) for token in range(3)]
    assert rates.tolist() == pytest.approx(em_by_hand(p, left, 60, 2), rel=1e-9)
    assert rates.tolist() != pytest.approx(em_by_hand(p, left, 60, 2, rounds=5), rel=1e-3)


def test_rates_find_the_tokens_that_were_taken_out():
    """Even by a model that is wrong about most of them. And none is ruled out."""
    V, tokens = 6, torch.randint(6, (600,), generator=seeded())
    x = tokens.where(tokens > 1, V)
    model = knowing(tokens, V, block_size=256, odds=2)
    assert float(model(x[None, :256])[0, 0, :V].softmax(-1).max()) < 0.3
    rates = missing_rates(knowing(tokens, V, 256, odds=2), x, V, block_size=256)
    assert rates.shape == (V,) and (rates[:2] > 0.9).all() and (rates[2:] < 0.1).all()
    assert (rates > 1e-4).all()


@pytest.mark.parametrize("missing", [1, 6, 20])
def test_rates_are_equal_where_tokens_are_missing_at_equal_rates(missing):
    """Then they change no answer: a factor of all probabilities alike. Of five tokens, each occurs
    20 times; up to all of them are missing."""
    tokens = torch.arange(5).repeat_interleave(20)
    x = tokens.where(torch.arange(100) % 20 >= missing, 5)
    rates = missing_rates(knowing(tokens, 5, 100, odds=1e15), x, 5, block_size=100)
    assert rates.tolist() == pytest.approx([missing / 20] * 5)


def test_rates_are_about_equal_where_tokens_are_missing_at_random():
    tokens = torch.arange(5).repeat_interleave(4_000)
    x = tokens.where(torch.rand(20_000, generator=seeded()) >= 0.3, 5)
    rates = missing_rates(knowing(tokens, 5, 1_000, odds=1e6), x, 5, block_size=1_000)
    assert rates.max() / rates.min() < 1.1


def test_a_short_text_moves_the_rates_less_than_a_long_one():
    """Three of four zeros are missing and none of four ones: in all, 3/8."""
    found = []
    for times in (1, 10, 1000):
        tokens = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).repeat(times)
        x = torch.tensor([2, 2, 2, 0, 1, 1, 1, 1]).repeat(times)
        model = knowing(tokens, 2, 8 * times, odds=1e15)
        found.append(missing_rates(model, x, 2, block_size=8 * times).tolist())
    zeros, ones = zip(*found)
    assert 3 / 8 < zeros[0] < zeros[1] < zeros[2] == pytest.approx(3 / 4, abs=0.01)
    assert 3 / 8 > ones[0] > ones[1] > ones[2] == pytest.approx(0, abs=0.01)


def test_weighted_probabilities_are_in_proportion_to_the_rates():
    rates = torch.tensor([0.5, 1.0, 0.25]).double()
    logits = torch.randn(2, 5, 4, generator=seeded())
    new = weighted(lambda idx: logits, rates)(None)
    p, expected = new[..., :3].softmax(-1), logits[..., :3].softmax(-1) * rates
    assert torch.allclose(p, expected / expected.sum(-1, keepdim=True))
    assert torch.equal(new[..., 3].float(), logits[..., 3])  # [MASK]'s own logit stays
