"""--score: how likely a given text is."""

import io
import re
import sys

import pytest
import torch
from conftest import assert_one_line_error
from helpers import LETTERS, save_gpt

from diffusion import estimate_nelbo
from lib.checkpoint import load_checkpoint
from lib.score import score
from lib.tokenizer import encode

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
