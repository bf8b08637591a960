import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    Table,
    assert_distribution,
    assert_not_distribution,
    assert_one_line_error,
    pearson,
    read_help,
)

import main as main_script
from main import (
    REMASKING,
    frame,
    generate_pages,
    missing_rates,
    page_windows,
    save_replay,
    share_steps,
    unmask,
    weighted,
)
from model import GPT, GPTConfig, save_checkpoint

M = 2  # [MASK] of a table with the characters 0 and 1


def last(states):
    for x in states:
        pass
    return x


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counts(table, x):
    return torch.bincount(table.index(x), minlength=len(table.outcomes)).double()


# -----------------------------------------------------------------------------
# exact distributions: a predictor in which every probability is known


@pytest.mark.parametrize("remasking", ["random", "dilated"])  # the order must not look at the text
def test_one_token_a_step_samples_the_joint_distribution(remasking):
    table = Table()
    x = torch.full((20_000, 3), M)
    states = unmask(table, x, M, steps=3, temperature=1.0, remasking=remasking, generator=seeded())
    got = counts(table, last(states))
    assert_distribution(got, table.joint)
    assert_not_distribution(got, torch.full((8,), 1 / 8))


def test_one_step_samples_the_product_of_the_marginals():
    table = Table()
    x = torch.full((20_000, 3), M)
    got = counts(table, last(unmask(table, x, M, steps=1, generator=seeded())))
    one = torch.stack([table.joint[table.outcomes[:, i] == 1].sum() for i in range(3)]).detach()
    assert_distribution(got, torch.where(table.outcomes == 1, one, 1 - one).prod(1))
    assert_not_distribution(got, table.joint)


def test_a_hole_is_filled_from_the_conditional():
    table = Table()
    x = torch.tensor([1, M, 0]).expand(20_000, 3)
    got = counts(table, last(unmask(table, x, M, steps=5, generator=seeded())))
    p = table.joint * (table.outcomes[:, 0] == 1) * (table.outcomes[:, 2] == 0)
    assert_distribution(got, p / p.sum())


def test_temperature_sharpens():
    """One token: softmax(logits / temperature), exactly."""
    logits = torch.tensor([0.0, 1.0, 2.0, 99.0])

    def model(x):
        return logits.expand(*x.shape, 4)
    for temperature in (0.3, 1.0, 2.5):
        x = last(unmask(model, torch.full((20_000, 1), 3), 3, 1, temperature, generator=seeded()))
        got = torch.bincount(x.flatten(), minlength=4)[:3]
        assert_distribution(got, (logits[:3].double() / temperature).softmax(0))
        assert_not_distribution(got, (logits[:3].double() / temperature * 1.2).softmax(0))


def test_temperature_zero_is_argmax():
    table = Table()
    x = torch.full((50, 3), M)
    greedy = last(unmask(table, x, M, steps=1, temperature=0, generator=seeded()))
    assert (greedy == table(torch.full((1, 3), M))[0, :, :2].argmax(-1)).all()


def test_gumbel_noise_is_float64(monkeypatch):
    """A draw of 1 - 2**-40 is noise of 40 ln 2 = 27.7, exactly: enough against 0.4 more than a
    logit of 27.3, not of 27.4. float32 has no number between 1 - 2**-24 and 1, so there the same
    draw is cut to 16.6 or becomes infinite."""
    real = torch.rand

    def rand(shape, dtype=torch.float32, generator=None, device=None):
        u = torch.full(shape, 0.5, dtype=dtype)  # noise 0.37
        u[..., 0] = torch.tensor(1 - 2.0**-40, dtype=torch.float64)
        return u
    for logit, winner in ((27.3, 0), (27.4, 1)):
        monkeypatch.setattr(torch, "rand", rand)
        logits = torch.tensor([[[0.0, logit, 0.0]]])
        x = last(unmask(lambda x, logits=logits: logits, torch.tensor([[M]]), M, 1))
        monkeypatch.setattr(torch, "rand", real)
        assert x.item() == winner


# -----------------------------------------------------------------------------
# LLaDA's own sampler


@torch.no_grad()
def llada_generate(model, x, prompt_length, steps, block_length, cfg_scale, mask_id):
    """LLaDA's generate (arXiv 2502.09992) with temperature 0 and low-confidence remasking, in plain
    loops: -> the states (T,) after each step that wrote something. x (T,) holds a prompt and then
    masks. [MASK] itself, which LLaDA never learns to answer, is no answer here."""
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
def test_unmask_is_lladas_generate(block_length, steps, cfg_scale):
    """Token for token, in every state, on random GPTs."""
    torch.manual_seed(block_length * steps)
    mask_id, seen = 11, set()
    model = GPT(GPTConfig(block_size=40, vocab_size=mask_id + 1, n_layer=2, n_head=2, n_embd=16))
    for p in model.eval().parameters():
        p.data.normal_(std=0.3)
    for prompt_length in (0, 1, 5, 16):
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
# which tokens, and how many at a time


def uniform_model(x):
    return torch.zeros(*x.shape, 6)


