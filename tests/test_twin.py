"""The autoregressive twin: the same network with one argument changed, its exact likelihood, and its sampler."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line_error, chi_square

from main import write_left_to_right
from model import GPT, GPTConfig, load_checkpoint
from train import autoregressive_loss, estimate_nll, next_token_losses


def gpt(causal, T=12, V=7, rope=True, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(T, V + 1, n_layer=2, n_head=2, n_embd=16, causal=causal, rope=rope)).eval()
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
@pytest.mark.parametrize("pieces", [(12,), (5, 1, 1, 5), (1,) * 12])
def test_the_cache_changes_nothing_left_to_right(pieces, rope):
    model, x = gpt(True, rope=rope), torch.randint(7, (3, 12))
    cache, start, logits = model.make_cache(3, 12), 0, []
    for length in pieces:
        logits.append(model(x[:, start:start + length], cache, start))
        start += length
    torch.testing.assert_close(torch.cat(logits, dim=1), model(x))


@pytest.mark.parametrize("rope", [True, False])
def test_the_cache_of_a_mask_predictor_holds_the_whole_page(rope):
    model, x = gpt(False, rope=rope), torch.randint(8, (3, 12))
    cache = model.make_cache(3, 12)
    whole = model(x, cache)
    torch.testing.assert_close(whole, model(x))
    torch.testing.assert_close(model(x[:, 4:9], cache, 4), whole[:, 4:9])  # the rest of the page is seen through the cache
    kept = cache.clone()
    model((x[:, 4:9] + 1) % 8, cache, 4)
    changed = (cache != kept).flatten(0, 3).any(0).any(-1)
    assert changed.tolist() == [4 <= i < 9 for i in range(12)]
    with pytest.raises(ValueError, match="longer than the model's block_size"):
        model(x[:, :3], cache, 10)


class Bigrams(torch.nn.Module):
    """p(next | last) from a table of V + 1 rows; the last row follows [MASK], the start of a window."""

    def __init__(self, p, T):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor(p))
        self.config = SimpleNamespace(block_size=T, mask_id=len(p) - 1, causal=True)

    def forward(self, x):
        return torch.nn.functional.pad(self.p[x].log(), (0, 1), value=50.0)  # [MASK]'s logit is no answer


def test_exact_nll_by_hand():
    model = Bigrams([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], T=3)
    data = torch.tensor([0, 0, 1, 1, 1, 0, 0], dtype=torch.int16)  # two windows; the last character is left out
    windows = [-math.log(0.2 * 0.9 * 0.1) / 3, -math.log(0.8 * 0.6 * 0.4) / 3]
    nll, se = estimate_nll(model, data, batch_size=1)
    assert nll == pytest.approx(sum(windows) / 2, rel=1e-5)
    assert se == pytest.approx(abs(windows[0] - windows[1]) / 2, rel=1e-5)  # the deviation over the root of 2
    assert autoregressive_loss(model, data[:6].long().view(2, 3), 2).item() == pytest.approx(nll, rel=1e-5)


def test_writing_left_to_right_samples_the_chain_rule():
    model = gpt(True, T=3, V=2, seed=3)
    outcomes = torch.tensor(list(itertools.product(range(2), repeat=3)))
    p = (-next_token_losses(model, outcomes, 2).sum(1)).exp().detach()
    assert p.sum().item() == pytest.approx(1, rel=1e-5)
    *_, x = write_left_to_right(model, torch.full((8000, 3), 2), 2, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount((x * torch.tensor([4, 2, 1])).sum(1), minlength=8)
    assert chi_square(counts, p) < 24.3  # 7 degrees of freedom, one in a thousand
    prompt = torch.tensor([[1, 2, 2]]).expand(8000, 3)
    *_, x = write_left_to_right(model, prompt, 2, generator=torch.Generator().manual_seed(0))
    assert (x[:, 0] == 1).all()
    counts = torch.bincount((x * torch.tensor([4, 2, 1])).sum(1), minlength=8)[4:]
    assert chi_square(counts, p[4:] / p[4:].sum()) < 16.3  # 3 degrees of freedom


def test_train_and_write(train, sample, tmp_path):
    X = tmp_path / "twin.pt"
    result = train("--causal", "--max_iters=60", "--eval_interval=30", f"--save_filename={X}")
    assert result.code == 0 and "val NLL" in result.out and "NELBO" not in result.out, result
    model, chars, info = load_checkpoint(X)
    assert model.config.causal and info["nelbo"]["val"] < math.log(len(chars))
    evaluated = train("--eval_only", f"--init_from={X}")
    assert evaluated.code == 0 and "val   NLL" in evaluated.out
    page = sample(f"--path={X}", "--prompt=the ", "--num_samples=2", "--temperature=0.5")
    assert page.code == 0 and all(len(p) == 16 and p.startswith("the ") for p in [page.out[:16], page.out[17:33]]), page
    assert sample(f"--path={X}", "--prompt=the ", "--num_samples=2", "--temperature=0.5").out == page.out


@pytest.mark.parametrize("flag", ["--steps=4", "--remasking=random", "--block_length=4", "--cfg_scale=1"])
def test_a_flag_that_only_diffusion_has_is_refused(train, sample, tmp_path, flag):
    X = tmp_path / "twin.pt"
    assert train("--causal", "--max_iters=1", f"--save_filename={X}").code == 0
    assert_one_line_error(sample(f"--path={X}", flag), flag.split("=")[0], "causal")


def test_a_twin_is_not_trained_on_as_a_mask_predictor(train, tmp_path):
    X = tmp_path / "twin.pt"
    assert train("--causal", "--max_iters=1", f"--save_filename={X}").code == 0
    assert_one_line_error(train(f"--init_from={X}", "--causal=False", f"--save_filename={tmp_path / 'y'}"), "--causal")
