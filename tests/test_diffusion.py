"""The method, as tests: what diffusion.py computes, checked against values that are known exactly.

Two mask predictors make that possible. In a Table (conftest.py), every probability follows from a
joint distribution that is known. A Lookup (helpers.py) is any predictor at all: it has a
distribution of its own for each place of each input, and these need not agree with each other. Both
are so small that all texts, all ways to mask one and all orders to write one can be enumerated.
Sampled frequencies are compared with exact probabilities by Pearson's test (assert_distribution),
and each such test shows that it could tell a wrong distribution (assert_not_distribution). The same
goes for test_likelihood.py, test_llada.py and test_twin.py.
"""

import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Table, assert_distribution, assert_not_distribution, pearson
from helpers import (
    ORDERS,
    Lookup,
    all_texts,
    assert_mean,
    constant,
    count,
    counting,
    enumerate_nelbo,
    kinds_of_pages,
    last,
    linear,
    places_written,
    seeded,
    sure_by_place,
    uniform_model,
)

import diffusion
from diffusion import diffusion_loss, estimate_nelbo, forward_process, unmask
from lib.likelihood import exact_nll

M = 2  # [MASK], where the tokens are 0 and 1


# -----------------------------------------------------------------------------
# the forward process and the loss

def test_every_token_is_masked_with_probability_p_mask_and_nothing_else_changes():
    input_ids = torch.randint(9, (400, 500), generator=seeded())
    noisy_batch, masked_indices, p_mask = forward_process(input_ids, 9, 0.01, seeded())
    assert noisy_batch.shape == masked_indices.shape == p_mask.shape == (400, 500)
    assert torch.equal(p_mask, p_mask[:, :1].expand(400, 500))  # one t for a row
    assert (noisy_batch[masked_indices] == 9).all()
    assert torch.equal(noisy_batch[~masked_indices], input_ids[~masked_indices])
    p = p_mask[:, 0]
    z = (masked_indices.double().mean(1) - p) / (p * (1 - p) / 500).sqrt()
    z = z[p < 0.99]  # nearer to 1, z is far from normal
    assert z.abs().max() < 4.5 and abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.15
    # independent tokens
    neighbours = (masked_indices[:, 1:] == masked_indices[:, :-1]).double().mean()
    expected = (p_mask**2 + (1 - p_mask)**2).double().mean()
    torch.testing.assert_close(neighbours, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("eps, p_max", [(1e-3, 1.0), (0.3, 1.0), (0.3, 0.8)])
def test_t_is_uniform_in_every_row_and_stratified_over_the_batch(eps, p_max):
    """t is read off p_mask = (p_max - eps) * t + eps."""
    g, B = seeded(), 8
    input_ids = torch.zeros(B, 1, dtype=torch.long)
    p_mask = torch.stack([forward_process(input_ids, 1, eps, g, p_max)[2][:, 0]
                          for _ in range(4000)])                                     # (4000, B)
    t = (p_mask.double() - eps) / (p_max - eps)
    assert t.min() > -1e-6 and t.max() < 1 + 1e-6
    part = (t * B).floor().long().clamp(0, B - 1)
    stratified = (part.sort(dim=1).values == torch.arange(B)).all(dim=1)
    assert stratified.double().mean() > 0.999      # one in each part, but for rounding
    tenths, eighths = torch.full((10,), 0.1), torch.full((B,), 1 / B)
    for row in (0, 3, B - 1):
        assert_distribution(torch.histc(t[:, row], 10, 0, 1), tenths)
        assert_distribution(torch.bincount(part[:, row], minlength=B), eighths)
    within = torch.histc((t[:, 5] * B) % 1, 10, 0, 1)   # its place in its part is uniform, too
    assert_distribution(within, tenths)
    assert_not_distribution(torch.histc(t[:, 0] ** 2, 10, 0, 1), tenths)


def test_the_same_generator_masks_the_same():
    input_ids = torch.randint(9, (8, 50), generator=seeded())
    first, same, other = (forward_process(input_ids, 9, 0.01, seeded(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_loss_by_hand():
    """Two rows, p_mask 0.5 and 1; masked: one token of the first row, both of the second; [MASK]'s
    logit is cut off."""
    logits = torch.tensor([[1.0, 3.0, 99.0]]).log()  # p = 1/4, 3/4
    input_ids = torch.tensor([[0, 1], [0, 1]])
    noisy_batch = torch.tensor([[0, M], [M, M]])
    p_mask = torch.tensor([[0.5, 0.5], [1.0, 1.0]])

    def model(x):
        assert torch.equal(x, noisy_batch)
        return logits.expand(2, 2, 3)
    loss = diffusion_loss(model, M, input_ids, noisy_batch, noisy_batch == M, p_mask)
    by_hand = (math.log(4 / 3) / 0.5 + (math.log(4) + math.log(4 / 3)) / 1) / 4
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)


# -----------------------------------------------------------------------------
# the bound (NELBO)

V3, WINDOWS = 3, torch.randint(3, (5, 4), generator=seeded(3))  # [MASK], and 5 windows of 4 tokens


def test_the_integral_over_t_and_the_mean_over_numbers_of_masks_are_the_same_bound():
    model = Lookup(4, V3)
    assert enumerate_nelbo(model, WINDOWS, V3) == pytest.approx(
        enumerate_nelbo(model, WINDOWS, V3, p_range=(0, 1)), abs=1e-12)


@pytest.mark.parametrize("eps, p_max", [(1e-3, 1.0), (0.2, 1.0), (0.4, 0.75)])
def test_the_expected_loss_is_the_integral_cut_at_eps_and_p_max(eps, p_max):
    model, g = Lookup(4, V3), seeded()
    many = WINDOWS.repeat(2000, 1)
    losses = [diffusion_loss(model, V3, many, *forward_process(many, V3, eps, g, p_max)).item()
              for _ in range(40)]
    assert_mean(losses, enumerate_nelbo(model, WINDOWS, V3, (eps, p_max)))


def test_estimate_nelbo_converges_to_the_exact_value():
    model = Lookup(4, V3)
    exact = enumerate_nelbo(model, WINDOWS, V3)
    mean, se = estimate_nelbo(model, WINDOWS, V3, passes=3000)
    assert abs(mean - exact) < 4 * se < 0.05 * exact


def test_its_standard_error_is_honest():
    model = Lookup(4, V3)
    means = [estimate_nelbo(model, WINDOWS, V3, passes=10, seed=s) for s in range(300)]
    spread, claimed = np.std([m for m, _ in means]), np.mean([se for _, se in means])
    assert 0.85 < spread / claimed < 1.18


def test_the_same_seed_gives_every_model_the_same_masks():
    runs = []
    for table, seed in ((0, 0), (1, 0), (0, 1)):
        model, calls = counting(Lookup(4, V3, seed=table))
        runs.append((estimate_nelbo(model, WINDOWS, V3, passes=3, seed=seed), torch.cat(calls)))
    (first, masks), (other_model, same_masks), (other_seed, other_masks) = runs
    assert torch.equal(masks, same_masks) and not torch.equal(masks, other_masks)
    assert len({first, other_model, other_seed}) == 3


def test_each_pass_has_every_number_of_masks_equally_often():
    windows = torch.zeros(12, 4, dtype=torch.long)
    model, calls = counting(constant(0.0, 0.0, 0.0))
    mean, se = estimate_nelbo(model, windows, M, passes=3, batch_size=5)
    assert [len(x) for x in calls] == [5, 5, 2] * 3
    for one_pass in torch.cat(calls).view(3, 12, 4):
        assert (one_pass == M).sum(1).bincount().tolist() == [0, 3, 3, 3, 3]
    assert mean == pytest.approx(math.log(2), rel=1e-6) and se < 1e-6  # any mask of a coin costs it


def test_the_bound_is_the_entropy_where_the_predictor_is_right():
    """There it is tight: an exact value from the maths, not from this code."""
    table = Table(T=3, V=2)
    p = table.joint.detach()
    counts = (p * 2000).round().long()
    windows = table.outcomes.repeat_interleave(counts, dim=0)
    entropy = -(counts / counts.sum() * p.log()).sum() / 3
    mean, se = estimate_nelbo(table, windows, M, passes=30)
    assert abs(mean - entropy) < 4 * se < 0.02


# -----------------------------------------------------------------------------
# sampling: exact distributions

@pytest.mark.parametrize("remasking", ["random", "dilated"])  # the order must not look at the text
def test_one_token_a_step_samples_the_joint_distribution(remasking):
    table = Table()
    states = unmask(table, torch.full((20_000, 3), M), M, 3, 1.0, remasking, generator=seeded())
    got = count(last(states), V=2)
    assert_distribution(got, table.joint)
    assert_not_distribution(got, torch.full((8,), 1 / 8))


def test_one_step_samples_the_product_of_the_marginals():
    table = Table()
    got = count(last(unmask(table, torch.full((20_000, 3), M), M, steps=1, generator=seeded())), 2)
    one = torch.stack([table.joint[table.outcomes[:, i] == 1].sum() for i in range(3)]).detach()
    assert_distribution(got, torch.where(table.outcomes == 1, one, 1 - one).prod(1))
    assert_not_distribution(got, table.joint)


def test_a_hole_is_filled_from_the_conditional():
    table = Table()
    x = torch.tensor([1, M, 0]).expand(20_000, 3)
    got = count(last(unmask(table, x, M, steps=5, generator=seeded())), V=2)
    p = table.joint * (table.outcomes[:, 0] == 1) * (table.outcomes[:, 2] == 0)
    assert_distribution(got, p / p.sum())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_token_is_drawn_from_softmax_of_logits_over_temperature(temperature):
    model, p = constant(0.0, 1.0, 2.0, 99.0), torch.tensor([0.0, 1.0, 2.0]).double() / temperature
    x = last(unmask(model, torch.full((20_000, 1), 3), 3, 1, temperature, generator=seeded()))
    got = torch.bincount(x.flatten(), minlength=4)[:3]
    assert_distribution(got, p.softmax(0))
    assert_not_distribution(got, (1.2 * p).softmax(0))


def test_temperature_0_is_the_likeliest_token():
    table = Table()
    x = torch.full((50, 3), M)
    greedy = last(unmask(table, x, M, steps=1, temperature=0, generator=seeded()))
    assert (greedy == table(torch.full((1, 3), M))[0, :, :2].argmax(-1)).all()


def test_the_noise_is_float64(monkeypatch):
    """A draw of 1 - 2**-40 is Gumbel noise of 40 ln 2 = 27.7: more than a logit of 27.3 and the
    other's noise of 0.37, less than one of 27.4. float32 has no number between 1 - 2**-24 and 1, so
    there the same draw is cut to 16.6 or becomes infinite."""
    def rand(*shape, dtype=torch.float32, generator=None, device=None):
        u = torch.full(*shape, 0.5, dtype=dtype)
        u[..., 0] = torch.tensor(1 - 2.0**-40, dtype=torch.float64)
        return u
    monkeypatch.setattr(torch, "rand", rand)
    for logit, winner in ((27.3, 0), (27.4, 1)):
        x = last(unmask(constant(0.0, logit, 0.0), torch.tensor([[M]]), M, 1))
        assert x.item() == winner


def test_the_same_seed_writes_the_same_text():
    x = torch.full((5, 4), 3)
    runs = [last(unmask(Table(T=4, V=3), x, 3, 2, generator=seeded(s))) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# -----------------------------------------------------------------------------
# which places, and how many at a time

@pytest.mark.parametrize("remasking", ORDERS)
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 100])
def test_every_schedule_is_even_and_complete(steps, remasking):
    """20 masks in each row. All passes write equally many, or the first ones one more."""
    x = torch.full((3, 24), 5)
    x[0, :4], x[1, 10:14], x[2, ::6] = 1, 2, 3
    before, numbers = x.clone(), []
    for state in unmask(uniform_model, x, 5, steps, remasking=remasking, generator=seeded()):
        assert torch.equal(state[x != 5], x[x != 5])  # what was given or decided stays
        [number] = {int(n) for n in ((x == 5) & (state != 5)).sum(1)}
        numbers.append(number)
        x = state
    assert (x < 5).all() and torch.equal(x[before != 5], before[before != 5])
    assert len(numbers) == min(steps, 20)
    assert numbers == sorted(numbers, reverse=True) and numbers[0] - numbers[-1] <= 1


def test_rows_may_have_different_numbers_of_masks():
    x = torch.tensor([[5, 5, 5, 5], [1, 5, 2, 3], [1, 2, 3, 4]])
    states = list(unmask(uniform_model, x, 5, steps=4, generator=seeded()))
    assert len(states) == 4 and (states[-1] < 5).all() and torch.equal(states[-1][2], x[2])


@pytest.mark.parametrize("revise", [0.0, 0.5])
def test_nothing_to_write_needs_no_pass(revise):
    x = torch.tensor([[0, 1]])
    states = list(unmask(lambda x: 1 / 0, x, M, 3, revise=revise))
    assert all(torch.equal(state, x) for state in states) and (revise or states == [])


def test_low_confidence_writes_the_surest_first():
    x = torch.full((1, 4), 3)
    model = sure_by_place(0.4, 0.9, 0.6, 0.8)
    assert places_written([x, *unmask(model, x, 3, 4, 0, "low_confidence")]) == [[1], [3], [2], [0]]


def test_random_order_is_random():
    """Which of 4 places a row writes first: each as often as the others, and not one after the
    other."""
    x = torch.full((8000, 4), 5)
    first, second, *_ = unmask(uniform_model, x, 5, 4, remasking="random", generator=seeded())
    i, j = (first != 5).int().argmax(1), ((second != 5) & (first == 5)).int().argmax(1)
    pairs = torch.bincount(4 * i + j, minlength=16)
    assert_distribution(pairs, (1 - torch.eye(4)).flatten() / 12)


@pytest.mark.parametrize("remasking, apart", [("dilated", True), ("random", False)])
def test_dilated_writes_far_apart(remasking, apart):
    """8 of 256 places a step: multiples of the golden ratio that fall into 1/32 of the circle are
    21 apart or more, since it takes the Fibonacci number 21 for one to come that close to where it
    was. Counts that round leave a little less than that."""
    x, least = torch.full((5, 256), 5), 256
    for state in unmask(uniform_model, x, 5, 32, remasking=remasking, generator=seeded()):
        for row in (state != x):
            least = min(least, int(row.nonzero().flatten().diff().min()))
        x = state
    assert (least >= 13) == apart


def test_dilated_begins_elsewhere_in_every_row():
    first = next(unmask(uniform_model, torch.full((200, 8), 5), 5, 8, remasking="dilated",
                        generator=seeded()))
    assert ((first != 5).sum(0) > 0).all() and ((first != 5).sum(1) == 1).all()


def test_a_threshold_keeps_all_that_is_surer_and_at_least_what_the_schedule_wants():
    x, model = torch.full((1, 6), 3), sure_by_place(0.99, 0.5, 0.9, 0.6, 0.95, 0.7)

    def order(steps, threshold, remasking="low_confidence"):
        states = unmask(model, x, 3, steps, 0.0, remasking, threshold=threshold)
        return places_written([x, *states])
    assert order(6, 1.0) == [[0], [4], [2], [5], [3], [1]]
    assert order(6, 0.8) == [[0, 2, 4], [5], [3], [1]]
    assert order(3, 0.8) == [[0, 2, 4], [3, 5], [1]]           # two a step
    assert order(3, 0.98) == [[0, 4], [2, 5], [1, 3]]          # 4 is not that sure, but scheduled
    first, *others = order(6, 0.8, "random")                   # whatever the order
    assert {0, 2, 4} <= set(first) and len(first) <= 4 and all(len(new) == 1 for new in others)
    coin = constant(0.0, 0.0, 0.0)                             # 1/2 is not above 1/2
    assert len(list(unmask(coin, torch.full((1, 6), M), M, 6, threshold=0.5))) == 6


@pytest.mark.parametrize("remasking", ORDERS)
def test_a_threshold_of_0_is_one_pass_and_of_1_changes_nothing(remasking):
    x = torch.full((5, 6), M)

    def states(**settings):
        return list(unmask(Lookup(6, 2), x, M, 6, remasking=remasking, generator=seeded(),
                           **settings))
    at_0, at_1, without = states(threshold=0.0), states(threshold=1.0), states()
    assert len(at_0) == 1 and (at_0[0] != M).all() and len(without) == 6
    assert all(torch.equal(a, b) for a, b in zip(at_1, without, strict=True))


def test_a_surer_model_needs_fewer_passes_with_a_threshold():
    passes = []
    for sharpness in (0.0, 0.5, 2.0, 20.0):
        lookup = Lookup(6, 2)
        model, calls = counting(lambda x, lookup=lookup, s=sharpness: s * lookup(x))
        *_, x = unmask(model, torch.full((1, 6), M), M, 6, 0.0, threshold=0.9)
        assert (x != M).all()
        passes.append(len(calls))
    assert passes[0] == 6 and passes == sorted(passes, reverse=True) and passes[-1] <= 2


# -----------------------------------------------------------------------------
# revision

def test_revision_comes_after_the_draft_and_becomes_less():
    """The predictor answers with the number of the pass, so that what a pass writes can be told
    from what stood there."""
    passes, seen = itertools.count(), []

    def model(x):
        seen.append((x == 20).sum(1))
        return F.one_hot(torch.full(x.shape, next(passes)), 21) * 50.0
    x = torch.full((3, 40), 20)
    x[:, ::4], x[2, :20] = 0, 0                                      # 30, 30 and 15 masks
    given = x != 20
    states = list(unmask(model, x, 20, 20, revise=0.4, generator=seeded()))
    assert len(seen) == 20 and len(states) == 35 and all((s[given] == 0).all() for s in states)
    assert [int(n[0]) for n in seen[:5]] == list(range(30, 0, -6)) and (states[4] < 20).all()
    # 0.4 * 30 * (15, 14, ... 1) / 15, rounded up
    assert [int(n[0]) for n in seen[5:]] == [12, 12, 11, 10, 9, 8, 8, 7, 6, 5, 4, 4, 3, 2, 1]
    assert [int(n[2]) for n in seen[5:]] == [6, 6, 6, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2, 1, 1]
    for step, again, state in zip(range(5, 20), states[5::2], states[6::2], strict=True):
        assert torch.equal((again == 20).sum(1), seen[step])
        assert torch.equal(state == step, again == 20)               # that is written anew
        assert torch.equal(state[again != 20], again[again != 20])   # and nothing else


@pytest.mark.parametrize("steps", [5, 8, 24])
def test_what_is_masked_again_is_shown(steps):
    """More states than passes: each extra one has more masks than the one before it."""
    model, calls = counting(uniform_model)
    x = torch.full((2, 16), 5)
    x[:, :4] = 1
    states = [x, *unmask(model, x, 5, steps, revise=0.5, generator=seeded())]
    more = [bool(((b == 5).sum(1) > (a == 5).sum(1)).all()) for a, b in itertools.pairwise(states)]
    fewer = [bool(((b == 5).sum(1) < (a == 5).sum(1)).all()) for a, b in itertools.pairwise(states)]
    draft = {5: 2, 8: 2, 24: 6}[steps]
    assert len(calls) == sum(fewer) == steps and sum(more) == steps - draft
    assert len(states) - 1 == steps + sum(more)
    assert more == [False] * draft + [True, False] * (steps - draft)
    assert fewer == [not again for again in more] and (states[-1] < 5).all()
    for seen, before in zip(calls, (a for a, f in zip(states, fewer) if f), strict=True):
        assert torch.equal(seen, before)  # a pass reads the state that was shown before it


def test_what_was_improbable_is_masked_again_more_often():
    """Of three places, written with p = 1/2, 1/2 and 1 (but for 1e-9), one is masked again. The
    order in which they are kept is drawn with odds of p, so place 2 is the last one with
    probability 2 * (1/2 / 2) * (1/2 / 1.5) = 1/6."""
    logits = torch.tensor([[0.0, 0.0, -20.0], [0.0, 0.0, -20.0], [0.0, -20.0, -20.0]])
    model, calls = counting(lambda x: logits.expand(*x.shape, 3))
    last(unmask(model, torch.full((8000, 3), M), M, 2, revise=0.1, generator=seeded()))
    assert (calls[0] == M).all() and ((calls[1] == M).sum(1) == 1).all()
    again = (calls[1] == M).sum(0)
    assert_distribution(again, [5 / 12, 5 / 12, 1 / 6])
    assert_not_distribution(again, [1 / 3, 1 / 3, 1 / 3])


def test_what_counts_is_the_probability_when_it_was_written():
    """One of two places is written with p = 1/2; after that the model is sure of both. The first is
    masked again 2 times in 3."""
    seen = []

    def model(x):
        seen.append(x)
        logits = torch.tensor([0.0, 0.0 if len(seen) == 1 else -20.0, 0.0])
        return logits.expand(*x.shape, 3)
    last(unmask(model, torch.full((8000, 2), M), M, 5, revise=0.1, generator=seeded()))
    first, again = seen[1] != M, seen[2] == M
    assert (first.sum(1) == 1).all() and (again.sum(1) == 1).all()
    same = int((first == again).all(1).sum())
    assert_distribution([same, 8000 - same], [2 / 3, 1 / 3])
    assert_not_distribution([same, 8000 - same], [1 / 2, 1 / 2])


def test_revision_repairs():
    """The table's tokens depend on each other, so one pass for all of them is far from its
    distribution; revising one random place at a time, at temperature 1, leads back to it (Gibbs
    sampling)."""
    table = Table(seed=1)
    x, joint = torch.full((4000, 3), M), table.joint.detach()
    draft = count(last(unmask(table, x, M, steps=1, generator=seeded())), V=2)
    mended = count(last(unmask(table, x, M, steps=24, revise=1e-9, generator=seeded())), V=2)
    assert pearson(mended, joint) < pearson(draft, joint) / 3


# -----------------------------------------------------------------------------
# odd logits, and all settings together

@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=0), dict(threshold=0.4), dict(revise=0.5, remasking="low_confidence")])
def test_minus_infinity_is_a_probability_of_0(settings):
    model, x = constant(0.0, -torch.inf, 0.0, 5.0), torch.full((50, 4), 3)
    x = last(unmask(model, x, 3, 4, generator=seeded(), **settings))
    assert ((x == 0) | (x == 2)).all()


