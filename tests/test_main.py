import pytest
import torch
from conftest import ROOT, Table, assert_one_line_error, chi_square

from main import unmask
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
# exact distributions: a predictor in which every probability is known. 8 outcomes, 7 degrees of freedom, p = 0.001: 24.3


def test_one_token_a_step_samples_the_joint_distribution():
    table = Table()
    x = torch.full((20_000, 3), M)
    got = counts(table, last(unmask(table, x, M, steps=3, temperature=1.0, remasking="random", generator=seeded())))
    assert chi_square(got, table.joint.detach()) < 24.3
    assert chi_square(got, torch.full((8,), 1 / 8)) > 1000  # the test can tell


def test_one_step_samples_the_product_of_the_marginals():
    table = Table()
    got = counts(table, last(unmask(table, torch.full((20_000, 3), M), M, steps=1, generator=seeded())))
    one = torch.stack([table.joint[table.outcomes[:, i] == 1].sum() for i in range(3)]).detach()
    product = torch.where(table.outcomes == 1, one, 1 - one).prod(1)
    assert chi_square(got, product) < 24.3
    assert chi_square(got, table.joint.detach()) > 100


def test_a_hole_is_filled_from_the_conditional():
    table = Table()
    x = torch.tensor([1, M, 0]).expand(20_000, 3)
    got = counts(table, last(unmask(table, x, M, steps=5, generator=seeded())))
    p = table.joint.detach() * (table.outcomes[:, 0] == 1) * (table.outcomes[:, 2] == 0)
    fits = p > 0
    assert got[~fits].sum() == 0 and chi_square(got[fits], p[fits] / p.sum()) < 10.8  # 1 degree of freedom


def test_temperature_sharpens():
    """One token: softmax(logits / temperature), exactly."""
    logits = torch.tensor([0.0, 1.0, 2.0, 99.0])
    for temperature in (0.3, 1.0, 2.5):
        x = last(unmask(lambda x: logits.expand(*x.shape, 4), torch.full((20_000, 1), 3), 3, 1, temperature, generator=seeded()))
        got = torch.bincount(x.flatten(), minlength=4)[:3].double()
        assert chi_square(got, (logits[:3].double() / temperature).softmax(0)) < 13.8  # 2 degrees of freedom


def test_temperature_zero_is_argmax():
    table = Table()
    greedy = last(unmask(table, torch.full((50, 3), M), M, steps=1, temperature=0, generator=seeded()))
    assert (greedy == table(torch.full((1, 3), M))[0, :, :2].argmax(-1)).all()


def test_gumbel_noise_is_float64(monkeypatch):
    """A draw of 1 - 2**-40 is noise of 40 ln 2 = 27.7, exactly: enough against 0.4 more than a logit of 27.3, not of 27.4. float32
    has no number between 1 - 2**-24 and 1, so there the same draw is cut to 16.6 or becomes infinite."""
    real = torch.rand

    def rand(shape, dtype=torch.float32, generator=None):
        u = torch.full(shape, 0.5, dtype=dtype)  # noise 0.37
        u[..., 0] = torch.tensor(1 - 2.0**-40, dtype=torch.float64)
        return u
    for logit, winner in ((27.3, 0), (27.4, 1)):
        monkeypatch.setattr(torch, "rand", rand)
        x = last(unmask(lambda x, logit=logit: torch.tensor([[[0.0, logit, 0.0]]]), torch.tensor([[M]]), M, 1))
        monkeypatch.setattr(torch, "rand", real)
        assert x.item() == winner


# -----------------------------------------------------------------------------
# which tokens, and how many at a time


def uniform_model(x):
    return torch.zeros(*x.shape, 6)


@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
@pytest.mark.parametrize("block_length", [None, 1, 5, 7, 30])
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 100])
def test_every_schedule_is_even_and_complete(steps, block_length, remasking):
    x = torch.full((3, 24), 5)
    x[0, :4], x[1, 10:14], x[2, ::6] = 1, 2, 3
    before = x.clone()
    states = list(unmask(uniform_model, x, 5, steps, remasking=remasking, block_length=block_length, generator=seeded()))
    assert torch.equal(x, before) and len(states) == min(steps, 20)
    fresh = []
    for state in states:
        fresh.append(((x == 5) & (state != 5)).sum(1))
        assert torch.equal(state[x != 5], x[x != 5])  # what was given or decided stays
        left_of_masks = [(row == 5).int().argmax().item() if (row == 5).any() else 24 for row in state]
        if block_length == 1:  # strictly from left to right
            assert all((row[:n] != 5).all() for row, n in zip(state, left_of_masks, strict=True))
        x = state
    fresh = torch.stack(fresh)
    assert (x < 5).all() and (fresh.max(0).values - fresh.min(0).values <= 1).all()
    assert torch.equal(x[before != 5], before[before != 5])


def test_blocks_are_finished_in_order():
    x = torch.full((4, 12), 5)
    x[:, :2] = 0
    for step, state in enumerate(unmask(uniform_model, x, 5, steps=10, block_length=5, generator=seeded()), 1):
        first, second = (state[:, 2:7] != 5).sum(1), (state[:, 7:] != 5).sum(1)
        assert (first == min(step, 5)).all() and (second == max(0, step - 5)).all()


