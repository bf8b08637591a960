import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Table, assert_one_line_error, chi_square

from main import REMASKING, frame, save_replay, unmask, write_pages
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


@pytest.mark.parametrize("remasking", ["random", "dilated"])  # the order must not look at the text
def test_one_token_a_step_samples_the_joint_distribution(remasking):
    table = Table()
    x = torch.full((20_000, 3), M)
    got = counts(table, last(unmask(table, x, M, steps=3, temperature=1.0, remasking=remasking, generator=seeded())))
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


@pytest.mark.parametrize("remasking", REMASKING)
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


def test_random_order_is_random():
    """Which of 4 places a row writes first: each as often as the others, and not one after the other."""
    first, second, *_ = unmask(uniform_model, torch.full((8000, 4), 5), 5, 4, generator=seeded())
    i, j = (first != 5).int().argmax(1), ((second != 5) & (first == 5)).int().argmax(1)
    pairs = torch.bincount(4 * i + j, minlength=16).view(4, 4)
    assert (pairs.diagonal() == 0).all()
    assert chi_square(pairs[~torch.eye(4, dtype=torch.bool)].double(), torch.full((12,), 1 / 12)) < 31.3  # 11 degrees, p = 0.001


@pytest.mark.parametrize("remasking, apart", [("dilated", True), ("random", False)])
def test_dilated_writes_far_apart(remasking, apart):
    """8 of 256 places a step: multiples of the golden ratio that fall into 1/32 of the circle are 21 apart or more, since it takes
    the Fibonacci number 21 for one to come that close to where it was. Counts that round leave a little less than that."""
    x, least = torch.full((5, 256), 5), 256
    for state in unmask(uniform_model, x, 5, 32, remasking=remasking, generator=seeded()):
        for row in (state != x):
            least = min(least, int(row.nonzero().flatten().diff().min()))
        x = state
    assert (least >= 13) == apart


def test_second_thoughts_come_after_the_draft_and_become_fewer():
    """The predictor answers with the number of the pass, so that what a pass writes can be told from what stood there."""
    passes = itertools.count()

    def model(x):
        seen.append((x == 20).sum(1))
        return torch.nn.functional.one_hot(torch.full(x.shape, next(passes)), 21) * 50.0
    seen, x = [], torch.full((3, 40), 20)
    x[:, ::4], x[2, :20] = 0, 0                                                      # 30, 30 and 15 masks
    given = x != 20
    states = list(unmask(model, x, 20, 20, remask=0.4, generator=seeded()))
    assert len(states) == len(seen) == 20 and all((state[given] == 0).all() for state in states)
    assert [int(n[0]) for n in seen[:10]] == list(range(30, 0, -3)) and all((state < 20).all() for state in states[9:])
    assert [int(n[0]) for n in seen[10:]] == [12, 11, 10, 9, 8, 6, 5, 4, 3, 2]         # 0.4 * 30 * (1, 0.9, ... 0.1), rounded up
    assert [int(n[2]) for n in seen[10:]] == [6, 6, 5, 5, 4, 3, 3, 2, 2, 1]
    for step, state in enumerate(states[10:], 10):
        assert ((state == step).sum(1) == seen[step]).all()                            # what was masked again is written anew


def test_second_thoughts_keep_with_odds_of_p():
    """Of three places, written with p = 1/2, 1/2 and 1 (but for 1e-9), one is masked again. The order in which they are kept is
    drawn with odds of p, so place 2 is the last one with probability 2 * (1/2 / 2) * (1/2 / 1.5) = 1/6."""
    logits, masked = torch.full((3, 3), -20.0), []
    logits[:, 0], logits[:2, 1] = 0, 0

    def model(x):
        masked.append(x == 2)
        return logits.expand(*x.shape, 3)
    last(unmask(model, torch.full((8000, 3), 2), 2, 2, remask=0.1, generator=seeded()))
    assert masked[0].all() and (masked[1].sum(1) == 1).all()
    assert chi_square(masked[1].sum(0).double(), torch.tensor([5 / 12, 5 / 12, 1 / 6])) < 13.8  # 2 degrees of freedom


def test_what_counts_is_how_sure_it_was_when_written():
    """One of two places is written with p = 1/2; after that the model is sure of both. The first is masked again 2 times in 3."""
    seen = []

    def model(x):
        seen.append(x)
        return torch.tensor([0.0, 0.0 if len(seen) == 1 else -20.0, 0.0]).expand(*x.shape, 3)
    last(unmask(model, torch.full((8000, 2), 2), 2, 4, remask=0.1, generator=seeded()))
    first, again = seen[1] != 2, seen[2] == 2
    assert (first.sum(1) == 1).all() and (again.sum(1) == 1).all()
    same = (first == again).all(1).sum().double()
    assert chi_square(torch.stack([same, 8000 - same]), torch.tensor([2 / 3, 1 / 3])) < 10.8  # 1 degree of freedom


