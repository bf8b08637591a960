"""The method, as tests: what diffusion.py computes, checked against values that are known exactly.

Two mask predictors make that possible. In a Table (conftest.py), every probability follows from a
joint distribution that is known. A Lookup is any predictor at all: it has a distribution of its own
for each place of each input, and these need not agree with each other. Both are so small that all
texts, all ways to mask one and all orders to write one can be enumerated. Sampled frequencies are
compared with exact probabilities by Pearson's test (assert_distribution), and each such test shows
that it could tell a wrong distribution (assert_not_distribution).
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

import diffusion
from diffusion import (
    autoregressive_loss,
    certainty,
    diffusion_loss,
    estimate_nelbo,
    estimate_nll,
    exact_nll,
    forward_process,
    left_to_right,
    next_token_losses,
    unmask,
    unmask_until_sure,
)
from model import GPT, GPTConfig

M = 2  # [MASK], where the tokens are 0 and 1
ORDERS = ("random", "dilated", "low_confidence")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def last(states):
    *_, x = states
    return x


def all_texts(T, V):
    """Return all texts of T tokens, (V**T, T): 000, 001, 010, ..."""
    return torch.tensor(list(itertools.product(range(V), repeat=T)))


def count(x, V):
    """Return how often each of all_texts occurs among the rows of x (B, T)."""
    T = x.shape[1]
    return torch.bincount((x * V ** torch.arange(T).flip(0)).sum(1), minlength=V**T)


class Lookup:
    """A mask predictor that looks up random logits (T, V + 1) for each of its (V + 1)**T inputs.
    [MASK]'s own logit is the largest."""

    def __init__(self, T, V, seed=0):
        self.logits = 1.5 * torch.randn((V + 1)**T, T, V + 1, generator=seeded(seed)).double()
        self.logits[..., V] = 99.0
        self.place_values = (V + 1) ** torch.arange(T).flip(0)

    def __call__(self, x):
        return self.logits[(x * self.place_values).sum(1)]


def constant(*logits):
    """Return a predictor that says the same of every place of every input."""
    return lambda x: torch.tensor(logits).expand(*x.shape, len(logits))


def counting(model):
    """Return the same model, and the list of the inputs that it was called with."""
    calls = []
    return lambda x: calls.append(x) or model(x), calls


def assert_mean(values, exact):
    """The mean of independent values is exact, within four standard errors and to 5 %."""
    values = torch.as_tensor(values).double()
    error = float(values.std()) / len(values)**0.5
    assert abs(float(values.mean()) - exact) < 4 * error < 0.05 * exact


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

def enumerate_nelbo(model, windows, mask_id, p_range=None):
    """Return the NELBO per token of windows (W, L), exactly: all ways to mask, each with its
    probability. With p_range = (eps, p_max): the expected training loss. It is an integral over t
    of a polynomial, which Gauss-Legendre quadrature does exactly."""
    W, L = windows.shape
    total = 0.0
    nodes, quadrature = np.polynomial.legendre.leggauss(L + 1)
    for masked in itertools.product((False, True), repeat=L):
        n = sum(masked)
        if n == 0:
            continue
        mask = torch.tensor(masked)
        logits = model(torch.where(mask, mask_id, windows))[..., :mask_id].double()
        log_p = logits.log_softmax(-1).gather(-1, windows[..., None])[..., 0]
        cross_entropy = -log_p[:, mask].sum().item() / W
        if p_range is None:  # n is uniform on 1..L, then each choice of n places is equally likely
            weight = 1 / (L * math.comb(L, n) * n)
        else:
            p = (p_range[1] - p_range[0]) * (nodes + 1) / 2 + p_range[0]
            weight = float((quadrature / 2 * p ** (n - 1) * (1 - p) ** (L - n)).sum()) / L
        total += weight * cross_entropy
    return total


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
# the exact likelihood of an order of writing

