"""
Make solved Sudoku grids: train.bin, val.bin and meta.json. A grid is a record of 91 characters:
nine lines of nine digits, and an empty line.

    python data/sudoku/prepare.py                      # 100,000 grids
    python train.py --dataset=sudoku --save_filename=sudoku
    python main.py --path=sudoku --infill=assets/puzzle.txt

Training needs no puzzles: the forward process masks cells of a solved grid, and what remains
visible is one. A random search finds base grids; the symmetries of the rules (digits, rows within a
band, bands, columns within a stack, stacks, transposition) make forty grids of each. Grids for
validation come from base grids of their own.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from lib.common import knob, one_line_errors, open_streams, parse_knobs
from lib.data import write_dataset

CHARS = list("\n123456789")
RECORD = 91        # characters of a grid
PER_BASE = 40      # grids made of a base grid
DIGITS = set(range(1, 10))
# what train.py takes instead of its own defaults. Masking 40 to 75 % leaves about 20 to 49 givens:
# with more of them a puzzle is easy, with fewer hardly a cell can be known.
TRAINING = dict(block_size=RECORD, n_layer=6, n_head=6, n_embd=192, rope=False, batch_size=32,
                max_iters=2700, dropout=0.0, eps=0.4, p_max=0.75)


@dataclass
class PrepareConfig:
    grids: int = knob(100_000, "grids for training; a tenth as many for validation", "grids",
                      low=10, high=10**7)
    seed: int = knob(1337, "of the grids", low=0, high=2**63 - 1)
    out_dir: str = knob("", "folder for the three files; without it, the one of this script")


def share_a_unit(i, j):
    """Whether cells i and j stand in one row, column or box."""
    (r, c), (s, d) = divmod(i, 9), divmod(j, 9)
    return r == s or c == d or (r // 3, c // 3) == (s // 3, d // 3)


PEERS = [[j for j in range(81) if j != i and share_a_unit(i, j)] for i in range(81)]


def solve(cells, rng=random, most=1):
    """Return up to most solutions, each a list of 81 digits, of cells: 81 digits, 0 where empty.
    The search fills a cell with the fewest possible digits first, and tries them in random
    order."""
    cells, solutions = list(cells), []

    def possible(i):
        return DIGITS - {cells[j] for j in PEERS[i]}

    def search():
        empty = [(len(possible(i)), i) for i in range(81) if not cells[i]]
        if not empty:
            solutions.append(list(cells))
            return len(solutions) == most
        i = min(empty)[1]
        for digit in rng.sample(sorted(possible(i)), len(possible(i))):
            cells[i] = digit
            if search():
                return True
        cells[i] = 0
        return False

    if all(digit in possible(i) for i, digit in enumerate(cells) if digit):
        search()
    return solutions


def shuffled(grid, count, rng):
    """Return count grids (count, 9, 9) that the symmetries of the rules make of grid (9, 9)."""
    def lines():  # an order of the rows that keeps bands together, or of the columns
        return (3 * rng.permutation(3)[:, None] + np.stack([rng.permutation(3) for _ in range(3)]))
    grids = []
    for _ in range(count):
        digits = np.concatenate([[0], 1 + rng.permutation(9)])
        new = digits[grid][lines().ravel()][:, lines().ravel()]
        grids.append(new.T if rng.random() < 0.5 else new)
    return np.stack(grids)


def make_grids(count, seed):
    """Return count solved grids in random order, (count, 9, 9)."""
    search, rng = random.Random(seed), np.random.default_rng(seed)
    grids = []
    for _ in tqdm(range(0, count, PER_BASE), desc="base grids", unit="grid", leave=False,
                  disable=None):
        [base] = solve([0] * 81, search)
        grids.append(shuffled(np.reshape(base, (9, 9)), PER_BASE, rng))
    grids = np.concatenate(grids)
    return grids[rng.permutation(len(grids))[:count]]


def to_ids(grids):
    """Return the ids (N * 91,) of grids (N, 9, 9): a digit's id is the digit, a line end's 0."""
    lines = np.pad(grids, ((0, 0), (0, 0), (0, 1)))                       # (N, 9, 10)
    return np.pad(lines.reshape(len(grids), -1), ((0, 0), (0, 1))).ravel().astype(np.uint16)


def main():
    with one_line_errors("try fewer --grids"):
        config = PrepareConfig(**parse_knobs(PrepareConfig, __doc__))
        train = make_grids(config.grids, config.seed)
        val = make_grids(config.grids // 10, config.seed + 1)
        write_dataset(config.out_dir or HERE, to_ids(train), to_ids(val), CHARS, record=RECORD,
                      training=TRAINING)


if __name__ == "__main__":
    open_streams()
    main()