@pytest.mark.parametrize("remasking", ORDERS)
@pytest.mark.parametrize("revise", [0.0, 0.3])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_all_settings_go_together(remasking, revise, threshold):
    predictor = linear(12, 6)
    for page, steps, temperature in itertools.product(kinds_of_pages(12, 6), (1, 4, 15),
                                                      (0.0, 1.0)):
        x, (model, calls) = page.repeat(2, 1), counting(predictor)
        given, n_masks, before = x != 6, int((page == 6).sum()), x.clone()
        settings = (steps, temperature, remasking, revise, threshold)
        states = list(unmask(model, x, 6, *settings, seeded()))
        again = list(unmask(predictor, x, 6, *settings, seeded()))
        assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
        assert 1 <= len(calls) <= steps and (states[-1] < 6).all() and (states[-1] >= 0).all()
        assert all(torch.equal(state[given], x[given]) for state in states)
        assert torch.equal(x, before)
        if not revise:
            assert len(states) == len(calls) <= min(steps, n_masks)
        if not revise and threshold == 1:
            assert len(calls) == min(steps, n_masks)


def test_an_unknown_order_is_refused_by_name():
    message = "remasking must be random, dilated or low_confidence, not best"
    with pytest.raises(ValueError, match=message):
        last(unmask(uniform_model, torch.full((1, 4), 5), 5, 2, remasking="best"))