@pytest.mark.parametrize("remasking, block_length", [
    ("low_confidence", None), ("low_confidence", 2), ("low_confidence", 1), ("dilated", None),
    ("dilated", 3), ("random", None), ("random", 2)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_probabilities_of_all_texts_sum_to_1(steps, remasking, block_length):
    """For every order that does not depend on what it is to score. With the same seed, the noise of
    dilated and random is the same for every text."""
    T, V = 4, 3
    model = Lookup(T, V)
    nll = torch.cat([exact_nll(model, text[None], V, steps, remasking, block_length, seeded(5))
                     for text in all_texts(T, V)])
    assert (-T * nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_from_left_to_right_it_is_the_chain_rule():
    T, V = 4, 3
    model, x = Lookup(T, V), all_texts(T, V)
    log_p = torch.zeros(len(x)).double()
    for i in range(T):
        left = x.where(torch.arange(T) < i, V)
        log_p += model(left)[:, i, :V].log_softmax(-1).gather(-1, x[:, i:i + 1])[:, 0]
    nll = exact_nll(model, x, V, steps=T, block_length=1)
    torch.testing.assert_close(nll, -log_p / T)
    assert not torch.allclose(nll, exact_nll(model, x, V, steps=T))  # another order, another value


@pytest.mark.parametrize("block_length", [None, 1])
@pytest.mark.parametrize("remasking", ORDERS)
def test_where_the_predictor_is_right_every_order_gives_the_joint(remasking, block_length):
    table = Table(T=3, V=2)
    nll = exact_nll(table, table.outcomes, M, 3, remasking, block_length, seeded())
    torch.testing.assert_close(nll, -table.joint.detach().log() / 3)


def test_the_tokens_of_one_step_are_independent():
    table = Table(T=3, V=2)
    marginals = table(torch.full((1, 3), M))[0, :, :2].softmax(-1)            # (3, 2)
    product = marginals[torch.arange(3), table.outcomes].prod(1)
    torch.testing.assert_close(exact_nll(table, table.outcomes, M, 1), -product.log() / 3)


def mixed_over_orders(model, T, V, steps, remasking, block_length=None, draws=10_000):
    """Return the probability of each text: the mean over many draws of the order, the same for
    all texts."""
    return torch.stack([(-T * exact_nll(model, text.expand(draws, T), V, steps, remasking,
                                        block_length, seeded(1))).exp().mean()
                        for text in all_texts(T, V)])


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("remasking, block_length", [
    ("random", None), ("dilated", None), ("dilated", 2), ("random", 1), ("low_confidence", 1)])
def test_unmask_at_temperature_1_writes_each_text_with_its_probability(remasking, block_length,
                                                                       steps):
    """From left to right, low_confidence needs a step per token: with fewer, it chooses."""
    steps = 3 if remasking == "low_confidence" else steps
    model = Lookup(3, 2, seed=2)
    page = torch.full((20_000, 3), M)
    got = count(last(unmask(model, page, M, steps, 1.0, remasking, block_length,
                            generator=seeded())), V=2)
    assert_distribution(got, mixed_over_orders(model, 3, 2, steps, remasking, block_length))
    assert_not_distribution(got, mixed_over_orders(model, 3, 2, 1, remasking, block_length))
    assert_not_distribution(got, mixed_over_orders(model, 3, 2, 3, "low_confidence"))


def test_low_confidence_is_exact_only_if_it_goes_by_the_likeliest_token():
    """As exact_nll and, at temperature 0, unmask do. At temperature 1, unmask goes by the token
    that it drew, so what it writes has other probabilities."""
    model = Lookup(3, 2, seed=2)
    page = torch.full((20_000, 3), M)
    got = count(last(unmask(model, page, M, 3, 1.0, "low_confidence", generator=seeded())), V=2)
    assert_not_distribution(got, mixed_over_orders(model, 3, 2, 3, "low_confidence", draws=1))
    greedy, x = [page[:1], *unmask(model, page[:1], M, 3, 0.0, "low_confidence")], 0.0
    for before, after in itertools.pairwise(greedy):
        x -= model(before)[0, (before != after)[0], :M].softmax(-1).amax().log()
    nll = exact_nll(model, greedy[-1], M, 3, "low_confidence")
    assert nll.item() == pytest.approx(x.item() / 3)


def test_the_mean_over_all_orders_is_the_nelbo_and_above_the_likelihood():
    """Where the predictor is not right, orders disagree, and the bound is not tight."""
    model, draws = Lookup(3, 2, seed=2), 20_000
    nll = exact_nll(model, all_texts(3, 2).repeat(draws, 1), M, 3, "random", generator=seeded())
    gaps = []
    for text, of_text in zip(all_texts(3, 2), nll.view(draws, 8).T, strict=True):
        assert_mean(of_text, enumerate_nelbo(model, text[None], M))
        likelihood = (-3 * of_text).exp().mean()  # what unmask samples: see above
        gaps.append(float(of_text.mean() + likelihood.log() / 3))
    assert min(gaps) > 0 and max(gaps) > 0.1


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


def test_guidance_follows_lladas_formula():
    """blind + (1 + scale) * (seeing - blind), where blind has the given tokens masked."""
    seeing, blind = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])

    def model(x):
        return torch.where((x[:, :1] == 0)[..., None], seeing, blind).expand(*x.shape, 3)
    x = torch.tensor([0, M]).expand(20_000, 2)
    written = last(unmask(model, x, M, 1, cfg_scale=0.7, generator=seeded()))[:, 1]
    got = torch.bincount(written, minlength=2)
    assert_distribution(got, (blind + 1.7 * (seeing - blind))[:2].double().softmax(0))
    assert_not_distribution(got, seeing[:2].double().softmax(0))


def test_the_same_seed_writes_the_same_text():
    x = torch.full((5, 4), 3)
    runs = [last(unmask(Table(T=4, V=3), x, 3, 2, generator=seeded(s))) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# -----------------------------------------------------------------------------
# sampling: LLaDA's own sampler, in plain loops

@torch.no_grad()
def llada_generate(model, x, prompt_length, steps, block_length, cfg_scale, mask_id):
    """LLaDA's generate (arXiv 2502.09992) with temperature 0 and low-confidence remasking: returns
    the states (T,) after each step that wrote something. x (T,) holds a prompt and then masks.
    [MASK] itself, which LLaDA never learns to answer, is no answer here."""
    x, given = x.clone(), x != mask_id
    num_blocks = (len(x) - prompt_length) // block_length
    steps_per_block = steps // num_blocks
    states = []
    for block in range(num_blocks):
        begin = prompt_length + block * block_length
        end = begin + block_length
        masked = int((x[begin:end] == mask_id).sum())
        transfers = [masked // steps_per_block] * steps_per_block
        for i in range(masked % steps_per_block):
            transfers[i] += 1
        for k in transfers:
            if cfg_scale > 0:
                blind = x.clone()
                blind[given] = mask_id
                cond, un = model(torch.stack([x, blind]))
                logits = un + (cfg_scale + 1) * (cond - un)
            else:
                logits = model(x[None])[0]
            logits = logits[:, :mask_id].double()
            x0 = logits.argmax(dim=-1)
            x0_p = logits.softmax(dim=-1).gather(-1, x0[:, None])[:, 0]
            x0_p[end:] = -torch.inf                             # beyond the current block
            confidence = torch.where(x == mask_id, x0_p, -torch.inf)
            chosen = confidence.topk(k).indices
            x[chosen] = x0[chosen]
            if k:
                states.append(x.clone())
    return states


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("block_length, steps", [
    (24, 24), (24, 1), (24, 7), (24, 10),             # one block; 7 and 10 do not divide 24
    (8, 24), (8, 3), (8, 9), (8, 15),                 # 3 and 5 steps for 8 masks
    (6, 16), (4, 18), (1, 24), (12, 14), (8, 48),     # 48: more steps than masks
])
def test_unmask_is_lladas_generate_token_for_token_in_every_state(block_length, steps, cfg_scale):
    torch.manual_seed(block_length * steps)
    mask_id, seen = 11, set()
    model = GPT(GPTConfig(block_size=40, vocab_size=mask_id + 1, n_layer=2, n_head=2, n_embd=16))
    for p in model.eval().parameters():
        p.data.normal_(std=0.3)
    for prompt_length in (0, 1, 16):
        x = torch.full((prompt_length + 24,), mask_id)
        x[:prompt_length] = torch.randint(mask_id, (prompt_length,))
        expected = llada_generate(model, x, prompt_length, steps, block_length, cfg_scale, mask_id)
        blocks = None if block_length == 24 and prompt_length < 5 else block_length
        states = list(unmask(model, x[None], mask_id, steps, temperature=0.0, generator=seeded(),
                             remasking="low_confidence", block_length=blocks, cfg_scale=cfg_scale))
        assert len(states) == len(expected) == min(steps, 24)
        for state, theirs in zip(states, expected, strict=True):
            assert state[0].tolist() == theirs.tolist()
        seen |= set(theirs.tolist())
    assert len(seen) > 3  # the texts are not all the same token


# -----------------------------------------------------------------------------
# which places, and how many at a time

EVEN = constant(*[0.0] * 6)  # five tokens, equally likely, and [MASK] = 5


@pytest.mark.parametrize("remasking", ORDERS)
@pytest.mark.parametrize("block_length", [None, 1, 5, 7, 30])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 100])
def test_every_schedule_is_even_and_complete(steps, block_length, remasking):
    """20 masks in each row. In every block the passes write equally many, or one more at first."""
    x = torch.full((3, 24), 5)
    x[0, :4], x[1, 10:14], x[2, ::6] = 1, 2, 3
    before = x.clone()
    block = ((before == 5).cumsum(1) - 1) // (block_length or 20)                     # (3, 24)
    n_blocks = int(block.max()) + 1
    states = list(unmask(EVEN, x, 5, steps, remasking=remasking, generator=seeded(),
                         block_length=block_length))
    assert torch.equal(x, before)
    assert min(steps, 20) - n_blocks < len(states) <= min(steps, 20)
    assert n_blocks > 1 or len(states) == min(steps, 20)
    written = [[] for _ in range(n_blocks)]  # by the passes for a block: how many tokens
    for state in states:
        assert torch.equal(state[x != 5], x[x != 5])  # what was given or decided stays
        fresh = (x == 5) & (state != 5)
        numbers = fresh.sum(1)
        assert (numbers == numbers[0]).all() and numbers[0] > 0
        for row in range(3):
            blocks = block[row][fresh[row]].unique()
            assert (state[row][(block[row] < blocks.max()) & (before[row] == 5)] < 5).all()
            if steps >= n_blocks:  # no pass is for several blocks
                assert len(blocks) == 1
        written[int(blocks.max())].append(int(numbers[0]))
        x = state
    assert (x < 5).all() and torch.equal(x[before != 5], before[before != 5])
    for numbers in written if steps >= n_blocks else []:
        assert numbers == sorted(numbers, reverse=True) and numbers[0] - numbers[-1] <= 1
    passes = [len(numbers) for numbers in written[:-1]]  # the last block may be a shorter one
    if passes and n_blocks <= steps <= 20:
        assert max(passes) - min(passes) <= 1


def test_blocks_are_finished_in_order():
    x = torch.full((4, 12), 5)
    x[:, :2] = 0
    states = unmask(EVEN, x, 5, steps=10, block_length=5, generator=seeded())
    for step, state in enumerate(states, 1):
        first, second = (state[:, 2:7] != 5).sum(1), (state[:, 7:] != 5).sum(1)
        assert (first == min(step, 5)).all() and (second == max(0, step - 5)).all()
    assert step == 10


def test_rows_may_have_different_numbers_of_masks():
    x = torch.tensor([[5, 5, 5, 5], [1, 5, 2, 3], [1, 2, 3, 4]])
    states = list(unmask(EVEN, x, 5, steps=4, generator=seeded()))
    assert len(states) == 4 and (states[-1] < 5).all() and torch.equal(states[-1][2], x[2])


@pytest.mark.parametrize("revise", [0.0, 0.5])
def test_nothing_to_write_needs_no_pass(revise):
    assert list(unmask(lambda x: 1 / 0, torch.tensor([[0, 1]]), M, 3, revise=revise)) == []


def places_written(states):
    """Return the places that each state (of a single row) has and the one before it has not."""
    return [(a != b)[0].nonzero().flatten().tolist() for a, b in itertools.pairwise(states)]


def sure_by_place(*p):
    """Return a predictor of three tokens: at place i the first has probability p[i], and the others
    share the rest."""
    p = torch.tensor(p).double()[:, None]
    rest = (1 - p) / 2
    logits = torch.cat([p, rest, rest, torch.ones_like(p)], dim=1).log()
    return lambda x: logits.expand(len(x), *logits.shape)


def test_low_confidence_writes_the_surest_first():
    x = torch.full((1, 4), 3)
    model = sure_by_place(0.4, 0.9, 0.6, 0.8)
    assert places_written([x, *unmask(model, x, 3, 4, 0, "low_confidence")]) == [[1], [3], [2], [0]]


def test_random_order_is_random():
    """Which of 4 places a row writes first: each as often as the others, and not one after the
    other."""
    x = torch.full((8000, 4), 5)
    first, second, *_ = unmask(EVEN, x, 5, 4, remasking="random", generator=seeded())
    i, j = (first != 5).int().argmax(1), ((second != 5) & (first == 5)).int().argmax(1)
    pairs = torch.bincount(4 * i + j, minlength=16)
    assert_distribution(pairs, (1 - torch.eye(4)).flatten() / 12)


@pytest.mark.parametrize("remasking, apart", [("dilated", True), ("random", False)])
def test_dilated_writes_far_apart(remasking, apart):
    """8 of 256 places a step: multiples of the golden ratio that fall into 1/32 of the circle are
    21 apart or more, since it takes the Fibonacci number 21 for one to come that close to where it
    was. Counts that round leave a little less than that."""
    x, least = torch.full((5, 256), 5), 256
    for state in unmask(EVEN, x, 5, 32, remasking=remasking, generator=seeded()):
        for row in (state != x):
            least = min(least, int(row.nonzero().flatten().diff().min()))
        x = state
    assert (least >= 13) == apart


def test_dilated_begins_elsewhere_in_every_row():
    first = next(unmask(EVEN, torch.full((200, 8), 5), 5, 8, remasking="dilated",
                        generator=seeded()))
    assert ((first != 5).sum(0) > 0).all() and ((first != 5).sum(1) == 1).all()


def test_a_threshold_keeps_all_that_is_surer_and_at_least_what_the_schedule_wants():
    x, model = torch.full((1, 6), 3), sure_by_place(0.99, 0.5, 0.9, 0.6, 0.95, 0.7)

    def order(steps, threshold, remasking="low_confidence"):
        states = unmask(model, x, 3, steps, 0.0, remasking, threshold=threshold)
        return places_written([x, *states])
    assert order(6, None) == [[0], [4], [2], [5], [3], [1]]
    assert order(6, 0.8) == [[0, 2, 4], [5], [3], [1]]
    assert order(3, 0.8) == [[0, 2, 4], [3, 5], [1]]           # two a step
    assert order(3, 0.98) == [[0, 4], [2, 5], [1, 3]]          # 4 is not that sure, but scheduled
    first, *others = order(6, 0.8, "random")                   # whatever the order
    assert {0, 2, 4} <= set(first) and len(first) <= 4 and all(len(new) == 1 for new in others)
    coin = constant(0.0, 0.0, 0.0)                             # 1/2 is not above 1/2
    assert len(list(unmask(coin, torch.full((1, 6), M), M, 6, threshold=0.5))) == 6


@pytest.mark.parametrize("remasking", ORDERS)
@pytest.mark.parametrize("block_length", [None, 3])
def test_a_threshold_of_0_is_one_pass_and_of_1_changes_nothing(remasking, block_length):
    x = torch.full((5, 6), M)

    def states(threshold):
        return list(unmask(Lookup(6, 2), x, M, 6, 1.0, remasking, block_length, threshold=threshold,
                           generator=seeded()))
    assert len(states(0.0)) == 1 and (states(0.0)[0] != M).all()
    assert len(states(None)) == 6
    assert all(torch.equal(a, b) for a, b in zip(states(1.0), states(None), strict=True))


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
    model, calls = counting(EVEN)
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
# odd logits, all settings together, and settings that make no sense

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution_are_refused(bad):
    def model(x):
        logits = torch.zeros(*x.shape, 6)
        logits[0, 3, 2] = bad
        return logits
    with pytest.raises(ValueError, match="no distribution"):
        last(unmask(model, torch.full((2, 4), 5), 5, 2))
    x = torch.tensor([[5, 5, 5, 1]])
    assert (last(unmask(model, x, 5, 2)) < 5).all()  # nobody asked about that place


@pytest.mark.parametrize("settings", [
    dict(), dict(cfg_scale=1.0), dict(temperature=0), dict(threshold=0.4),
    dict(revise=0.5, remasking="low_confidence")])
def test_minus_infinity_is_a_probability_of_0_but_not_for_all_tokens(settings):
    model, x = constant(0.0, -torch.inf, 0.0, 5.0), torch.full((50, 4), 3)
    x = last(unmask(model, x, 3, 4, generator=seeded(), **settings))
    assert ((x == 0) | (x == 2)).all()
    model = constant(*[-torch.inf] * 4)
    with pytest.raises(ValueError, match="no distribution"):
        last(unmask(model, torch.full((1, 4), 3), 3, 4, **settings))


@pytest.mark.parametrize("remasking", ORDERS)
@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("revise", [0.0, 0.3])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_all_settings_go_together(remasking, block_length, cfg_scale, revise, threshold):
    """On a page of masks, one with a prompt, one with holes, and one with a single hole."""
    weights = torch.randn(12, 7, 12 * 7, generator=seeded(1))     # of a predictor that is linear
    empty, prompt = torch.full((12,), 6), torch.full((12,), 6)
    holes, one = torch.arange(12) % 6, torch.arange(12) % 6
    prompt[:4], holes[[0, 3, 4, 8, 11]], one[7] = 1, 6, 6

    def linear(x):
        return weights[torch.arange(12), x].sum(1).view(len(x), 12, 7)
    for page, steps, temperature in itertools.product((empty, prompt, holes, one), (1, 4, 15),
                                                      (0.0, 1.0)):
        x, (model, calls) = page.repeat(2, 1), counting(linear)
        given, n_masks = x != 6, int((page == 6).sum())
        settings = (steps, temperature, remasking, block_length, cfg_scale, revise)
        states = list(unmask(model, x, 6, *settings, seeded(), threshold))
        again = list(unmask(linear, x, 6, *settings, seeded(), threshold))
        assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
        assert 1 <= len(calls) <= steps and (states[-1] < 6).all() and (states[-1] >= 0).all()
        assert all(torch.equal(state[given], x[given]) for state in states)
        if not revise:
            assert len(states) == len(calls) <= min(steps, n_masks)
        if not revise and threshold is None:
            n_blocks = -(-n_masks // (block_length or n_masks))
            assert len(calls) > min(steps, n_masks) - n_blocks


@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(temperature=-1), dict(temperature=float("nan")),
    dict(temperature=float("inf")), dict(cfg_scale=-1.0), dict(cfg_scale=float("nan")),
    dict(block_length=0), dict(revise=-0.1), dict(revise=1.1), dict(revise=float("nan")),
    dict(threshold=-0.1), dict(threshold=1.1), dict(threshold=float("nan")),
    dict(remasking="best")])
