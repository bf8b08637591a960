"""Blocks and guidance, and LLaDA's own sampler, with which ours is compared in every state."""

import itertools

import pytest
import torch
from conftest import assert_distribution, assert_not_distribution
from helpers import (
    ORDERS,
    constant,
    counting,
    kinds_of_pages,
    last,
    linear,
    places_written,
    seeded,
    sure_by_place,
    uniform_model,
)

from diffusion import unmask
from lib.llada import guided, unmask_blocks
from model import GPT, GPTConfig

M = 2  # [MASK], where the tokens are 0 and 1


def test_guidance_follows_lladas_formula():
    """blind + (1 + scale) * (seeing - blind), where blind has the given tokens masked."""
    seeing, blind = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])

    def model(x):
        return torch.where((x[:, :1] == 0)[..., None], seeing, blind).expand(*x.shape, 3)
    x = torch.tensor([0, M]).expand(20_000, 2)
    written = last(unmask(guided(model, x != M, M, 0.7), x, M, 1, generator=seeded()))[:, 1]
    got = torch.bincount(written, minlength=2)
    assert_distribution(got, (blind + 1.7 * (seeing - blind))[:2].double().softmax(0))
    assert_not_distribution(got, seeing[:2].double().softmax(0))


def test_with_guidance_minus_infinity_is_a_probability_of_0():
    model, x = constant(0.0, -torch.inf, 0.0, 5.0), torch.full((50, 4), 3)
    x = last(unmask(guided(model, x != 3, 3, 1.0), x, 3, 4, generator=seeded()))
    assert ((x == 0) | (x == 2)).all()


# -----------------------------------------------------------------------------
# LLaDA's own sampler, in plain loops

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
    """A single block needs no unmask_blocks."""
    torch.manual_seed(block_length * steps)
    mask_id, seen = 11, set()
    model = GPT(GPTConfig(block_size=40, vocab_size=mask_id + 1, n_layer=2, n_head=2, n_embd=16))
    for p in model.eval().parameters():
        p.data.normal_(std=0.3)
    for prompt_length in (0, 1, 16):
        x = torch.full((prompt_length + 24,), mask_id)
        x[:prompt_length] = torch.randint(mask_id, (prompt_length,))
        expected = llada_generate(model, x, prompt_length, steps, block_length, cfg_scale, mask_id)
        predictor = guided(model, x[None] != mask_id, mask_id, cfg_scale) if cfg_scale else model
        settings = dict(temperature=0.0, remasking="low_confidence", generator=seeded())
        runs = [unmask_blocks(predictor, x[None], mask_id, steps, block_length, **settings)]
        if block_length == 24:
            runs.append(unmask(predictor, x[None], mask_id, steps, **settings))
        for states in map(list, runs):
            assert len(states) == len(expected) == min(steps, 24)
            for state, theirs in zip(states, expected, strict=True):
                assert state[0].tolist() == theirs.tolist()
        seen |= set(theirs.tolist())
    assert len(seen) > 3  # the texts are not all the same token


# -----------------------------------------------------------------------------
# blocks

