"""Small models and small tools that several test files share."""

import importlib.util
import json
import re

import torch

import main as main_script
from lib.checkpoint import save_checkpoint
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
    passes = sum(any(char is not None for *_, char in changes) for changes in run["changes"])
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