def test_values_that_make_no_sense_are_refused(bad):
    [name] = bad
    with pytest.raises(ValueError, match=f"{name} must be .*, not {bad[name]}"):
        last(unmask(EVEN, torch.full((1, 4), 5), 5, **{"steps": 2, **bad}))


def test_an_unknown_order_is_refused_by_name():
    message = "remasking must be random, dilated or low_confidence, not best"
    for write in (lambda x: last(unmask(EVEN, x, 5, 2, remasking="best")),
                  lambda x: exact_nll(EVEN, x, 5, 2, remasking="best")):
        with pytest.raises(ValueError, match=message):
            write(torch.full((1, 4), 5))


# -----------------------------------------------------------------------------
# puzzles: certainty

def meet(i, j):
    """Whether two cells of a 4 x 4 Sudoku stand in the same row, column or box."""
    (r, c), (s, d) = divmod(i, 4), divmod(j, 4)
    return i != j and (r == s or c == d or (r // 2, c // 2) == (s // 2, d // 2))


MEET = torch.tensor([[meet(i, j) for j in range(16)] for i in range(16)]).double()  # (16, 16)


def rules(x):
    """A predictor that knows the rules of a 4 x 4 Sudoku: in a cell stands what stands nowhere in
    its row, column and box, and of two such digits rather the smaller one. Where one digit is left,
    it is certain."""
    return -30.0 * (MEET @ F.one_hot(x, 5).double() > 0) - 0.2 * torch.arange(5)    # (B, 16, 5)


def grid(cells):
    return torch.tensor([["1234_".index(cell) for cell in cells.replace(" ", "")]])


def solved(x):
    """(B,): whether no cell is empty, and no digit is twice in a row, column or box."""
    return (x < 4).all(1) & (rules(x).gather(-1, x[..., None])[..., 0] > -1).all(1)


SOLUTION = grid("1234 3412 2143 4321")
EASY = grid("___4 34__ __4_ _3__")       # there is always a cell where one digit is left
GUESSWORK = grid("____ ____ 12_3 4___")  # soon, no cell is certain, and the smaller digit is wrong
IMPOSSIBLE = grid("11__ ____ 12_3 4___")


def test_a_puzzle_is_solved_by_writing_what_is_certain_first():
    assert solved(SOLUTION) and not solved(IMPOSSIBLE)
    assert solved(last(unmask(rules, EASY, 4, 16, 0.0, "low_confidence")))
    assert not all(solved(last(unmask(rules, EASY, 4, 16, 0.0, "random", generator=seeded(seed))))
                   for seed in range(8))


def test_certainty_is_the_least_probability_of_a_written_token():
    written = torch.ones(1, 16, dtype=torch.bool)
    wrong = SOLUTION.clone()
    wrong[0, 5] = 0
    assert certainty(rules, SOLUTION, written, 4)[0] > 1 - 1e-9
    # what contradicts its row gets exp(-30) beside a certain digit, or about 1/4 if all contradict
    assert certainty(rules, wrong, written, 4)[0] < 0.4
    model, calls = counting(rules)  # a quarter of the cells is masked in each pass, then a fifth
    certainty(model, SOLUTION, written, 4)
    assert [int((x == 4).sum()) for x in calls] == [4] * 4 + [3, 4, 3, 3, 3]
    assert (sum((x == 4).long() for x in calls) == 2).all()
    both = torch.cat([SOLUTION, wrong])
    assert certainty(rules, both, torch.zeros_like(both, dtype=torch.bool), 4).tolist() == [1, 1]


def test_certainty_by_hand():
    """Only written tokens count: the given one, of probability 0.1, does not."""
    model = sure_by_place(0.9, 0.5, 0.7, 0.1, 0.6)
    x, written = torch.zeros(1, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 1]]).bool()
    assert certainty(model, x, written, 3).item() == pytest.approx(0.5)
    written[0, 1] = False
    assert certainty(model, x, written, 3).item() == pytest.approx(0.6)