@pytest.mark.parametrize("remasking", ORDERS)
@pytest.mark.parametrize("block_length", [1, 5, 7, 30])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 100])
def test_every_block_is_written_evenly_and_before_the_next(steps, block_length, remasking):
    """20 masks in each row. With fewer steps than blocks, blocks are longer. In every block the
    passes write equally many, or one more at first."""
    x = torch.full((3, 24), 5)
    x[0, :4], x[1, 10:14], x[2, ::6] = 1, 2, 3
    before = x.clone()
    length = max(block_length, -(-20 // steps))
    block = ((before == 5).cumsum(1) - 1) // length                                   # (3, 24)
    n_blocks = int(block.max()) + 1
    states = list(unmask_blocks(uniform_model, x, 5, steps, block_length, remasking=remasking,
                                generator=seeded()))
    assert torch.equal(x, before)
    assert min(steps, 20) - n_blocks < len(states) <= min(steps, 20)
    written = [[] for _ in range(n_blocks)]  # by the passes for a block: how many tokens
    for state in states:
        assert torch.equal(state[x != 5], x[x != 5])  # what was given or decided stays
        fresh = (x == 5) & (state != 5)
        [number] = {int(n) for n in fresh.sum(1)}
        [current] = block[fresh].unique().tolist()    # no pass is for several blocks
        assert (state[(before == 5) & (block < current)] < 5).all()
        written[current].append(number)
        x = state
    assert (x < 5).all() and torch.equal(x[before != 5], before[before != 5])
    for numbers in written:
        assert numbers == sorted(numbers, reverse=True) and numbers[0] - numbers[-1] <= 1
    passes = [len(numbers) for numbers in written[:-1]]  # the last block may be a shorter one
    if passes and steps <= 20:
        assert max(passes) - min(passes) <= 1


def test_blocks_are_finished_in_order():
    x = torch.full((4, 12), 5)
    x[:, :2] = 0
    states = unmask_blocks(uniform_model, x, 5, steps=10, block_length=5, generator=seeded())
    for step, state in enumerate(states, 1):
        first, second = (state[:, 2:7] != 5).sum(1), (state[:, 7:] != 5).sum(1)
        assert (first == min(step, 5)).all() and (second == max(0, step - 5)).all()
    assert step == 10


@pytest.mark.parametrize("settings", [dict(revise=0.5), dict(threshold=0.15)])
def test_what_a_block_does_ends_with_it(settings):
    """Revision masks again what stands in the block, and a threshold lets no later one be
    written."""
    x = torch.full((4, 12), 5)
    states, blocks, revised = [x], [], 0
    for state in unmask_blocks(uniform_model, x, 5, 24, 4, generator=seeded(), **settings):
        blocks += (((state != states[-1]).nonzero()[:, 1]) // 4).unique().tolist()
        revised += bool(((state == 5) & (states[-1] != 5)).any())
        states.append(state)
    assert blocks == sorted(blocks) and set(blocks) == {0, 1, 2}
    assert (states[-1] < 5).all() and (revised > 3) == ("revise" in settings)


def test_blocks_of_rows_with_different_numbers_of_masks():
    x = torch.tensor([[5, 5, 5, 5], [1, 5, 2, 3], [1, 2, 3, 4], [5, 1, 1, 5]])
    states = list(unmask_blocks(uniform_model, x, 5, 4, 2, generator=seeded()))
    assert len(states) == 4 and (states[1] < 5).sum(1).tolist() == [2, 4, 4, 4]
    assert (states[-1] < 5).all() and torch.equal(states[-1][x != 5], x[x != 5])


@pytest.mark.parametrize("remasking", ORDERS)
def test_a_threshold_of_0_is_one_pass_for_each_block(remasking):
    x, settings = torch.full((5, 6), M), dict(remasking=remasking, threshold=0.0)
    states = list(unmask_blocks(constant(0.0, 1.0, 9.0), x, M, 6, 3, **settings))
    assert [(state != M).sum(1).tolist() for state in states] == [[3] * 5, [6] * 5]


def test_a_threshold_in_a_block_keeps_what_is_surer():
    x = torch.full((1, 6), 3)
    model = sure_by_place(0.99, 0.5, 0.9, 0.6, 0.95, 0.7)
    states = [x, *unmask_blocks(model, x, 3, 6, 3, temperature=0.0, remasking="low_confidence",
                                threshold=0.8)]
    assert places_written(states) == [[0, 2], [1], [4], [5], [3]]


def test_nothing_to_write_needs_no_pass():
    assert list(unmask_blocks(lambda x: 1 / 0, torch.tensor([[0, 1]]), M, 3, 1, revise=0.5)) == []


@pytest.mark.parametrize("remasking", ORDERS)
@pytest.mark.parametrize("block_length, cfg_scale", [(12, 0.7), (3, 0.0), (3, 0.7)])
@pytest.mark.parametrize("revise", [0.0, 0.3])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_all_settings_go_together(remasking, block_length, cfg_scale, revise, threshold):
    """And the model sees nothing but tokens and masks."""
    for page, steps, temperature in itertools.product(kinds_of_pages(12, 6), (1, 4, 15),
                                                      (0.0, 1.0)):
        x, (model, calls) = page.repeat(2, 1), counting(linear(12, 6))
        given, n_masks, runs = x != 6, int((page == 6).sum()), []
        predictor = guided(model, given, 6, cfg_scale) if cfg_scale else model
        for _ in range(2):
            calls.clear()
            runs.append(list(unmask_blocks(
                predictor, x, 6, steps, block_length, temperature=temperature,
                remasking=remasking, revise=revise, threshold=threshold, generator=seeded())))
        states, again = runs
        assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
        assert 1 <= len(calls) <= steps and (states[-1] < 6).all()
        assert all(0 <= ids.min() and ids.max() <= 6 for ids in (*states, *calls))
        assert all(torch.equal(state[given], x[given]) for state in states)
        if not revise:
            assert len(states) == len(calls) <= min(steps, n_masks)
        if not revise and threshold == 1:
            assert len(calls) > min(steps, n_masks) - -(-n_masks // block_length)
