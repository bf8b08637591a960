"""The autoregressive twin, the same network with one argument changed: its likelihood, how it
writes, its cache, and its command line."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_distribution, assert_not_distribution, assert_one_line_error
from helpers import all_texts, count, last, save_gpt, seeded

from lib.checkpoint import load_checkpoint
from lib.twin import Cached, autoregressive_loss, estimate_nll, left_to_right, next_token_losses
from model import GPT, GPTConfig

M = 2  # [MASK], where the tokens are 0 and 1


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


def twin(T, V, seed=0, rope=True):
    """A small causal GPT with weights that make every input matter."""
    torch.manual_seed(seed)
    config = GPTConfig(T, V + 1, n_layer=2, n_head=2, n_embd=16, rope=rope, causal=True)
    model = GPT(config).eval()
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


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("pieces", [(12,), (5,) + (1,) * 7, (1,) * 12])
def test_the_cache_changes_nothing(pieces, rope):
    model, x = twin(12, 7, rope=rope), torch.randint(7, (3, 12), generator=seeded())
    with torch.no_grad():
        before = model(x)
        cached = Cached(model, 3, 12)
        logits = torch.cat([cached(part) for part in x.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, before)
        assert torch.equal(model(x), before)  # the model itself is as it was


@pytest.mark.parametrize("rope", [True, False])
def test_the_twin_does_not_write_beyond_its_block(rope):
    with pytest.raises(ValueError, match="longer than the model's block_size"):
        last(left_to_right(twin(12, 7, rope=rope), torch.full((2, 13), 7), 7))


# -----------------------------------------------------------------------------
# on the command line

def test_a_twin_is_trained_evaluated_and_writes_from_left_to_right(train, sample, tmp_path):
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
    assert page.code == 0 and "[12 steps in" in page.err
    for written in (first, second):
        assert len(written) == 17 and written.startswith("the ") and written.endswith("\n")
    assert sample(*flags).out == page.out
    without_the_flag = sample(*flags[:3]).out
    assert without_the_flag == sample(*flags[:3], "--temperature=0.8").out != page.out


@pytest.fixture
def untrained(tmp_path):
    """The checkpoint of a twin."""
    return save_gpt(tmp_path / "twin.pt", "abc", 16, causal=True)


@pytest.mark.parametrize("flag", ["--steps=4", "--remasking=random", "--block_length=4",
                                  "--cfg_scale=1", "--revise=0.3", "--threshold=0.9",
                                  "--infill=a_c"])
def test_a_flag_that_only_diffusion_has_is_refused(sample, untrained, flag):
    assert sample(f"--path={untrained}").code == 0
    assert_one_line_error(sample(f"--path={untrained}", flag), flag.split("=")[0], "causal")


@pytest.mark.parametrize("flag", ["--tries=2", "--temperature=-1", "--temperature=nan",
                                  "--temperature=inf"])
def test_a_flag_that_makes_no_sense_is_refused(sample, untrained, flag):
    assert_one_line_error(sample(f"--path={untrained}", flag), flag.split("=")[0])


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