# -----------------------------------------------------------------------------
# the file as a tool: copied into another project, and edited

TRAIN_A_TABLE = """
import torch
from diffusion import diffusion_loss, forward_process, unmask

torch.set_num_threads(1)
mask_id, T = 2, 2                                           # texts of two tokens, 0 or 1
joint = torch.tensor([[0.4, 0.1], [0.05, 0.45]])            # of the first and the second
outcomes = torch.cartesian_prod(torch.arange(2), torch.arange(2))
generator = torch.Generator().manual_seed(0)
logits = torch.zeros(9, T, 3, requires_grad=True)           # a row for each input

def model(x):
    return logits[3 * x[:, 0] + x[:, 1]]

for i in range(500):
    rows = torch.multinomial(joint.flatten(), 1024, replacement=True, generator=generator)
    batch = outcomes[rows]
    masks = forward_process(batch, mask_id, generator=generator)
    [gradient] = torch.autograd.grad(diffusion_loss(model, mask_id, batch, *masks), logits)
    logits = (logits - 15 * (1 - i / 500) * gradient).detach().requires_grad_()

def p(*x):
    return model(torch.tensor([x]))[0, :, :mask_id].softmax(-1).tolist()

print([*p(2, 2), p(2, 0)[0], p(2, 1)[0], p(0, 2)[1], p(1, 2)[1]])
*_, x = unmask(model, torch.full((10_000, T), mask_id), mask_id, steps=T, generator=generator)
print((2 * x[:, 0] + x[:, 1]).bincount(minlength=4).tolist())
"""


