"""What several test files share and import by name: small models, and what training runs leave
behind. (conftest.py has the fixtures, and all that is asserted of them.)"""

import csv
import importlib.util
import itertools
import json
import math
import re
import signal

import numpy as np
import torch

import main as main_script
import train as train_script
from lib.checkpoint import load_checkpoint, save_checkpoint
from model import GPT, GPTConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz "
UNIFORM_MASK = 5  # [MASK] of uniform_model


def uniform_model(x):
    """A mask predictor of the tokens 0 to 4, all equally likely."""
    return torch.zeros(*x.shape, UNIFORM_MASK + 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def save_gpt(path, vocab, block_size, causal=False, **info):
    """Write the checkpoint of an untrained GPT with this vocabulary, and return its path."""
    torch.manual_seed(0)
    config = GPTConfig(block_size, len(vocab) + 1, n_layer=1, n_head=1, n_embd=8, causal=causal)
    save_checkpoint(path, GPT(config), list(vocab), **info)
    return path


def plain(text):
    """The text without the terminal's escape sequences."""
    return re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", text)


def replay(html):
    """What the script of a replay page shows at the end: (pages, number of passes, the run)."""
    data = re.search(r'<script id="run" type="application/json">(.*?)</script>', html, re.DOTALL)
    run = json.loads(data.group(1))
    pages = [list(page) for page in run["start"]]
    for changes in run["changes"]:
        for page, at, char in changes:
            pages[page][at] = char
    passes = sum(all(char is not None for *_, char in changes) for changes in run["changes"])
    return ["".join(page) for page in pages], passes, run


class Rules(torch.nn.Module):
    """A mask predictor that knows the rules of n x n puzzles: all digits that the row, column and
    box of a cell do not hold yet are about equally likely. So the cell with one such digit is the
    surest. It looks no further ahead, so it may guess wrong. calls counts its forward passes."""

    def __init__(self, n):
        super().__init__()
        self.n, self.calls = n, 0
        self.config = GPTConfig(n * (n + 1) + 1, n + 2, n_layer=1, n_head=1, n_embd=8)
        self.wte = torch.nn.Embedding(1, 1)
        cell = torch.arange(n * n)
        row, column, side = cell // n, cell % n, int(n**0.5)
        box = row // side * side + column // side
        self.places = row * (n + 1) + column
        # so that no two guesses are exactly equal, whose order would depend on the machine
        self.tastes = 0.01 * torch.sin(7.0 * torch.arange(n * n * n)).view(n * n, n)
        same = [unit[:, None] == unit for unit in (row, column, box)]
        self.peers = (same[0] | same[1] | same[2]) & ~torch.eye(n * n, dtype=torch.bool)

    def forward(self, idx):
        self.calls += 1
        cells = torch.nn.functional.one_hot(idx[:, self.places], self.n + 2)[..., 1:-1].float()
        taken = self.peers.float() @ cells > 0                            # (B, n * n, n)
        logits = torch.full((*idx.shape, self.n + 2), -30.0)
        logits[..., 0] = 0.0                                              # line ends
        logits[:, self.places, 0] = -60.0
        logits[:, self.places, 1:-1] = torch.where(taken, -30.0, self.tastes)
        return logits


def use_rules(monkeypatch, n):
    """Make main.py load the model that knows the rules of n x n puzzles, and return it."""
    rules, vocab = Rules(n), list("\n123456789"[:n + 1])
    monkeypatch.setattr(main_script, "load_checkpoint",
                        lambda path, device: (rules, vocab, {"record": n * (n + 1) + 1}))
    return rules


def solves(grid, puzzle):
    """Whether every row, column and box of a grid of n lines holds the n digits, and all givens of
    the puzzle (n lines, with _ for empty cells) are kept."""
    rows = grid.split()
    n, side = len(rows), int(len(rows)**0.5)
    if any(len(row) != n for row in rows):
        return False
    boxes = ["".join(rows[r + i][c:c + side] for i in range(side))
             for r in range(0, n, side) for c in range(0, n, side)]
    units = [*rows, *map("".join, zip(*rows)), *boxes]
    return (all(sorted(unit) == list("123456789"[:n]) for unit in units)
            and all(given in ("_", digit) for given, digit in zip("".join(puzzle.split()),
                                                                  "".join(rows))))


def load_script(path):
    """Import a script of data/ under a name of its own: they are all called prepare.py."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -----------------------------------------------------------------------------
# training runs

# twelve iterations with three evaluations
RUN = ("--max_iters=12", "--eval_interval=4", "--eval_tokens=320", "--warmup_iters=5",
       "--dropout=0.1", "--gradient_accumulation_steps=2", "--log_interval=3")
PROGRESS = re.compile(r"iteration ([\d,]+) of ([\d,]+): loss (\d+\.\d\d), ([\d,]+) characters/s, "
                      r"(\d+\.\d) minutes left")


def assert_same_weights(a, b):
    a, b = (load_checkpoint(path)[0].state_dict() for path in (a, b))
    assert all(torch.equal(a[name], b[name]) for name in b)


def curve(path):
    """Return the rows of the loss curve of the checkpoint at path, without the time they took."""
    with open(f"{path}.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if k != "minutes"}
                for row in csv.DictReader(f)]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def errors_of(result):
    """Return the lines on stderr that are not progress."""
    return [line for line in result.err.splitlines() if not PROGRESS.fullmatch(line)]


def at_iteration(monkeypatch, iteration, do):
    """Do something while a training iteration begins."""
    real = train_script.set_learning_rates

    def set_learning_rates(run, config):
        if run.iteration == iteration:
            do()
        real(run, config)
    monkeypatch.setattr(train_script, "set_learning_rates", set_learning_rates)


def crash():
    raise SystemExit(9)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


# -----------------------------------------------------------------------------
# the method: predictors and texts so small that everything can be enumerated

ORDERS = ("random", "dilated", "low_confidence")


class Lookup:
    """A mask predictor that looks up random logits (T, V + 1) for each of its (V + 1)**T inputs.
    [MASK]'s own logit is the largest."""

    def __init__(self, T, V, seed=0):
        self.logits = 1.5 * torch.randn((V + 1)**T, T, V + 1, generator=seeded(seed)).double()
        self.logits[..., V] = 99.0
        self.place_values = (V + 1) ** torch.arange(T).flip(0)

    def __call__(self, x):
        return self.logits[(x * self.place_values).sum(1)]


def linear(T, V, seed=1):
    """Return a mask predictor whose logits are sums of random weights, one for each token at each
    place."""
    weights = torch.randn(T, V + 1, T * (V + 1), generator=seeded(seed))
    return lambda x: weights[torch.arange(T), x].sum(1).view(len(x), T, V + 1)


def kinds_of_pages(T, V):
    """Return pages (T,): one of masks (V), one with a prompt, one with holes, and one with a single
    hole."""
    empty, prompt = torch.full((T,), V), torch.full((T,), V)
    holes, one = torch.arange(T) % V, torch.arange(T) % V
    prompt[:T // 3], holes[::3], holes[4], one[T // 2] = 1, V, V, V
    return empty, prompt, holes, one


def constant(*logits):
    """Return a predictor that says the same of every place of every input."""
    return lambda x: torch.tensor(logits).expand(*x.shape, len(logits))


def sure_by_place(*p):
    """Return a predictor of three tokens: at place i the first has probability p[i], and the others
    share the rest."""
    p = torch.tensor(p).double()[:, None]
    rest = (1 - p) / 2
    logits = torch.cat([p, rest, rest, torch.ones_like(p)], dim=1).log()
    return lambda x: logits.expand(len(x), *logits.shape)


def counting(model):
    """Return the same model, and the list of the inputs that it was called with."""
    calls = []
    return lambda x: calls.append(x) or model(x), calls


def last(states):
    *_, x = states
    return x


def places_written(states):
    """Return the places that each state (of a single row) has and the one before it has not."""
    return [(a != b)[0].nonzero().flatten().tolist() for a, b in itertools.pairwise(states)]


def all_texts(T, V):
    """Return all texts of T tokens, (V**T, T): 000, 001, 010, ..."""
    return torch.tensor(list(itertools.product(range(V), repeat=T)))


def count(x, V):
    """Return how often each of all_texts occurs among the rows of x (B, T)."""
    T = x.shape[1]
    return torch.bincount((x * V ** torch.arange(T).flip(0)).sum(1), minlength=V**T)


def assert_mean(values, exact):
    """The mean of independent values is exact, within four standard errors and to 5 %."""
    values = torch.as_tensor(values).double()
    error = float(values.std()) / len(values)**0.5
    assert abs(float(values.mean()) - exact) < 4 * error < 0.05 * exact


def enumerate_nelbo(model, windows, mask_id, p_range=None):
    """Return the NELBO per token of windows (W, L), exactly: all ways to mask, each with its
    probability. With p_range = (eps, p_max): the expected training loss. It is an integral over t
    of a polynomial, which Gauss-Legendre quadrature does exactly."""
    W, L = windows.shape
    total = 0.0
    nodes, quadrature = np.polynomial.legendre.leggauss(L + 1)
    for masked in itertools.product((False, True), repeat=L):
        n = sum(masked)
        if n == 0:
            continue
        mask = torch.tensor(masked)
        logits = model(torch.where(mask, mask_id, windows))[..., :mask_id].double()
        log_p = logits.log_softmax(-1).gather(-1, windows[..., None])[..., 0]
        cross_entropy = -log_p[:, mask].sum().item() / W
        if p_range is None:  # n is uniform on 1..L, then each choice of n places is equally likely
            weight = 1 / (L * math.comb(L, n) * n)
        else:
            p = (p_range[1] - p_range[0]) * (nodes + 1) / 2 + p_range[0]
            weight = float((quadrature / 2 * p ** (n - 1) * (1 - p) ** (L - n)).sum()) / L
        total += weight * cross_entropy
    return total