@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("block_length", [None, 1, 5, 7, 30])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 100])
def test_every_schedule_is_even_and_complete(steps, block_length, remasking):
    """20 masks in each row. In every block the passes write equally many, or one more at first."""
    x = torch.full((3, 24), 5)
    x[0, :4], x[1, 10:14], x[2, ::6] = 1, 2, 3
    before = x.clone()
    block = ((before == 5).cumsum(1) - 1) // (block_length or 20)                     # (3, 24)
    n_blocks = int(block.max()) + 1
    states = list(unmask(uniform_model, x, 5, steps, remasking=remasking, generator=seeded(),
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
    states = unmask(uniform_model, x, 5, steps=10, block_length=5, generator=seeded())
    for step, state in enumerate(states, 1):
        first, second = (state[:, 2:7] != 5).sum(1), (state[:, 7:] != 5).sum(1)
        assert (first == min(step, 5)).all() and (second == max(0, step - 5)).all()
    assert step == 10


def test_rows_with_different_numbers_of_masks():
    x = torch.tensor([[5, 5, 5, 5], [1, 5, 2, 3], [1, 2, 3, 4]])
    states = list(unmask(uniform_model, x, 5, steps=4, generator=seeded()))
    assert len(states) == 4 and (states[-1] < 5).all() and torch.equal(states[-1][2], x[2])


def test_nothing_to_write_needs_no_pass():
    assert list(unmask(lambda x: 1 / 0, torch.tensor([[0, 1]]), 2, steps=3)) == []
    assert list(unmask(lambda x: 1 / 0, torch.tensor([[0, 1]]), 2, steps=3, revise=0.5)) == []


def test_low_confidence_keeps_the_surest():
    logits = torch.zeros(4, 3)
    logits[:, 0] = torch.tensor([0.1, 3.0, 1.0, 2.0])
    x = torch.full((1, 4), 2)
    states = [x, *unmask(lambda x: logits[None], x, 2, 4, 0, "low_confidence")]
    order = [int((a != b).int().argmax()) for a, b in itertools.pairwise(states)]
    assert order == [1, 3, 2, 0]


def test_guidance_follows_lladas_formula():
    """blind + (1 + scale) * (seeing - blind), where blind has the given tokens masked: three
    tokens, p known exactly."""
    seeing, blind = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])

    def model(x):
        return torch.where((x[:, :1] == 0)[..., None], seeing, blind).expand(*x.shape, 3)
    x = torch.tensor([0, 2]).expand(20_000, 2)
    written = last(unmask(model, x, 2, 1, cfg_scale=0.7, generator=seeded()))[:, 1]
    got = torch.bincount(written, minlength=2)
    assert_distribution(got, (blind + 1.7 * (seeing - blind))[:2].double().softmax(0))
    assert_not_distribution(got, seeing[:2].double().softmax(0))


def test_random_order_is_random():
    """Which of 4 places a row writes first: each as often as the others, and not one after the
    other."""
    x = torch.full((8000, 4), 5)
    first, second, *_ = unmask(uniform_model, x, 5, 4, generator=seeded())
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


# -----------------------------------------------------------------------------
# revision


def test_revision_comes_after_the_draft_and_becomes_less():
    """The predictor answers with the number of the pass, so that what a pass writes can be told
    from what stood there."""
    passes, seen = itertools.count(), []

    def model(x):
        seen.append((x == 20).sum(1))
        return torch.nn.functional.one_hot(torch.full(x.shape, next(passes)), 21) * 50.0
    x = torch.full((3, 40), 20)
    x[:, ::4], x[2, :20] = 0, 0                                      # 30, 30 and 15 masks
    given = x != 20
    states = list(unmask(model, x, 20, 20, revise=0.4, generator=seeded()))
    assert len(seen) == 20 and len(states) == 30 and all((s[given] == 0).all() for s in states)
    assert [int(n[0]) for n in seen[:10]] == list(range(30, 0, -3)) and (states[9] < 20).all()
    # 0.4 * 30 * (1, 0.9, ... 0.1), rounded up
    assert [int(n[0]) for n in seen[10:]] == [12, 11, 10, 9, 8, 6, 5, 4, 3, 2]
    assert [int(n[2]) for n in seen[10:]] == [6, 6, 5, 5, 4, 3, 3, 2, 2, 1]
    for step, again, state in zip(range(10, 20), states[10::2], states[11::2], strict=True):
        assert torch.equal((again == 20).sum(1), seen[step])
        assert torch.equal(state == step, again == 20)               # that is written anew
        assert torch.equal(state[again != 20], again[again != 20])   # and nothing else