def test_second_thoughts_repair():
    """The table's characters depend on each other, so one pass for all of them is far from its distribution; second thoughts
    about one random place at a time, at temperature 1, lead back to it (Gibbs sampling)."""
    table = Table(seed=1)
    x = torch.full((4000, 3), M)
    draft = counts(table, last(unmask(table, x, M, steps=1, generator=seeded())))
    mended = counts(table, last(unmask(table, x, M, steps=24, remask=1e-9, generator=seeded())))
    distance = [chi_square(c, table.joint.detach()) for c in (draft, mended)]
    assert distance[1] < distance[0] / 3, distance


def test_a_list_of_generators_makes_rows_independent():
    table = Table(T=6, V=2)
    runs = [last(unmask(table, torch.full((n, 6), 2), 2, 4, remask=0.3, remasking=remasking,
                        generator=[seeded(i) for i in range(n)]))
            for remasking in ("dilated", "random") for n in (10, 20)]
    assert torch.equal(runs[0], runs[1][:10]) and torch.equal(runs[2], runs[3][:10])
    assert len(set(map(tuple, runs[1].tolist()))) > 5
    with pytest.raises(ValueError, match="2 generators"):
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


def test_minus_infinity_is_log_0_but_not_for_all():
    logits = torch.tensor([0.0, -torch.inf, 0.0, 5.0])
    for kwargs in (dict(), dict(cfg_scale=1.0), dict(temperature=0), dict(remask=0.5, remasking="low_confidence")):
        x = last(unmask(lambda x: logits.expand(*x.shape, 4), torch.full((50, 4), 3), 3, 4, generator=seeded(), **kwargs))
        assert ((x == 0) | (x == 2)).all()
    with pytest.raises(ValueError, match="no distribution"):
        next(unmask(lambda x: torch.full((*x.shape, 4), -torch.inf), torch.full((1, 4), 3), 3, 4))


