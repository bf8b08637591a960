"""What all test files share: data, ways to run the commands, and exact probabilities."""

import hashlib
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import prepare
import pytest
import torch

import main as main_script
import train as train_script

torch.set_num_threads(1)  # the models here are too small for more to pay
ROOT = Path(__file__).resolve().parent.parent
SHAKESPEARE = ROOT / "data" / "shakespeare_char" / "input.txt"
TINY = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--device=cpu", "--dtype=float32", "--eval_passes=2")


def real_text():
    """Return Tiny Shakespeare, or None where prepare.py has not downloaded it."""
    data = SHAKESPEARE.read_bytes() if SHAKESPEARE.exists() else b""
    return data.decode() if hashlib.sha256(data).hexdigest() == prepare.SHA256 else None


@pytest.fixture(scope="session")
def text():
    """Return real text where it is at hand, otherwise speeches of words in random order."""
    words = "the king and queen of this fair land shall speak to thee, no more: good night.".split()
    rng = random.Random(0)
    speeches = (f"{rng.choice(words).upper()}:\n{' '.join(rng.choices(words, k=9))}\nno more."
                for _ in range(400))
    return (real_text() or "\n\n".join(speeches))[:20_000]


@pytest.fixture(scope="session")
def data_dir(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text(text, encoding="utf-8")
    prepare.prepare(folder / "input.txt", folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *flags) runs a script's main() in this process, and returns what it printed
    (out, err) and its exit status (code)."""
    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        code = 0
        try:
            module.main()
        except SystemExit as e:
            code = e.code or 0
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return call


@pytest.fixture
def train(call, data_dir):
    return lambda *flags: call(train_script, *TINY, f"--data_dir={data_dir}", *flags)


@pytest.fixture
def sample(call):
    return lambda *flags: call(main_script, "--device=cpu", *flags)


@pytest.fixture
def run():
    """run(script, *flags, cwd=...) returns a finished process."""
    def run(script, *flags, cwd=None):
        return subprocess.run([sys.executable, str(script), *map(str, flags)], cwd=cwd,
                              capture_output=True, text=True)
    return run


def assert_one_line_error(result, *words):
    """Bad input gives one line on stderr, which has these words, exit status 2 and no traceback."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result
    for word in words:
        assert word in lines[0], lines[0]


def read_help(text):
    """Return the output of --help as {group: {flag: its help}}."""
    groups, flag = {}, None
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            groups[line[:-1]], flag = (group := {}), None
        elif groups and (start := re.match(r"  (?:-\w, )?--(\w+)(.*)", line)):
            flag = start[1]
            group[flag] = start[2]
        elif groups and flag:
            group[flag] += " " + line.strip()
    return groups


# -----------------------------------------------------------------------------
# distributions

def pearson(counts, p):
    """Return Pearson's statistic of counts (K,) against probabilities p (K,)."""
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def largest_by_chance(degrees):
    """Return what Pearson's statistic exceeds about once in 1,000 times if counts are samples of p:
    Wilson and Hilferty's approximation of the quantile of chi-square."""
    z = 3.0902  # the standard normal's
    return degrees * (1 - 2 / (9 * degrees) + z * (2 / (9 * degrees)) ** 0.5) ** 3


def compare(counts, p):
    """Return Pearson's statistic, what it exceeds once in 1,000 times by chance, and whether
    something was counted that has probability 0."""
    counts, p = torch.as_tensor(counts).double(), torch.as_tensor(p).detach().double()
    assert counts.shape == p.shape and abs(p.sum() - 1) < 1e-5
    possible = p > 0
    threshold = largest_by_chance(int(possible.sum()) - 1)
    return (pearson(counts[possible], p[possible]), threshold, bool(counts[~possible].sum() > 0))


def assert_distribution(counts, p):
    """counts (K,) are what samples of p (K,) look like. A false alarm in 1,000 seeds."""
    statistic, threshold, impossible = compare(counts, p)
    assert not impossible and statistic < threshold, (statistic, threshold, impossible)


def assert_not_distribution(counts, p):
    """The test can tell: counts are not what samples of p look like, by far."""
    statistic, threshold, impossible = compare(counts, p)
    assert impossible or statistic > 4 * threshold, (statistic, threshold)


class Table(torch.nn.Module):
    """A mask predictor in which every probability is known: p(token at i | the tokens that are not
    masked), from a joint distribution over all sequences of length T with V characters. Its [MASK]
    logit is the largest."""

    def __init__(self, T=3, V=2, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(block_size=T, vocab_size=V + 1, mask_id=V, causal=False)
        self.outcomes = torch.tensor(list(itertools.product(range(V), repeat=T)))  # (V**T, T)
        joint = torch.rand(V**T, generator=g, dtype=torch.float64) ** 2
        self.joint = torch.nn.Parameter(joint / joint.sum())

    def forward(self, x):
        fits = (x[:, None] == self.outcomes) | (x[:, None] == self.config.mask_id)
        fits = fits.all(-1).double()                                               # (B, V**T)
        one_hot = torch.nn.functional.one_hot(self.outcomes, self.config.vocab_size).double()
        p = torch.einsum("bo,o,otv->btv", fits, self.joint, one_hot)               # (B, T, V+1)
        p = p / p.sum(-1, keepdim=True)
        p[..., self.config.mask_id] = 1e6
        return p.log()