def test_rows_with_different_numbers_of_masks():
    x = torch.tensor([[5, 5, 5, 5], [1, 5, 2, 3], [1, 2, 3, 4]])
    states = list(unmask(uniform_model, x, 5, steps=4, generator=seeded()))
    assert len(states) == 4 and (states[-1] < 5).all() and torch.equal(states[-1][2], x[2])


def test_nothing_to_write_needs_no_pass():
    assert list(unmask(lambda x: 1 / 0, torch.tensor([[0, 1]]), 2, steps=3)) == []


def test_low_confidence_keeps_the_surest():
    sureness = torch.tensor([0.1, 3.0, 1.0, 2.0])
    logits = torch.zeros(4, 3)
    logits[:, 0] = sureness
    order = [int((a != b).int().argmax()) for a, b in zip(*(lambda s: (s[:-1], s[1:]))(
        [torch.full((1, 4), 2), *unmask(lambda x: logits[None], torch.full((1, 4), 2), 2, 4, 0, "low_confidence")]), strict=True)]
    assert order == [1, 3, 2, 0]


def test_guidance_follows_lladas_formula():
    """blind + (1 + scale) * (seeing - blind), where blind has the given tokens masked: three tokens, p known exactly."""
    seeing, blind = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])

    def model(x):
        return torch.where((x[:, :1] == 0)[..., None], seeing, blind).expand(*x.shape, 3)
    x = torch.tensor([0, 2]).expand(20_000, 2)
    got = torch.bincount(last(unmask(model, x, 2, 1, cfg_scale=0.7, generator=seeded()))[:, 1], minlength=2).double()
    assert chi_square(got, (blind + 1.7 * (seeing - blind))[:2].double().softmax(0)) < 10.8


def test_same_seed_same_text():
    table = Table(T=4, V=3)
    x = torch.full((5, 4), 3)
    runs = [last(unmask(table, x, 3, 2, generator=seeded(s))) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=2, temperature=-1), dict(steps=2, temperature=float("nan")),
                                 dict(steps=2, temperature=float("inf")), dict(steps=2, cfg_scale=-1.0),
                                 dict(steps=2, block_length=0), dict(steps=2, remasking="best")])
def test_values_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="must be"):
        next(unmask(uniform_model, torch.full((1, 4), 5), 5, **bad))


# -----------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.pt"
    model = GPT(GPTConfig(block_size=24, vocab_size=28, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(path, model, "abcdefghijklmnopqrstuvwxyz ")
    return path


def test_stdout_is_the_text_and_nothing_else(sample, checkpoint):
    result = sample(f"--path={checkpoint.with_suffix('')}", "--prompt=hello ", "--num_samples=2")
    assert result.code == 0 and len(result.out) == 2 * 25
    for page in (result.out[:25], result.out[25:]):
        assert page.startswith("hello ") and page.endswith("\n") and "\n" not in page[:-1]
    assert result.out[:25] != result.out[25:]
    assert "18 forward passes, 36 characters" in result.err and "characters/s" in result.err
    assert sample(f"--path={checkpoint}", "--prompt=hello ", "--num_samples=2").out == result.out
    assert sample(f"--path={checkpoint}", "--prompt=hello ", "--num_samples=2", "--seed=2").out != result.out


def test_flags_do_what_they_say(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--gen_length=12", "--steps=3", "--block_length=4", "--remasking=low_confidence",
                    "--cfg_scale=0.5", "--temperature=0", "--prompt=a")
    assert result.code == 0 and len(result.out) == 14 and "3 forward passes, 12 characters" in result.err


@pytest.mark.parametrize("flags, words", [
    (["--prompt=h\N{SNOWMAN}llo"], ["--prompt", "\N{SNOWMAN}"]),
    (["--prompt=" + "a" * 24], ["--prompt", "24"]),
    (["--prompt=" + "a" * 99], ["--prompt", "99", "24"]),
    (["--gen_length=25"], ["--gen_length", "24"]),
    (["--gen_length=0"], ["--gen_length"]),
    (["--steps=0"], ["steps"]),
    (["--steps=few"], ["--steps", "few"]),
    (["--temperature=-0.1"], ["temperature"]),
    (["--temperature=nan"], ["temperature"]),
    (["--cfg_scale=-1"], ["cfg_scale"]),
    (["--block_length=25"], ["--block_length=25", "gen_length=24"]),
    (["--block_length=0"], ["--block_length=0"]),
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


def test_the_shipped_model_writes_shakespeare_from_any_folder(run, tmp_path):
    """Nothing prepared; 4 pages must use many of the commonest words. Random letters would use none of the long ones."""
    result = run(ROOT / "main.py", "--num_samples=4", "--device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 4 * 257 and "Traceback" not in result.stderr
    common = set("that with this have your thou shall will what lord him not for the and you".split())
    assert len(common & set(result.stdout.lower().split())) >= 6