@pytest.mark.parametrize("steps", [5, 8, 24])
def test_what_is_masked_again_is_shown(steps):
    """More states than passes: each extra one has more masks than the one before it."""
    calls = []

    def model(x):
        calls.append(x)
        return uniform_model(x)
    x = torch.full((2, 16), 5)
    x[:, :4] = 1
    states = [x, *unmask(model, x, 5, steps, revise=0.5, generator=seeded())]
    more = [bool(((b == 5).sum(1) > (a == 5).sum(1)).all()) for a, b in itertools.pairwise(states)]
    fewer = [bool(((b == 5).sum(1) < (a == 5).sum(1)).all()) for a, b in itertools.pairwise(states)]
    draft = min((steps + 1) // 2, 12)
    assert len(calls) == sum(fewer) == steps and sum(more) == steps - draft
    assert len(states) - 1 == steps + sum(more)
    assert more == [False] * draft + [True, False] * (steps - draft)
    assert fewer == [not again for again in more] and (states[-1] < 5).all()
    for seen, before in zip(calls, (a for a, f in zip(states, fewer) if f), strict=True):
        assert torch.equal(seen, before)  # a pass reads the state that was shown before it


def test_revision_keeps_with_odds_of_p():
    """Of three places, written with p = 1/2, 1/2 and 1 (but for 1e-9), one is masked again. The
    order in which they are kept is drawn with odds of p, so place 2 is the last one with
    probability 2 * (1/2 / 2) * (1/2 / 1.5) = 1/6."""
    logits, masked = torch.full((3, 3), -20.0), []
    logits[:, 0], logits[:2, 1] = 0, 0

    def model(x):
        masked.append(x == 2)
        return logits.expand(*x.shape, 3)
    last(unmask(model, torch.full((8000, 3), 2), 2, 2, revise=0.1, generator=seeded()))
    assert masked[0].all() and (masked[1].sum(1) == 1).all()
    assert_distribution(masked[1].sum(0), [5 / 12, 5 / 12, 1 / 6])
    assert_not_distribution(masked[1].sum(0), [1 / 3, 1 / 3, 1 / 3])


def test_what_counts_is_the_probability_when_written():
    """One of two places is written with p = 1/2; after that the model is sure of both. The first is
    masked again 2 times in 3."""
    seen = []

    def model(x):
        seen.append(x)
        logits = torch.tensor([0.0, 0.0 if len(seen) == 1 else -20.0, 0.0])
        return logits.expand(*x.shape, 3)
    last(unmask(model, torch.full((8000, 2), 2), 2, 4, revise=0.1, generator=seeded()))
    first, again = seen[1] != 2, seen[2] == 2
    assert (first.sum(1) == 1).all() and (again.sum(1) == 1).all()
    same = int((first == again).all(1).sum())
    assert_distribution([same, 8000 - same], [2 / 3, 1 / 3])
    assert_not_distribution([same, 8000 - same], [1 / 2, 1 / 2])


def test_revision_repairs():
    """The table's characters depend on each other, so one pass for all of them is far from its
    distribution; revising one random place at a time, at temperature 1, leads back to it (Gibbs
    sampling)."""
    table = Table(seed=1)
    x, joint = torch.full((4000, 3), M), table.joint.detach()
    draft = counts(table, last(unmask(table, x, M, steps=1, generator=seeded())))
    states = unmask(table, x, M, steps=24, revise=1e-9, generator=seeded())
    mended = counts(table, last(states))
    assert pearson(mended, joint) < pearson(draft, joint) / 3


# -----------------------------------------------------------------------------
# generators, odd logits, all flags together


def test_a_list_of_generators_makes_rows_independent():
    table = Table(T=6, V=2)
    runs = [last(unmask(table, torch.full((n, 6), 2), 2, 4, revise=0.3, remasking=remasking,
                        generator=[seeded(i) for i in range(n)]))
            for remasking in ("dilated", "random") for n in (10, 20)]
    assert torch.equal(runs[0], runs[1][:10]) and torch.equal(runs[2], runs[3][:10])
    assert len(set(map(tuple, runs[1].tolist()))) > 5
    with pytest.raises(ValueError, match="generators must be one per row, 3"):
        next(unmask(table, torch.full((3, 6), 2), 2, 4, generator=[seeded(), seeded()]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_distribution(bad):
    def model(x):
        logits = torch.zeros(*x.shape, 6)
        logits[0, 3, 2] = bad
        return logits
    with pytest.raises(ValueError, match="no distribution"):
        next(unmask(model, torch.full((2, 4), 5), 5, 2))
    x = torch.tensor([[5, 5, 5, 1]])
    assert (last(unmask(model, x, 5, 2)) < 5).all()  # nobody asked about that place


@pytest.mark.parametrize("settings", [
    dict(), dict(cfg_scale=1.0), dict(temperature=0), dict(revise=0.5, remasking="low_confidence")])
def test_minus_infinity_is_log_0_but_not_for_all(settings):
    logits = torch.tensor([0.0, -torch.inf, 0.0, 5.0])

    def model(x):
        return logits.expand(*x.shape, 4)
    x = last(unmask(model, torch.full((50, 4), 3), 3, 4, generator=seeded(), **settings))
    assert ((x == 0) | (x == 2)).all()
    logits = torch.full((4,), -torch.inf)
    with pytest.raises(ValueError, match="no distribution"):
        next(unmask(model, torch.full((1, 4), 3), 3, 4, **settings))


@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("revise", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_grid(remasking, block_length, cfg_scale, revise, temperature):
    """All flags together, on pages with no mask given away, a prompt, holes, and one hole: see what
    every run must do."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=12, vocab_size=7, n_layer=1, n_head=1, n_embd=8)).eval()
    empty, prompt = torch.full((12,), 6), torch.full((12,), 6)
    holes, one = torch.arange(12) % 6, torch.arange(12) % 6
    prompt[:4], holes[[0, 3, 4, 8, 11]], one[7] = 1, 6, 6
    pages = (empty, prompt, holes, one)
    for page, batch, steps in itertools.product(pages, (1, 3), (1, 4, 30)):
        x, calls = page.repeat(batch, 1), []
        given = x != 6

        def counted(x, calls=calls):
            calls.append(0)
            return model(x)
        settings = (steps, temperature, remasking, block_length, cfg_scale, revise)
        states = list(unmask(counted, x, 6, *settings, seeded()))
        again = list(unmask(model, x, 6, *settings, seeded()))
        assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
        assert 1 <= len(calls) <= steps and (states[-1] < 6).all() and (states[-1] >= 0).all()
        assert all(torch.equal(state[given], x[given]) for state in states)
        if not revise:
            n_masks = int((~given[0]).sum())
            n_blocks = -(-n_masks // (block_length or n_masks))
            assert len(states) == len(calls) > min(steps, n_masks) - n_blocks
            assert len(calls) <= min(steps, n_masks)


def test_same_seed_same_text():
    table = Table(T=4, V=3)
    x = torch.full((5, 4), 3)
    runs = [last(unmask(table, x, 3, 2, generator=seeded(s))) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(temperature=-1), dict(temperature=float("nan")),
    dict(temperature=float("inf")), dict(cfg_scale=-1.0), dict(cfg_scale=float("nan")),
    dict(block_length=0), dict(remasking="best"), dict(revise=-0.1), dict(revise=1.1),
    dict(revise=float("nan"))])
def test_values_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        next(unmask(uniform_model, torch.full((1, 4), 5), 5, **{"steps": 2, **bad}))


# -----------------------------------------------------------------------------
# which tokens are missing


def knowing(tokens, V, block_size, odds):
    """A predictor that reads tokens (T,) in parts of block_size, one per call, and gives each right
    answer odds times the probability of any other."""
    parts = iter(tokens.split(block_size))

    def model(x):
        right = torch.nn.functional.one_hot(next(parts), V + 1)[None]      # (1, T, V + 1)
        assert right.shape[:2] == x.shape
        return right * math.log(odds)
    return model


def test_rates_find_the_tokens_that_were_taken_out():
    """Even by a model that is wrong about most of them."""
    V, tokens = 6, torch.randint(6, (600,), generator=seeded())
    x = tokens.where(tokens > 1, V)
    model = knowing(tokens, V, block_size=256, odds=2)
    assert float(model(x[None, :256])[0, 0, :V].softmax(-1).max()) < 0.3
    rates = missing_rates(knowing(tokens, V, 256, odds=2), x, V, block_size=256)
    assert rates.shape == (V,) and (rates[:2] > 0.95).all() and (rates[2:] < 0.01).all()
    assert (rates > 1e-4).all()                               # and none is ruled out


def test_weighted_probabilities_are_in_proportion_to_the_rates():
    rates = torch.tensor([0.5, 1.0, 0.25]).double()
    logits = torch.randn(2, 5, 4, generator=seeded())
    p = weighted(lambda idx: logits, rates)(None)[..., :3].softmax(-1)
    expected = logits[..., :3].softmax(-1) * rates
    assert torch.allclose(p, expected / expected.sum(-1, keepdim=True))


def test_rates_are_equal_where_tokens_are_missing_at_random():
    """Then they change no answer: a factor of all probabilities alike."""
    tokens = torch.arange(5).repeat_interleave(20)            # 20 of each
    for missing in (1, 6, 20):                                # of each, up to all
        x = tokens.where(torch.arange(100) % 20 >= missing, 5)
        rates = missing_rates(knowing(tokens, 5, 100, odds=1e6), x, 5, block_size=100)
        assert torch.allclose(rates, torch.tensor(5 * missing / 101).double())
    tokens = tokens.repeat(10)
    x = tokens.where(torch.rand(1000, generator=seeded()) >= 0.3, 5)       # almost equal
    rates = missing_rates(knowing(tokens, 5, 1000, odds=1e6), x, 5, block_size=1000)
    assert rates.max() / rates.min() < 1.1


def test_rates_lie_between_the_share_and_each_token_s_own():
    """Where the model is certain: correlation c of a beta-binomial distribution by the method of
    moments, and ((1 - c) * share + c * missing) / (1 - c + c * n) of n tokens."""
    tokens = torch.arange(2).repeat_interleave(50)  # 40 of the 0s are missing, and 5 of the 1s
    x = tokens.where((torch.arange(100) >= 40) & (torch.arange(100) < 95), 2)
    rates = missing_rates(knowing(tokens, 2, 100, odds=1e12), x, 2, block_size=100)
    share = 45 / 101
    squares = (40 - share * 50) ** 2 + (5 - share * 50) ** 2
    c = (squares / (share * (1 - share)) - 100) / (2 * 50**2)
    assert 0.4 < c < 0.5
    expected = [((1 - c) * share + c * missing) / (1 - c + c * 50) for missing in (40, 5)]
    assert torch.allclose(rates, torch.tensor(expected).double(), atol=1e-6)
    assert share < rates[0] < 40 / 50 and 5 / 50 < rates[1] < share


# -----------------------------------------------------------------------------
# pages longer than the model's block


def pages(fill, x, mask_id, block_size, steps=None, enough=4):
    windows = page_windows(x[0] == mask_id, block_size)
    return generate_pages(fill, x, mask_id, windows, share_steps(windows, steps, enough))


def test_windows_slide_with_half_a_block_of_context():
    seen = []

    def fill(window, steps):
        seen.append((window.tolist(), steps))
        yield window.where(window != 9, len(seen))
    x = torch.tensor([[0] + [9] * 21])
    *_, x = pages(fill, x, 9, block_size=8, steps=18)
    assert x.tolist() == [[0] + [1] * 7 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 2]
    assert [steps for _, steps in seen] == [4, 4, 4, 4, 2]  # a full window has no more
    assert all(len(window[0]) == 8 for window, _ in seen)
    assert seen[1] == ([[1] * 4 + [9] * 4], 4)
    assert seen[4] == ([[3] * 2 + [4] * 4 + [9] * 2], 2)  # the last one ends with the page


def test_a_mask_has_context_on_both_sides_wherever_there_is_text():
    """The window that writes a mask for good reaches a quarter of a block beyond it, or the end."""
    x = torch.arange(100)[None] % 5
    x[0, [0, 5, 13, 14, 15, 16, 30, 31, 60, 90, 99]] = 5
    given, reach = x != 5, torch.zeros(100)

    def fill(window, _):
        at = next(i for i in range(100) if torch.equal(page[0, i:i + 16], window[0]))
        reach[at:at + 16] = torch.where(window[0] == 5, at + 16, reach[at:at + 16])
        yield window.where(window != 5, 7)
    page = x
    for page in pages(fill, x, 5, 16, 100):
        assert torch.equal(page[given], x[given])
    assert (page != 5).all()
    for i in (x[0] == 5).nonzero().flatten().tolist():
        assert reach[i] >= min(i + 5, 100)


def test_a_long_text_with_holes():
    x = torch.arange(300).repeat(2, 1) % 5
    holes = torch.tensor([0, 1, 2, 50, 60, 61, 62, 63, 64, 65, 66, 67, 68, 200, 299])
    x[:, holes] = 5
    given = x != 5

    def fill(window, steps):
        assert window.shape[1] == 16 and (window == 5).any()
        return unmask(uniform_model, window, 5, steps, generator=seeded())
    states = list(pages(fill, x, 5, 16, 15))
    masks = [int((state == 5).sum()) for state in [x, *states]]
    assert masks[-1] == 0 and sum(a > b for a, b in itertools.pairwise(masks)) == 15  # the passes
    assert all(torch.equal(state[given], x[given]) for state in states)


@pytest.mark.parametrize("steps, passes", [(1, 12), (7, 12), (24, 24), (1000, 1000)])
def test_the_windows_share_the_steps(steps, passes):
    shares = []

    def fill(window, n):
        shares.append(n)
        yield window.where(window != 5, 0)
    last(pages(fill, torch.full((1, 100), 5), 5, 16, steps))
    assert len(shares) == 12 and min(shares) >= 1 and sum(shares) == passes


@pytest.mark.parametrize("revise", [0.0, 0.3])
def test_a_page_that_fits_is_one_window(revise):
    def fill(window, steps):
        return unmask(uniform_model, window, 5, steps, revise=revise, generator=seeded())
    x = torch.full((2, 10), 5)
    states, window = list(pages(fill, x, 5, 16, 4)), list(fill(x, 4))
    assert torch.equal(torch.stack(states), torch.stack(window))
    assert list(pages(fill, torch.zeros(2, 10).long(), 5, 16, 4)) == []


# -----------------------------------------------------------------------------
# something to watch


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def test_a_frame_of_the_animation():
    chars, end = "ab\n\x1b", "\r\n\r\nstep 3"  # an empty line and the footer

    def page(row, before, width=80, height=24):
        return frame(row, before, 4, chars, "step 3", width, height)
    # no control character gets through
    assert plain(page([0, 4, 2, 1, 3], [4, 4, 4, 1, 3])) == "a░\r\nb·" + end
    assert "\x1b[30;43ma\x1b[0m" in page([0, 0], [4, 0])  # the fresh one is highlighted
    assert page([0, 0], [4, 0]).count("\x1b[30;43m") == 1
    assert "\x1b[30;43m░\x1b[0m" in page([4, 0], [0, 0])  # so is what is masked again
    assert plain(page([0] * 7, [0] * 7, width=3)) == "aaa\r\naaa\r\na" + end
    tall = [0, 2] * 50 + [4] + [2, 0] * 50
    for height in (10, 3, 1):
        shown = plain(page(tall, tall, height=height))
        assert "░" in shown and shown.endswith(end) and len(shown.split("\r\n")) == max(height, 3)
    full = [0, 2] * 50 + [1]
    assert plain(page(full, full, height=12)) == "a\r\n" * 9 + "b" + end


def replay(html):
    """What the page's own script shows at the end: -> (pages, number of passes, the run)."""
    data = re.search(r'<script id="run" type="application/json">(.*?)</script>', html, re.DOTALL)
    run = json.loads(data.group(1))
    pages = [list(page) for page in run["start"]]
    for changes in run["changes"]:
        for page, at, char in changes:
            pages[page][at] = char
    passes = sum(any(char is not None for *_, char in changes) for changes in run["changes"])
    return ["".join(page) for page in pages], passes, run


def test_a_replay_is_one_safe_page(tmp_path):
    text = '</script>&\u2028"\\{{RUN}}'
    chars = sorted(set(text))
    start = torch.full((1, len(text)), 99)
    end = torch.tensor([[chars.index(c) for c in text]])
    save_replay(tmp_path / "r.html", [start, end], 99, chars)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count("</script>") == 2 and replay(html)[:2] == ([text], 1)
    assert "<" not in html[html.index('"application/json">') + 19:].split("</script>")[0]
    assert not re.search(r"https?://|src=|<link|@import", html)  # no external resource
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_replay_shows_what_is_masked_again(tmp_path):
    states = [torch.tensor([row]) for row in ([9, 9, 0], [1, 9, 0], [1, 0, 0], [9, 0, 0], [0] * 3)]
    save_replay(tmp_path / "r.html", states, 9, "ab")
    pages, passes, run = replay((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert run["start"] == [[None, None, "a"]] and pages == ["aaa"] and passes == 3
    assert run["changes"] == [[[0, 0, "b"]], [[0, 1, "a"]], [[0, 0, None]], [[0, 0, "a"]]]


# -----------------------------------------------------------------------------
# the command

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def save_gpt(path, chars, block_size, **info):
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=1, n_embd=8)
    save_checkpoint(path, GPT(GPTConfig(block_size, len(chars) + 1, **sizes)), chars, **info)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_gpt(tmp_path_factory.mktemp("model") / "tiny.pt", LETTERS, 24)


@pytest.fixture(scope="module")
def with_line_ends(tmp_path_factory):
    """A model that knows line ends, too."""
    return save_gpt(tmp_path_factory.mktemp("model") / "lines.pt", LETTERS + "\n", 16)


def test_stdout_is_the_text_and_nothing_else(sample, checkpoint):
    flags = ("--prompt=hello ", "--num_samples=2")
    result = sample(f"--path={checkpoint.with_suffix('')}", *flags)
    assert result.code == 0
    first, second = result.out.split("\f")
    for page in (first, second):
        assert re.fullmatch("hello [a-z ]{18}\n", page)
    assert first != second
    assert "14 steps, 36 characters" in result.err and "characters/s" in result.err
    assert sample(f"--path={checkpoint}", *flags).out == result.out
    assert sample(f"--path={checkpoint}", *flags, "--seed=2").out != result.out


def test_form_feeds_separate_pages(sample, checkpoint, with_line_ends):
    """Also where the pages have line ends and empty lines of their own."""
    for path, n in itertools.product((checkpoint, with_line_ends), (1, 2, 5)):
        result = sample(f"--path={path}", f"--num_samples={n}", "--prompt=a")
        pages = result.out.split("\f")
        assert result.code == 0 and len(pages) == n
        assert {len(page) for page in pages} == {25 if path == checkpoint else 17}
        assert all(page.startswith("a") and page.endswith("\n") for page in pages)


def test_a_page_without_a_prompt_begins_at_a_line_s_start(sample, with_line_ends, tmp_path,
                                                          monkeypatch):
    """The model sees a line end, which is not shown."""
    seen, forward = [], GPT.forward

    def seen_forward(self, idx):
        seen.append(idx)
        return forward(self, idx)
    monkeypatch.setattr(GPT, "forward", seen_forward)
    flags = (f"--path={with_line_ends}", f"--html={tmp_path}/run.html", "--dtype=float32")
    result = sample(*flags)
    line_end, mask_id = 27, 28
    assert result.code == 0 and seen[0].tolist() == [[line_end] + [mask_id] * 15]
    assert all((idx[:, 0] == line_end).all() for idx in seen)
    pages, _, run = replay((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert run["start"] == [[None] * 15] and result.out == pages[0] + "\n"
    assert "15 characters" in result.err
    assert sample(*flags, "--prompt=\n").out == "\n" + result.out  # a given one is shown
    assert len(sample(*flags, "--gen_length=7").out) == 8


def test_flags_do_what_they_say(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--gen_length=12", "--steps=3", "--block_length=4",
                    "--remasking=low_confidence", "--cfg_scale=0.5", "--temperature=0",
                    "--prompt=a", "--revise=0", "--dtype=float32")
    assert result.code == 0 and len(result.out) == 14
    assert "3 steps, 12 characters" in result.err
    few = (f"--path={checkpoint}", "--gen_length=2", "--steps=9")
    assert sample(*few).err.startswith("[9 steps, 2 characters")
    assert sample(*few, "--revise=0").err.startswith("[2 steps")


def test_each_sample_has_a_stream_of_its_own(sample, checkpoint):
    few, many = (sample(f"--path={checkpoint}", f"--num_samples={n}", "--dtype=float32")
                 .out.split("\f") for n in (3, 6))
    assert len(set(many)) == 6 and few == many[:3]


@pytest.mark.parametrize("how", ["text", "file", "stdin"])
def test_infill_brings_back_what_was_given(sample, tmp_path, monkeypatch, with_line_ends, how):
    text = "_he cat sat___ the mat" + ("" if how == "text" else "\n")
    # a file as Windows saves it
    data = (text if how == "stdin" else text.replace("\n", "\r\n")).encode(
        "utf-8" if how == "stdin" else "utf-8-sig")
    (tmp_path / "damaged_text").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    arg = {"text": text, "file": tmp_path / "damaged_text", "stdin": "-"}[how]
    result = sample(f"--path={with_line_ends}", f"--infill={arg}", "--num_samples=20",
                    "--temperature=1")
    pages = result.out.split("\f")
    assert result.code == 0 and len(pages) == 20 and len(set(pages)) > 10, result
    for page in pages:
        assert "_" not in page
        assert re.fullmatch(text.rstrip("\n").replace("_", "(.|\n)") + "\n", page)


def test_infill_notices_which_characters_are_missing(sample, monkeypatch):
    text = ("NATHANIEL:\nPeter, didst ever see the like?\n\nPETER:\nHe kills her in her own humour."
            "\n\nGRUMIO:\nWhere is he?\n\nCURTIS:\nIn her chamber, making a sermon of continency "
            "to her;\nAnd rails, and swears, and rates, that she, poor soul,\n")
    flags = (f"--infill={text.replace('e', '_')}", "--dtype=float32")

    def wrong():
        return sum(a != b for a, b in zip(sample(*flags).out, text, strict=True))
    with_rates = wrong()
    monkeypatch.setattr(main_script, "missing_rates", lambda _, x, mask_id, __: torch.ones(mask_id))
    assert with_rates <= 1 and wrong() >= 3


def test_only_the_holes_of_a_text_are_weighted(sample, monkeypatch, with_line_ends, tmp_path):
    """Neither the masks of a page to be written nor the empty cells of a puzzle."""
    calls = []
    monkeypatch.setattr(main_script, "missing_rates",
                        lambda _, x, mask_id, __: calls.append(x) or torch.ones(mask_id))
    assert sample(f"--path={with_line_ends}", "--prompt=a").code == 0 and not calls
    assert sample(f"--path={with_line_ends}", "--infill=a_b").code == 0 and len(calls) == 1
    puzzle = save_gpt(tmp_path / "puzzle.pt", "ab\n", 12, record=3)
    assert sample(f"--path={puzzle}", "--infill=a_").code == 0 and len(calls) == 1


def test_another_character_for_the_holes(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--infill=what is this?", "--mask_char=?")
    assert result.code == 0 and re.fullmatch("what is this[a-z ]\n", result.out)
    # a character that has an id
    known = sample(f"--path={checkpoint}", "--infill=banana", "--mask_char=n", "--num_samples=5")
    assert known.code == 0 and "10 characters" in known.err
    assert all(re.fullmatch("ba.a.a\n", page) for page in known.out.split("\f"))


def test_longer_than_the_block(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--gen_length=100", "--prompt=hello ", "--steps=50")
    assert result.code == 0 and len(result.out) == 107 and result.out.startswith("hello "), result
    assert "50 steps, 100 characters" in result.err
    # the first window, of 24 characters, has the 14 steps of the default, and 18 of 12 have 12 each
    default = sample(f"--path={checkpoint}", "--gen_length=240")
    assert re.match(r"\[230 steps, 240 characters", default.err), default.err
    prompt = "the quick brown fox jumps over the lazy dog"  # longer than the block
    assert sample(f"--path={checkpoint}", f"--prompt={prompt}").out.startswith(prompt)


def test_html_replays_the_run(sample, checkpoint, tmp_path):
    path = tmp_path / "run.html"
    path.write_text("old")
    result = sample(f"--path={checkpoint}", f"--html={path}", "--num_samples=2", "--steps=7",
                    "--gen_length=40", "--revise=0.3")
    pages, passes, run = replay(path.read_text(encoding="utf-8"))
    assert result.code == 0 and [page + "\n" for page in pages] == result.out.split("\f")
    assert f"[{passes} steps" in result.err and len(run["changes"]) > passes == 7


def test_animate_without_a_terminal_is_plain(sample, checkpoint):
    plain = sample(f"--path={checkpoint}").out
    assert sample(f"--path={checkpoint}", "--animate").out == plain


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
@pytest.mark.parametrize("interrupt", [False, True])
def test_animate_leaves_the_terminal_as_it_was(checkpoint, interrupt):
    ours, theirs = os.openpty()
    command = [sys.executable, ROOT / "main.py", f"--path={checkpoint}", "--animate",
               "--device=cpu", "--steps=20"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
                               text=True)
    os.close(theirs)
    shown, sent = b"", False
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # what Linux says when the other end is closed
            break
        if not chunk:
            break
        shown += chunk
        if interrupt and not sent and shown.count(b"\x1b[H") >= 5:
            process.send_signal(signal.SIGINT)
            sent = True
    err = process.communicate(timeout=30)[1]
    os.close(ours)
    assert process.returncode == (130 if interrupt else 0) and "Traceback" not in err, err
    screen, after = shown.split(b"\x1b[?7h\x1b[?25h\x1b[?1049l")
    assert screen.startswith(b"\x1b[?1049h\x1b[?25l\x1b[?7l") and b"\x1b" not in after
    frames = 1 + 20 + 10  # the start, the passes, and what the second half of them masks again
    if interrupt:
        assert screen.count(b"\x1b[H") < frames and after == b""
    else:
        assert screen.count(b"\x1b[H") == frames and len(after.strip()) == 24
        assert b"step 0 of 20" in screen and b"step 20 of 20" in screen


@pytest.mark.parametrize("flags, words", [
    (["--prompt=h\N{SNOWMAN}llo"], ["--prompt", "\N{SNOWMAN}"]),
    (["--gen_length=0"], ["--gen_length"]),
    (["--infill=no holes"], ["--infill", "no holes"]),
    (["--infill="], ["--infill"]),
    (["--infill=/nowhere/text"], ["--infill", "/nowhere/text"]),
    (["--infill=my_damaged_play.txt"], ["no file my_damaged_play.txt"]),
    (["--seed=--"], ["--seed", "value"]),
    (["--gen_length=--"], ["--gen_length", "value"]),
    (["--infill=h\N{SNOWMAN}l_o"], ["--infill", "\N{SNOWMAN}"]),
    (["--infill=h_", "--prompt=h"], ["--infill", "--prompt"]),
    (["--infill=h_", "--gen_length=3"], ["--infill", "--gen_length"]),
    (["--infill=h_", "--mask_char="], ["--mask_char"]),
    (["--infill=h_", "--mask_char=__"], ["--mask_char"]),
    ([f"--infill={ROOT / 'pretrained_gpt_last.pt'}"], ["pretrained_gpt_last.pt", "UTF-8"]),
    (["--revise=2"], ["revise"]),
    (["--remask=0.3"], ["--remask"]),
    (["--html=/nowhere/run.html"], ["--html", "/nowhere/run.html"]),
    (["--block_length=x"], ["--block_length"]),
    (["--html=/"], ["--html", ".html"]),
    (["--html="], ["--html"]),
    ([f"--html={ROOT / 'LICENSE'}"], ["LICENSE", ".html"]),
    ([f"--infill={ROOT / 'LICENSE'}", "--mask_char=#"], ["LICENSE", "no holes", "#"]),
    (["--infill=a", "--mask_char=\n"], ["no holes"]),
    (["--gen_length=1" + "0" * 20], ["10,000,000", "--gen_length"]),
    (["--block_length=-1"], ["block_length"]),
    (["--dtype=int4"], ["--dtype=int4"]),
    (["--steps=0"], ["steps"]),
    (["--steps=few"], ["--steps", "few"]),
    (["--temperature=-0.1"], ["temperature"]),
    (["--temperature=nan"], ["temperature"]),
    (["--cfg_scale=-1"], ["cfg_scale"]),
    (["--block_length=0"], ["block_length", "not 0"]),
    (["--remasking=best"], ["--remasking"]),
    (["--num_samples=0"], ["--num_samples"]),
    (["--seed=-1"], ["--seed"]),
    (["--device=cuda:99"], ["cuda:99"]),
    (["--device=tpu"], ["tpu"]),
    (["--path=/nowhere/model"], ["/nowhere/model.pt"]),
    (["--path=/"], ["'/'"]),
    (["--path="], ["''"]),
    (["--length=3"], ["--length"]),
])
def test_bad_input_is_one_line(sample, checkpoint, flags, words):
    result = sample(f"--path={checkpoint}", *flags)
    assert_one_line_error(result, *words)
    assert result.out == ""


def test_help_is_grouped_and_shows_every_default(sample):
    result = sample("--help")
    groups = read_help(result.out)
    assert result.code == 0
    flags = {name: set(groups[name]) for name in ("page", "sampler", "watching", "device")}
    assert flags == {
        "page": {"path", "prompt", "gen_length", "infill", "mask_char", "num_samples", "seed"},
        "sampler": {"steps", "temperature", "revise", "remasking", "tries", "block_length",
                    "cfg_scale"},
        "watching": {"animate", "html"},
        "device": {"device", "dtype"},
    }
    for name in flags:
        for flag, text in groups[name].items():
            assert "(default: " in text, flag


def test_the_shipped_model_writes_shakespeare_from_any_folder(run, tmp_path):
    """Nothing prepared; 4 pages must use many of the commonest words. Random letters would use none
    of the long ones."""
    result = run(ROOT / "main.py", "--num_samples=4", "--device=cpu", cwd=tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    # a block of 256, but for the line end that it begins after, and one line end more
    assert [len(page) for page in result.stdout.split("\f")] == [256] * 4
    common = "that with this have your thou shall will what lord him not for the and you".split()
    assert len(set(common) & set(result.stdout.lower().split())) >= 6