def test_copied_alone_into_another_project_it_trains_and_writes(tmp_path):
    """A table of logits learns the conditionals of a joint distribution, and samples it."""
    shutil.copy(diffusion.__file__, tmp_path)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", TRAIN_A_TABLE], cwd=tmp_path, capture_output=True,
                         text=True, env=env)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    learned, counts = (torch.tensor(json.loads(line)) for line in run.stdout.splitlines())
    true = torch.tensor([[0.5, 0.5], [0.45, 0.55],                     # the first; the second
                         [8 / 9, 1 / 9], [2 / 11, 9 / 11],             # the first, given the second
                         [0.8, 0.2], [0.1, 0.9]])                      # the second, given the first
    assert (learned - true).abs().max() < 0.03
    assert_not_distribution(counts, torch.tensor([0.5, 0.5]).outer(torch.tensor([0.45, 0.55]))
                            .flatten())
    assert (counts / 10_000 - torch.tensor([0.4, 0.1, 0.05, 0.45])).abs().max() < 0.03


def edited(function, *edits):
    """Return a copy of the module diffusion in which lines of a function are replaced. edits are
    pairs: how the line begins, and what stands there instead."""
    source = before = inspect.getsource(function)
    for begin, new in edits:
        source, n = re.subn(rf"^    {begin}.*$", lambda _, new=new: new, source, flags=re.M)
        assert n == 1, f"{n} lines of {function.__name__} begin with {begin}"
    whole = inspect.getsource(diffusion)
    assert whole.count(before) == 1
    module = ModuleType("edited")
    exec(whole.replace(before, source), module.__dict__)
    return module