@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("remask", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_grid(remasking, block_length, cfg_scale, remask, temperature):
    """All flags together, on pages with no mask given away, a prompt, holes, and one hole: see what every run must do."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=12, vocab_size=7, n_layer=1, n_head=1, n_embd=8)).eval()
    prompt, holes, one = torch.full((12,), 6), torch.arange(12) % 6, torch.arange(12) % 6
    prompt[:4], holes[[0, 3, 4, 8, 11]], one[7] = 1, 6, 6
    for page, batch, steps in itertools.product((torch.full((12,), 6), prompt, holes, one), (1, 3), (1, 4, 30)):
        x = page.repeat(batch, 1)
        given = x != 6
        runs = [list(unmask(model, x, 6, steps, temperature, remasking, block_length, cfg_scale, remask, seeded(seed)))
                for seed in (0, 0)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        assert 1 <= len(runs[0]) <= steps and (runs[0][-1] < 6).all() and (runs[0][-1] >= 0).all()
        assert all(torch.equal(state[given], x[given]) for state in runs[0])
        if not remask:
            assert len(runs[0]) == min(steps, int((~given[0]).sum()))


def test_same_seed_same_text():
    table = Table(T=4, V=3)
    x = torch.full((5, 4), 3)
    runs = [last(unmask(table, x, 3, 2, generator=seeded(s))) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=2, temperature=-1), dict(steps=2, temperature=float("nan")),
                                 dict(steps=2, temperature=float("inf")), dict(steps=2, cfg_scale=-1.0),
                                 dict(steps=2, block_length=0), dict(steps=2, remasking="best"),
                                 dict(steps=2, remask=-0.1), dict(steps=2, remask=1.1), dict(steps=2, remask=float("nan"))])
def test_values_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="must be"):
        next(unmask(uniform_model, torch.full((1, 4), 5), 5, **bad))


# -----------------------------------------------------------------------------
# pages longer than the model's block


def test_windows_slide_with_half_a_block_of_context():
    seen = []

    def write(window, steps):
        seen.append((window.tolist(), steps))
        yield window.where(window != 9, len(seen))
    *_, x = write_pages(write, torch.tensor([[0] + [9] * 21]), 9, block_size=8, steps=21)
    assert x.tolist() == [[0] + [1] * 7 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 2]
    assert [steps for _, steps in seen] == [7, 4, 4, 4, 2]
    assert all(len(window[0]) == 8 for window, _ in seen)
    assert seen[1] == ([[1] * 4 + [9] * 4], 4) and seen[4] == ([[3] * 2 + [4] * 4 + [9] * 2], 2)  # the last one ends with the page


def test_a_long_text_with_holes():
    x = torch.arange(300).repeat(2, 1) % 5
    holes = torch.tensor([0, 1, 2, 50, 60, 61, 62, 63, 64, 65, 66, 67, 68, 200, 299])
    x[:, holes] = 5
    given = x != 5

    def write(window, steps):
        assert window.shape[1] == 16 and (window == 5).any()
        return unmask(uniform_model, window, 5, steps, generator=seeded())
    states = list(write_pages(write, x, 5, 16, 15))
    assert (states[-1] < 5).all() and all(torch.equal(state[given], x[given]) for state in states) and len(states) == 15


@pytest.mark.parametrize("steps, passes", [(1, 12), (7, 12), (24, 24), (1000, 1000)])
def test_the_windows_share_the_steps(steps, passes):
    shares = []

    def write(window, n):
        shares.append(n)
        yield window.where(window != 5, 0)
    last(write_pages(write, torch.full((1, 100), 5), 5, 16, steps))
    assert len(shares) == 12 and min(shares) >= 1 and sum(shares) == passes


def test_a_page_that_fits_is_one_window():
    def write(window, steps):
        return unmask(uniform_model, window, 5, steps, generator=seeded())
    x = torch.full((2, 10), 5)
    assert torch.equal(torch.stack(list(write_pages(write, x, 5, 16, 4))), torch.stack(list(write(x, 4))))
    assert list(write_pages(write, torch.zeros(2, 10).long(), 5, 16, 4)) == []


# -----------------------------------------------------------------------------
# something to watch


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def test_a_frame_of_the_animation():
    chars = "ab\n\x1b"
    assert plain(frame([0, 4, 2, 1, 3], [4, 4, 4, 1, 3], 4, chars, 80, 24)) == "a░\r\nb·"  # no control character gets through
    assert "\x1b[30;43ma\x1b[0ma" in frame([0, 0], [4, 0], 4, chars, 80, 24)               # the fresh one is highlighted
    assert plain(frame([0] * 7, [0] * 7, 4, chars, 3, 24)) == "aaa\r\naaa\r\na"
    tall = [0, 2] * 50 + [4] + [2, 0] * 50
    assert "░" in frame(tall, tall, 4, chars, 80, 10) and "░" in frame(tall, tall, 4, chars, 80, 1)
    full = [0, 2] * 50 + [1]
    assert plain(frame(full, full, 4, chars, 80, 10)) == "a\r\n" * 9 + "b"


def replay(html):
    """What the page's own script shows at the end: -> (pages, number of steps)."""
    run = json.loads(re.search(r'<script id="run" type="application/json">(.*?)</script>', html, re.DOTALL).group(1))
    pages = [list(page) for page in run["start"]]
    for changes in run["steps"]:
        for page, at, char in changes:
            pages[page][at] = char
    return ["".join(page) for page in pages], len(run["steps"])


def test_a_replay_is_one_safe_page(tmp_path):
    text = '</script>&\u2028"\\{{RUN}}'
    chars = sorted(set(text))
    start, end = torch.full((1, len(text)), 99), torch.tensor([[chars.index(c) for c in text]])
    save_replay(tmp_path / "r.html", [start, end], 99, chars)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count("</script>") == 2 and replay(html) == ([text], 1)
    assert "<" not in html[html.index('"application/json">') + 19:].split("</script>")[0]
    assert not re.search(r"https?://|src=|<link|@import", html)  # no external resource
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


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
                    "--cfg_scale=0.5", "--temperature=0", "--prompt=a", "--remask=0", "--dtype=float32")
    assert result.code == 0 and len(result.out) == 14 and "3 forward passes, 12 characters" in result.err
    assert sample(f"--path={checkpoint}", "--gen_length=2", "--steps=9").err.startswith("[9 forward passes, 2 characters")
    assert sample(f"--path={checkpoint}", "--gen_length=2", "--steps=9", "--remask=0").err.startswith("[2 forward passes")


def test_each_sample_has_a_stream_of_its_own(sample, checkpoint):
    few, many = (sample(f"--path={checkpoint}", f"--num_samples={n}", "--dtype=float32").out.splitlines() for n in (3, 6))
    assert len(set(many)) == 6 and few == many[:3]


@pytest.mark.parametrize("how", ["text", "file", "stdin"])
def test_infill_brings_back_what_was_given(sample, tmp_path, monkeypatch, how):
    text = "_he cat sat___ the mat" + ("" if how == "text" else "\n")
    data = text.encode() if how == "stdin" else text.replace("\n", "\r\n").encode("utf-8-sig")  # a file as Windows saves it
    X = tmp_path / "newlines.pt"
    save_checkpoint(X, GPT(GPTConfig(block_size=16, vocab_size=29, n_layer=1, n_head=1, n_embd=8)), "abcdefghijklmnopqrstuvwxyz \n")
    (tmp_path / "damaged_text").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    arg = {"text": text, "file": tmp_path / "damaged_text", "stdin": "-"}[how]
    result = sample(f"--path={X}", f"--infill={arg}", "--num_samples=20")
    pages = [result.out[i:i + 23] for i in range(0, len(result.out), 23)]
    assert result.code == 0 and len(pages) == 20 and len(set(pages)) > 10, result
    for page in pages:
        assert "_" not in page and re.fullmatch(text.rstrip("\n").replace("_", "(.|\n)") + "\n", page)


