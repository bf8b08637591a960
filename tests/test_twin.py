"""The autoregressive twin: the same network with one argument changed, its exact likelihood, and
its sampler."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_distribution, assert_not_distribution, assert_one_line_error

from main import left_to_right
from model import GPT, GPTConfig, load_checkpoint
from train import autoregressive_loss, estimate_nll, next_token_losses


def gpt(causal, T=12, V=7, rope=True, seed=0):
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(T, V + 1, causal=causal, rope=rope, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))  # weights that make every input matter
    return model


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_model_does_not_see_what_follows(causal):
    model = gpt(causal)
    x = torch.randint(7, (2, 12))
    other = x.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 7
    same = torch.isclose(model(x), model(other), atol=1e-5).all(-1)
    assert bool(same[:, :6].all()) == causal and not same[:, 6:].any()


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("pieces", [(12,), (5,) + (1,) * 7, (1,) * 12])
def test_the_cache_changes_nothing(pieces, rope):
    model, x = gpt(True, rope=rope), torch.randint(7, (3, 12))
    cache, start, logits = model.make_cache(3, 12), 0, []
    for length in pieces:
        logits.append(model(x[:, start:start + length], cache, start))
        start += length
    torch.testing.assert_close(torch.cat(logits, dim=1), model(x))


def test_a_cache_does_not_reach_beyond_the_block():
    model = gpt(True)
    with pytest.raises(ValueError, match="longer than the model's block_size"):
        model(torch.zeros(3, 1, dtype=torch.long), model.make_cache(3, 12), 12)


class Bigrams(torch.nn.Module):
    """p(next | last) from a table of V + 1 rows; the last row follows [MASK], a window's start."""

    def __init__(self, p, T):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor(p))
        self.config = SimpleNamespace(block_size=T, mask_id=len(p) - 1, causal=True)

    def forward(self, x):
        # [MASK]'s logit is no answer
        return torch.nn.functional.pad(self.p[x].log(), (0, 1), value=50.0)


def test_exact_nll_by_hand():
    model = Bigrams([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], T=3)
    data = np.array([0, 0, 1, 1, 1, 0, 0], dtype="<u2")  # two windows; the last one is left out
    windows = [-math.log(0.2 * 0.9 * 0.1) / 3, -math.log(0.8 * 0.6 * 0.4) / 3]
    assert estimate_nll(model, data[:3])[1] == math.inf  # one window says nothing of a spread
    nll, se = estimate_nll(model, data, batch_size=1)
    assert nll == pytest.approx(sum(windows) / 2, rel=1e-5)
    deviation = abs(windows[0] - windows[1])  # over the root of 2, twice
    assert se == pytest.approx(deviation / 2, rel=1e-5)
    input_ids = torch.from_numpy(data[:6].astype(np.int64)).view(2, 3)
    loss = autoregressive_loss(model, 2, input_ids)
    assert loss.item() == pytest.approx(nll, rel=1e-5)


def test_writing_left_to_right_samples_the_chain_rule():
    model = gpt(True, T=3, V=2, seed=3)
    outcomes = torch.tensor(list(itertools.product(range(2), repeat=3)))
    p = (-next_token_losses(model, 2, outcomes).sum(1)).exp().detach()
    assert p.sum().item() == pytest.approx(1, rel=1e-5)

    def counts(x, **kwargs):
        *_, x = left_to_right(model, x, 2, generator=torch.Generator().manual_seed(0), **kwargs)
        return torch.bincount((x * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    free = counts(torch.full((8000, 3), 2))
    assert_distribution(free, p)
    assert_not_distribution(free, torch.full((8,), 1 / 8))
    after_1 = p * (outcomes[:, 0] == 1)
    prompt = torch.tensor([[1, 2, 2]]).expand(8000, 3)
    assert_distribution(counts(prompt), after_1 / after_1.sum())
    greedy = counts(prompt, temperature=0.0)
    assert greedy.max() == 8000


def test_writing_left_to_right_shows_every_step():
    model = gpt(True)
    x = torch.full((2, 12), 7)
    x[:, :4] = 1
    states = [x, *left_to_right(model, x, 7, generator=torch.Generator().manual_seed(0))]
    for step, (before, after) in enumerate(itertools.pairwise(states), 4):
        assert (after[:, :step + 1] < 7).all() and (after[:, step + 1:] == 7).all()
        assert torch.equal(before[:, :step], after[:, :step])
    assert len(states) == 9


def test_train_and_write(train, sample, tmp_path):
    X = tmp_path / "twin.pt"
    result = train("--causal", "--max_iters=60", "--eval_interval=30", f"--save_filename={X}")
    assert result.code == 0 and "val NLL" in result.out and "NELBO" not in result.out, result
    model, chars, info = load_checkpoint(X)
    assert model.config.causal and info["nelbo"]["val"] < math.log(len(chars))
    evaluated = train("--eval_only", f"--init_from={X}")
    assert evaluated.code == 0 and "val NLL" in evaluated.out
    flags = (f"--path={X}", "--prompt=the ", "--num_samples=2", "--temperature=0.5")
    page = sample(*flags)
    first, second = page.out.split("\f")
    assert page.code == 0 and "[12 steps, 24 characters" in page.err
    for written in (first, second):
        assert len(written) == 17 and written.startswith("the ") and written.endswith("\n")
    assert sample(*flags).out == page.out
    without_the_flag = sample(*flags[:3]).out
    assert without_the_flag == sample(*flags[:3], "--temperature=0.8").out != page.out


@pytest.mark.parametrize("flag", ["--steps=4", "--remasking=random", "--block_length=4",
                                  "--cfg_scale=1", "--revise=0.3", "--infill=the _"])
def test_a_flag_that_only_diffusion_has_is_refused(train, sample, tmp_path, flag):
    X = tmp_path / "twin.pt"
    assert train("--causal", "--max_iters=1", f"--save_filename={X}").code == 0
    assert_one_line_error(sample(f"--path={X}", flag), flag.split("=")[0], "causal")


def test_a_twin_becomes_a_mask_predictor(train, tmp_path):
    """--init_from takes the weights; the causal mask and QK-norm have none and may be chosen."""
    X, Y = tmp_path / "twin.pt", tmp_path / "y.pt"
    assert train("--causal", "--max_iters=1", f"--save_filename={X}").code == 0
    flags = ("--max_iters=1", "--learning_rate=0", "--muon_lr=0", f"--save_filename={Y}")
    for new in (("--causal=False",), ("--causal=False", "--qk_norm=False")):
        assert train(f"--init_from={X}", *new, *flags).code == 0
        (twin, _, _), (model, _, _) = load_checkpoint(X), load_checkpoint(Y)
        assert not model.config.causal and model.config.qk_norm == (len(new) == 1)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters()))
    assert train(f"--init_from={X}", *flags).code == 0 and load_checkpoint(Y)[0].config.causal
    assert_one_line_error(train("--eval_only", f"--init_from={X}", "--causal=False"), "--causal")