def test_a_first_edit_another_noise_schedule_keeps_the_bound():
    """p(t) = 1 - cos(pi t / 2) = 2 sin(pi t / 4)**2 masks less text, but with p / p' in place of
    p_mask, the loss remains an estimate of the same bound."""
    module = edited(
        diffusion.forward_process,
        ("p_mask = ", "    p_mask = (2 * torch.sin(math.pi * t / 4) ** 2)[:, None].expand(B, T)"),
        ("return ", "    slope = math.pi / 2 * torch.sin(math.pi * t / 2)[:, None]\n"
                    "    return noisy_batch, masked_indices, p_mask / slope"))
    model, many, g = Lookup(4, V3), WINDOWS.repeat(2000, 1), seeded()
    losses, shares = [], []
    for _ in range(40):
        noisy_batch, masked_indices, weight = module.forward_process(many, V3, generator=g)
        losses.append(module.diffusion_loss(model, V3, many, noisy_batch, masked_indices, weight))
        shares.append(masked_indices.double().mean())
    assert_mean(losses, enumerate_nelbo(model, WINDOWS, V3))
    assert_mean(shares, 1 - 2 / math.pi)                  # not 1/2, as with p(t) = t


def with_order(name, *lines):
    """Return a copy of the module diffusion with a new order of writing."""
    case = [f'    if remasking == "{name}":', *(" " * 8 + line for line in lines)]
    return edited(diffusion.writing_order,
                  ("raise ", "\n".join([*case, "    raise ValueError(remasking)"])))