def search(model, x, tries=16, **settings):
    return list(unmask_until_sure(model, x, 4, tries, **settings))


def test_a_wrong_guess_is_noticed_and_replaced():
    [*_, draft] = search(rules, GUESSWORK, tries=1)
    assert not solved(draft)
    assert torch.equal(draft, last(unmask(rules, GUESSWORK, 4, 16, 0.0, "low_confidence",
                                          threshold=0.999)))
    [*_, x] = search(rules, GUESSWORK)
    assert solved(x) and torch.equal(x[GUESSWORK < 4], GUESSWORK[GUESSWORK < 4])


def test_a_sure_answer_needs_one_try_and_certain_cells_are_written_together():
    model, calls = counting(rules)
    assert solved(search(model, EASY)[-1])
    assert len(calls) < int((EASY == 4).sum()) + 9           # nine check the full page
    model, calls = counting(rules)
    search(model, EASY, threshold=1.0)                       # a cell in each pass
    assert len(calls) == int((EASY == 4).sum()) + 9


def test_the_surest_try_is_the_answer():
    """Of givens that contradict each other, no try is sure."""
    states = search(rules, IMPOSSIBLE, tries=6)
    *tries, answer = [x for x in states if (x != 4).all()]
    assert len(tries) == 6 and not solved(answer)
    found = [certainty(rules, x, IMPOSSIBLE == 4, 4).item() for x in tries]
    assert max(found) < 0.999 and torch.equal(answer, tries[found.index(max(found))])
    assert all(torch.equal(x[IMPOSSIBLE != 4], IMPOSSIBLE[IMPOSSIBLE != 4]) for x in states)


