import itertools
import random
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
SHAKESPEARE = ROOT.parent / "shared" / "tinyshakespeare" / "input.txt"
TINY = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--device=cpu", "--dtype=float32",
        "--eval_passes=2")


@pytest.fixture(scope="session")
def text():
    """Real text where it is at hand, otherwise words in random order."""
    if SHAKESPEARE.exists():
        return SHAKESPEARE.read_text()[:20_000]
    words = "the king and queen of this fair land shall speak to thee\nno more, my lord: good night.\n".split(" ")
    return " ".join(random.Random(0).choices(words, k=4_000))


@pytest.fixture(scope="session")
def data_dir(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text(text, encoding="utf-8")
    prepare.prepare(folder / "input.txt", folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *flags) -> what its main() printed and its exit status, in this process."""
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
    """run(script, *flags, cwd=...) -> a finished process."""
    def run(script, *flags, cwd=None):
        return subprocess.run([sys.executable, str(script), *map(str, flags)], cwd=cwd, capture_output=True, text=True)
    return run


def assert_one_line_error(result, *words):
    """Bad input: one line on stderr, exit status 2, no traceback."""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert result.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result
    for word in words:
        assert word in lines[0], lines[0]


class Table(torch.nn.Module):
    """A mask predictor in which every probability is known: p(token at i | the tokens that are not masked), from a
    joint distribution over all sequences of length T with V characters. Its [MASK] logit is the largest."""

    def __init__(self, T=3, V=2, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.config = SimpleNamespace(block_size=T, vocab_size=V + 1, mask_id=V)
        self.outcomes = torch.tensor(list(itertools.product(range(V), repeat=T)))                     # (V**T, T)
        self.joint = torch.nn.Parameter(torch.rand(V**T, generator=g, dtype=torch.float64) ** 2)
        self.joint.data /= self.joint.data.sum()

    def forward(self, x):
        fits = ((x[:, None] == self.outcomes) | (x[:, None] == self.config.mask_id)).all(-1).double()  # (B, V**T)
        one_hot = torch.nn.functional.one_hot(self.outcomes, self.config.vocab_size).double()          # (V**T, T, V+1)
        p = torch.einsum("bo,o,otv->btv", fits, self.joint, one_hot)
        p = p / p.sum(-1, keepdim=True)
        p[..., self.config.mask_id] = 1e6
        return p.log()

    def index(self, x):
        """(B, T) sequences -> (B,) their places among the outcomes."""
        return (x[:, None] == self.outcomes).all(-1).int().argmax(-1)


def chi_square(observed, expected):
    """The statistic of counts (K,) against probabilities (K,)."""
    expected = expected * observed.sum()
    return float(((observed - expected) ** 2 / expected).sum())