def test_another_character_for_the_holes(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--infill=what is this?", "--mask_char=?")
    assert result.code == 0 and result.out.startswith("what is this") and len(result.out) == 14 and "?" not in result.out
    known = sample(f"--path={checkpoint}", "--infill=banana", "--mask_char=n", "--num_samples=5")  # a character that has an id
    assert known.code == 0 and "10 characters" in known.err and all(re.fullmatch("ba.a.a", page) for page in known.out.splitlines())


def test_longer_than_the_block(sample, checkpoint):
    result = sample(f"--path={checkpoint}", "--gen_length=100", "--prompt=hello ", "--steps=50")
    assert result.code == 0 and len(result.out) == 107 and result.out.startswith("hello "), result
    assert "50 forward passes, 100 characters" in result.err
    default = sample(f"--path={checkpoint}", "--gen_length=240")
    assert re.match(r"\[32 forward passes, 240 characters", default.err), default.err
    prompt = "the quick brown fox jumps over the lazy dog"
    assert sample(f"--path={checkpoint}", f"--prompt={prompt}").out.startswith(prompt)  # a prompt longer than the block


def test_html_replays_the_run(sample, checkpoint, tmp_path):
    path = tmp_path / "run.html"
    path.write_text("old")
    result = sample(f"--path={checkpoint}", f"--html={path}", "--num_samples=2", "--steps=7", "--gen_length=40", "--remask=0.3")
    pages, steps = replay(path.read_text(encoding="utf-8"))
    assert result.code == 0 and pages == result.out.splitlines() and f"[{steps} forward passes" in result.err


def test_animate_without_a_terminal_is_plain(sample, checkpoint):
    assert sample(f"--path={checkpoint}", "--animate").out == sample(f"--path={checkpoint}").out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
@pytest.mark.parametrize("interrupt", [False, True])
def test_animate_leaves_the_terminal_as_it_was(checkpoint, interrupt):
    ours, theirs = os.openpty()
    command = [sys.executable, ROOT / "main.py", f"--path={checkpoint}", "--animate", "--device=cpu", "--steps=40"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True)
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
    if interrupt:
        assert screen.count(b"\x1b[H") < 40 and after == b""
    else:
        assert screen.count(b"\x1b[H") == 40 and len(after.strip()) == 24


@pytest.mark.parametrize("flags, words", [
    (["--prompt=h\N{SNOWMAN}llo"], ["--prompt", "\N{SNOWMAN}"]),
    (["--gen_length=0"], ["--gen_length"]),
    (["--infill=no holes"], ["--infill", "no holes"]),
    (["--infill="], ["--infill"]),
    (["--infill=/nowhere/text"], ["--infill", "/nowhere/text"]),
    (["--infill=h\N{SNOWMAN}l_o"], ["--infill", "\N{SNOWMAN}"]),
    (["--infill=h_", "--prompt=h"], ["--infill", "--prompt"]),
    (["--infill=h_", "--gen_length=3"], ["--infill", "--gen_length"]),
    (["--infill=h_", "--mask_char="], ["--mask_char"]),
    (["--infill=h_", "--mask_char=__"], ["--mask_char"]),
    ([f"--infill={ROOT / 'assets' / 'claims.png'}"], ["claims.png", "UTF-8"]),
    (["--remask=2"], ["remask"]),
    (["--html=/nowhere/run.html"], ["--html", "/nowhere/run.html"]),
    (["--block_length=x"], ["--block_length"]),
    (["--html=/"], ["--html", ".html"]),
    (["--html="], ["--html"]),
    ([f"--html={ROOT / 'LICENSE'}"], ["LICENSE", ".html"]),
    ([f"--infill={ROOT / 'LICENSE'}", "--mask_char=#"], ["LICENSE", "no holes", "#"]),
    (["--infill=a", "--mask_char=\n"], ["no holes"]),
    (["--gen_length=1" + "0" * 20], ["memory", "--gen_length"]),
    (["--block_length=-1"], ["block_length"]),
    (["--dtype=int4"], ["--dtype=int4"]),
    (["--steps=0"], ["steps"]),
    (["--steps=few"], ["--steps", "few"]),
    (["--temperature=-0.1"], ["temperature"]),
    (["--temperature=nan"], ["temperature"]),
    (["--cfg_scale=-1"], ["cfg_scale"]),
    (["--block_length=0"], ["block_length=0"]),
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