def test_the_likeliest_alternative_comes_first():
    """Two independent places, of probabilities (0.6, 0.4) and (0.9, 0.1), and no page is sure: the
    pages come in the order of their probabilities, and after the last one the search ends."""
    logits = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
    model = lambda x: F.pad(logits.expand(len(x), -1, -1), (0, 1))  # noqa: E731
    def pages(threshold):
        states = unmask_until_sure(model, torch.full((1, 2), 2), 2, 9, threshold)
        return [tuple(x[0].tolist()) for x in states if (x != 2).all()]
    *found, answer = pages(threshold=0.999)
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1)] and answer == (0, 0)
    # of tokens written together, only the least probable one has alternatives
    assert pages(threshold=0.5) == [(0, 0), (1, 0), (1, 1), (0, 0)]


# -----------------------------------------------------------------------------
# the autoregressive twin

class Bigrams(torch.nn.Module):
    """p(next | last) from a table of V + 1 rows; the last row follows [MASK], a window's start."""

    def __init__(self, p):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor(p))

    def forward(self, x):
        return F.pad(self.p[x].log(), (0, 1), value=50.0)  # [MASK] is no answer


def test_the_twins_exact_likelihood_by_hand():
    model = Bigrams([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    windows = torch.tensor([[0, 0, 1], [1, 1, 0]])
    by_hand = [-math.log(0.2 * 0.9 * 0.1) / 3, -math.log(0.8 * 0.6 * 0.4) / 3]
    nll, se = estimate_nll(model, windows, M, batch_size=1)
    assert nll == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    deviation = abs(by_hand[0] - by_hand[1])  # over the root of 2, twice
    assert se == pytest.approx(deviation / 2, rel=1e-5)
    assert autoregressive_loss(model, M, windows).item() == pytest.approx(nll, rel=1e-5)
    assert estimate_nll(model, windows[:1], M)[1] == math.inf  # one says nothing of a spread


def twin(T, V, seed=0):
    """A small causal GPT with weights that make every input matter."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(T, V + 1, n_layer=2, n_head=2, n_embd=16, causal=True)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def test_the_twin_writes_by_the_chain_rule():
    model = twin(T=3, V=2, seed=3)
    outcomes = all_texts(3, 2)
    p = (-next_token_losses(model, M, outcomes).sum(1)).exp().detach()
    assert p.sum().item() == pytest.approx(1, rel=1e-5)

    def written(x, **settings):
        return count(last(left_to_right(model, x, M, generator=seeded(), **settings)), V=2)
    free = written(torch.full((8000, 3), M))
    assert_distribution(free, p)
    assert_not_distribution(free, torch.full((8,), 1 / 8))
    after_1 = p * (outcomes[:, 0] == 1)
    prompt = torch.tensor([[1, M, M]]).expand(8000, 3)
    assert_distribution(written(prompt), after_1 / after_1.sum())
    assert written(prompt, temperature=0.0).max() == 8000


def test_the_twin_writes_one_token_per_step_and_changes_no_other():
    x = torch.full((2, 12), 7)
    x[:, :4] = 1
    states = [x, *left_to_right(twin(T=12, V=7), x, 7, generator=seeded())]
    for step, (before, after) in enumerate(itertools.pairwise(states), 4):
        assert (after[:, :step + 1] < 7).all() and (after[:, step + 1:] == 7).all()
        assert torch.equal(before[:, :step], after[:, :step])
    assert len(states) == 9


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


def test_a_first_edit_another_order_of_writing():
    """Where the likeliest token leads the second by the most."""
    module = edited(
        diffusion.writing_order,
        ("raise ", '    if remasking == "margin":\n'
                   "        best = p.topk(2, dim=-1).values\n"
                   "        return best[..., 0] - best[..., 1]\n"
                   "    raise ValueError(remasking)"))
    p = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.45, 0.2, 0.35], [0.3, 0.36, 0.34]])
    x = torch.full((1, 4), 3)

    def model(x):
        return F.pad(p.log(), (0, 1)).expand(len(x), 4, 4)

    def order(remasking):
        return places_written([x, *module.unmask(model, x, 3, 4, 0.0, remasking)])
    assert order("margin") == [[1], [2], [3], [0]]
    assert order("low_confidence") == [[0], [2], [1], [3]]
    assert module.exact_nll(model, torch.zeros_like(x), 3, 4, "margin").item() == pytest.approx(
        -p[:, 0].log().mean().item())