def test_a_first_edit_another_order_of_writing():
    """Where the likeliest token leads the second by the most."""
    module = with_order("margin", "best = p.topk(2, dim=-1).values",
                        "return best[..., 0] - best[..., 1]")
    p = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.45, 0.2, 0.35], [0.3, 0.36, 0.34]])
    x = torch.full((1, 4), 3)

    def model(x):
        return F.pad(p.log(), (0, 1)).expand(len(x), 4, 4)

    def order(remasking):
        return places_written([x, *module.unmask(model, x, 3, 4, 0.0, remasking)])
    assert order("margin") == [[1], [2], [3], [0]]
    assert order("low_confidence") == [[0], [2], [1], [3]]
    nll = exact_nll(model, torch.zeros_like(x), 3, 4, module.unmask, remasking="margin")
    assert nll.item() == pytest.approx(-p[:, 0].log().mean().item())


@pytest.mark.parametrize("score", ["p.amax(-1) - p.topk(2, dim=-1).values[..., 1]", "p[..., 0]",
                                   "-(p * p.log()).sum(-1)"])
def test_a_new_order_has_an_exact_likelihood(score):
    """Where the likeliest token leads the second by the most; where the first token is likely; or
    where the model is least sure."""
    module, model = with_order("new", f"return {score}"), Lookup(4, 3)
    nll = exact_nll(model, all_texts(4, 3), 3, 4, module.unmask, remasking="new")
    assert (-4 * nll).exp().sum().item() == pytest.approx(1, abs=1e-12)
    other = exact_nll(model, all_texts(4, 3), 3, 4, remasking="low_confidence")
    assert not torch.allclose(nll, other)  # another order, another value
