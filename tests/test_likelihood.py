"""How likely a text is: the exact likelihood of an order of writing, and --score."""

import io
import itertools
import re
import sys
from functools import partial

import pytest
import torch
from conftest import Table, assert_distribution, assert_not_distribution, assert_one_line_error
from helpers import (
    LETTERS,
    ORDERS,
    Lookup,
    all_texts,
    assert_mean,
    count,
    enumerate_nelbo,
    last,
    save_gpt,
    seeded,
)

from diffusion import estimate_nelbo, unmask
from lib.checkpoint import load_checkpoint
from lib.likelihood import exact_nll, score
from lib.llada import unmask_blocks
from lib.tokenizer import encode

M = 2  # [MASK], where the tokens are 0 and 1


def in_blocks(block_length):
    """Return a sampler that writes in blocks or, without a block_length, unmask."""
    return partial(unmask_blocks, block_length=block_length) if block_length else unmask


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
    model, sampler = Lookup(T, V), in_blocks(block_length)
    nll = torch.cat([exact_nll(model, text[None], V, steps, sampler, remasking=remasking,
                               generator=seeded(5)) for text in all_texts(T, V)])
    assert (-T * nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("remasking", ORDERS)
def test_they_do_so_if_tokens_are_equally_likely(remasking):
    """Then rounding decides which is the likeliest."""
    model = Lookup(3, 4)
    model.logits[..., :4] = model.logits[..., :4].round()
    nll = torch.cat([exact_nll(model, text[None], 4, 3, remasking=remasking, generator=seeded())
                     for text in all_texts(3, 4)])
    assert (-3 * nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("V", [3, 5, 12])
def test_they_do_so_if_places_are_equally_sure(V):
    """As all are in the first pass, if positions are relative. The text must not decide."""
    model = Lookup(3, V)
    model.logits[-1] = model.logits[-1, 0]
    nll = exact_nll(model, all_texts(3, V), V, 3, remasking="low_confidence")
    assert (-3 * nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_from_left_to_right_it_is_the_chain_rule():
    T, V = 4, 3
    model, x = Lookup(T, V), all_texts(T, V)
    log_p = torch.zeros(len(x)).double()
    for i in range(T):
        left = x.where(torch.arange(T) < i, V)
        log_p += model(left)[:, i, :V].log_softmax(-1).gather(-1, x[:, i:i + 1])[:, 0]
    nll = exact_nll(model, x, V, T, in_blocks(1))
    torch.testing.assert_close(nll, -log_p / T)
    other = exact_nll(model, x, V, T, remasking="low_confidence")
    assert not torch.allclose(nll, other)  # another order, another value


@pytest.mark.parametrize("block_length", [None, 1])
@pytest.mark.parametrize("remasking", ORDERS)
def test_where_the_predictor_is_right_every_order_gives_the_joint(remasking, block_length):
    table = Table(T=3, V=2)
    nll = exact_nll(table, table.outcomes, M, 3, in_blocks(block_length), remasking=remasking,
                    generator=seeded())
    torch.testing.assert_close(nll, -table.joint.detach().log() / 3)


def test_the_tokens_of_one_step_are_independent():
    table = Table(T=3, V=2)
    marginals = table(torch.full((1, 3), M))[0, :, :2].softmax(-1)            # (3, 2)
    product = marginals[torch.arange(3), table.outcomes].prod(1)
    torch.testing.assert_close(exact_nll(table, table.outcomes, M, 1), -product.log() / 3)


def mixed_over_orders(model, steps, remasking, block_length=None, draws=10_000):
    """Return the probability of each text of three tokens, 0 or 1: the mean over many draws of the
    order, the same for all texts."""
    return torch.stack([(-3 * exact_nll(model, text.expand(draws, 3), M, steps,
                                        in_blocks(block_length), remasking=remasking,
                                        generator=seeded(1))).exp().mean()
                        for text in all_texts(3, 2)])


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("remasking, block_length", [
    ("random", None), ("dilated", None), ("dilated", 2), ("random", 1), ("low_confidence", 1)])
def test_samplers_at_temperature_1_write_each_text_with_its_probability(remasking, block_length,
                                                                        steps):
    """From left to right, low_confidence needs a step per token: with fewer, it chooses."""
    steps = 3 if remasking == "low_confidence" else steps
    model = Lookup(3, 2, seed=2)
    states = in_blocks(block_length)(model, torch.full((20_000, 3), M), M, steps,
                                     remasking=remasking, generator=seeded())
    got = count(last(states), V=2)
    assert_distribution(got, mixed_over_orders(model, steps, remasking, block_length))
    assert_not_distribution(got, mixed_over_orders(model, 1, remasking, block_length))
    assert_not_distribution(got, mixed_over_orders(model, 3, "low_confidence"))


def test_low_confidence_is_exact_only_if_it_goes_by_the_likeliest_token():
    """As exact_nll and, at temperature 0, unmask do. At temperature 1, unmask goes by the token
    that it drew, so what it writes has other probabilities."""
    model = Lookup(3, 2, seed=2)
    page = torch.full((20_000, 3), M)
    got = count(last(unmask(model, page, M, 3, 1.0, "low_confidence", generator=seeded())), V=2)
    assert_not_distribution(got, mixed_over_orders(model, 3, "low_confidence", draws=1))
    greedy, x = [page[:1], *unmask(model, page[:1], M, 3, 0.0, "low_confidence")], 0.0
    for before, after in itertools.pairwise(greedy):
        x -= model(before)[0, (before != after)[0], :M].softmax(-1).amax().log()
    nll = exact_nll(model, greedy[-1], M, 3, remasking="low_confidence")
    assert nll.item() == pytest.approx(x.item() / 3)


def test_the_mean_over_all_orders_is_the_nelbo_and_above_the_likelihood():
    """Where the predictor is not right, orders disagree, and the bound is not tight."""
    model, draws = Lookup(3, 2, seed=2), 20_000
    nll = exact_nll(model, all_texts(3, 2).repeat(draws, 1), M, 3, generator=seeded())
    gaps = []
    for text, of_text in zip(all_texts(3, 2), nll.view(draws, 8).T, strict=True):
        assert_mean(of_text, enumerate_nelbo(model, text[None], M))
        likelihood = (-3 * of_text).exp().mean()  # what unmask samples: see above
        gaps.append(float(of_text.mean() + likelihood.log() / 3))
    assert min(gaps) > 0 and max(gaps) > 0.1


# -----------------------------------------------------------------------------
# --score

BLOCK = 8
TEXTS = ["a", "the cat", "the cat ", "the cat sat on", "the cat sat on the mat "]  # up to 23 of 8


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A mask predictor and a twin; and one whose tokens are word pieces."""
    folder, pieces = tmp_path_factory.mktemp("model"), [*LETTERS, "th", "the", " c", "at", " cat"]
    return {
        "diffusion": save_gpt(folder / "diffusion.pt", LETTERS, BLOCK),
        "twin": save_gpt(folder / "twin.pt", LETTERS, BLOCK, causal=True),
        "pieces": save_gpt(folder / "pieces.pt", pieces, BLOCK),
    }


@pytest.fixture(scope="module")
def models(paths):
    """The models and their vocabularies. Their weights are large, so that probabilities differ."""
    models = {}
    for name, path in paths.items():
        model, vocab, _ = load_checkpoint(path)
        for p in model.parameters():
            p.data.normal_(std=0.6, generator=torch.Generator().manual_seed(p.numel()))
        models[name] = model, vocab
    return models


def windows_of(ids):
    """The text in windows of a block, and what is left of it."""
    return [ids[i:i + BLOCK] for i in range(0, len(ids), BLOCK)]


@torch.no_grad()
def left_to_right_by_hand(model, window):
    """-log p of a window's tokens, each given those before it: one forward pass for each."""
    nats, mask_id = 0.0, model.config.mask_id
    for i, token in enumerate(window):
        if model.config.causal:
            logits = model(torch.tensor([[mask_id, *window[:i]]]))[0, i, :mask_id]
        else:
            x = torch.tensor([[*window[:i], *[mask_id] * (len(window) - i)]])
            logits = model(x)[0, i, :mask_id]
        nats -= logits.double().log_softmax(dim=-1)[token].item()
    return nats


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d{4}", line)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["diffusion", "pieces"])
def test_the_exact_value_and_the_bound_are_those_computed_by_hand(models, name, text):
    model, vocab = models[name]
    ids = encode(text, vocab).tolist()
    windows = windows_of(ids)
    line = score(model, vocab, text)
    exact = sum(left_to_right_by_hand(model, window) for window in windows) / len(text)
    # the bound is estimated with the same draws for all windows of a block
    full, rest = [w for w in windows if len(w) == BLOCK], [w for w in windows if len(w) < BLOCK]
    bound = sum(len(part) * len(part[0]) * estimate_nelbo(
        model, torch.tensor(part), model.config.mask_id, passes=64)[0]
        for part in (full, rest) if part) / len(text)
    assert numbers(line) == pytest.approx([exact, bound], abs=1e-4)
    assert re.fullmatch(r"\d+\.\d{4} nats per character, exact, from left to right; at most "
                        r"\d+\.\d{4} averaged over all orders of writing \(NELBO\)", line)


@pytest.mark.parametrize("text", TEXTS)
def test_the_twin_has_an_exact_value(models, text):
    model, vocab = models["twin"]
    windows = windows_of(encode(text, vocab).tolist())
    exact = sum(left_to_right_by_hand(model, window) for window in windows) / len(text)
    line = score(model, vocab, text)
    assert numbers(line) == pytest.approx([exact], abs=1e-4)
    assert re.fullmatch(r"\d+\.\d{4} nats per character, exact", line)


def test_one_character_has_one_order_so_the_bound_is_exact(models):
    """A single token is written from nothing in every order."""
    exact, bound = numbers(score(*models["diffusion"], "q"))
    assert exact == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize("name", ["diffusion", "twin"])
def test_the_command_scores_a_text_a_file_and_stdin(sample, paths, tmp_path, monkeypatch, name):
    """And writes nothing else: no page."""
    text = "the cat sat on the mat"
    model, vocab, _ = load_checkpoint(paths[name])
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    for arg in (text, tmp_path / "text.txt", "-"):
        result = sample(f"--path={paths[name]}", f"--score={arg}", "--dtype=float32")
        assert result.code == 0 and result.err == ""
        assert result.out == score(model, vocab, text) + "\n"


def test_the_shipped_model_finds_english_likelier_than_its_letters_sorted(sample):
    text = "What say you now?"
    english, nonsense = (numbers(sample(f"--score={text}", "--dtype=float32").out)
                         for text in (text, "".join(sorted(text))))
    assert max(english) + 1 < min(nonsense)


@pytest.mark.parametrize("text, words", [
    ("", ["--score"]), ("h\N{SNOWMAN}llo", ["\N{SNOWMAN}"]), ("nowhere.txt", ["nowhere.txt"]),
])
def test_a_text_that_can_t_be_scored_is_one_line(sample, paths, text, words):
    assert_one_line_error(sample(f"--path={paths['diffusion']}", f"--score={text}"), *words)
