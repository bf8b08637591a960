"""
Who solves Sudoku? A mask predictor, which is a diffusion model, tries several orders of writing. It
is compared with its twin, a GPT: the same network with a causal mask.

    python data/sudoku/prepare.py
    python train.py --dataset=sudoku --save_filename=sudoku
    python tests/benchmarks/sudoku.py --train_twin      # as long as the other, and the same size
    python tests/benchmarks/sudoku.py
    python tests/benchmarks/sudoku.py --file=top95.txt  # puzzles of others, as main.py solves them

The twin learns what a left-to-right model needs: lines of a puzzle and its solution. The puzzles
are made of the grids for validation, which come from base grids of their own (prepare.py). They
have 28 or 24 givens (filled cells) and exactly one solution. The passes and seconds are those per
puzzle of 24 givens. main.py's search solves one puzzle after the other, the other rules all in one
batch.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data" / "sudoku"))
import prepare
from metrics import ROOT
from training import seconds_per_iteration

from diffusion import unmask
from lib.checkpoint import load_checkpoint, resolve_path
from lib.common import read_text
from lib.data import data_folder, load_data, write_dataset
from lib.device import pick_dtype
from lib.puzzles import read_puzzles
from lib.search import SURE, certainty, unmask_until_sure
from lib.twin import left_to_right
from main import INFILL, PUZZLE

GIVENS = (28, 24)
RULES = [  # name, arguments of unmask, cells per step
    (f"main.py's search: all above {PUZZLE['threshold']}, up to {PUZZLE['tries']} grids", PUZZLE,
     None),
    ("one try: surest first, all above 0.999", dict(INFILL, threshold=0.999), 1),
    ("one try: surest first", INFILL, 1),
    ("one try: surest first", INFILL, 4),
    ("one try: random order", dict(remasking="random", temperature=0.0), 1),
]
EMPTY = len(prepare.CHARS)  # for the twin the id of an empty cell, for the mask predictor [MASK]


def one_solution(grid, givens, rng):
    """Return a puzzle with so many givens whose only solution is grid (81,), or None."""
    cells = list(grid)
    for i in rng.sample(range(81), 81):
        if np.count_nonzero(cells) == givens:
            break
        digit, cells[i] = cells[i], 0
        if len(prepare.solve(cells, rng, most=2)) > 1:
            cells[i] = digit
    return cells if np.count_nonzero(cells) == givens else None


def puzzles(grids, givens, count, rng):
    """Return count puzzles with exactly one solution (count, 9, 9), 0 where a cell is empty."""
    made = []
    for grid in grids.reshape(len(grids), 81).tolist():
        puzzle = one_solution(grid, givens, rng)
        made += [puzzle] if puzzle else []
        if len(made) == count:
            return np.reshape(made, (count, 9, 9))
    raise ValueError(f"{len(grids)} grids are too few for {count} puzzles")


def is_solved(grid):
    """Return whether every row, column and box of grid (9, 9) holds the nine digits."""
    boxes = grid.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
    return all((np.sort(units, axis=1) == np.arange(1, 10)).all()
               for units in (grid, grid.T, boxes))


def to_page(quizzes):
    """Return the ids (N, 91) of quizzes (N, 9, 9), EMPTY where a cell is empty."""
    ids = prepare.to_ids(np.where(quizzes == 0, EMPTY, quizzes)).reshape(len(quizzes), -1)
    return torch.from_numpy(ids.astype(np.int64))


def to_grids(page):
    """Return the grids (N, 9, 9) of ids (N, 91)."""
    return page[:, :90].reshape(-1, 9, 10)[:, :, :9]


def solve_all(batches, quizzes):
    """Return whether each of the quizzes (N, 9, 9) is solved, and the passes and the seconds per
    puzzle. batches: iterators of states (B, 91); the last state of each holds the answers. A pass
    counts for the rows in which it wrote."""
    began, pages, passes = time.perf_counter(), [], 0
    for states in batches:
        before = None
        for page in states:
            masks = (page == EMPTY).sum(dim=1)
            passes += len(page) if before is None else int((masks < before).sum())
            before = masks
        pages.append(page)
    seconds = (time.perf_counter() - began) / len(quizzes)
    grids = to_grids(torch.cat(pages).numpy())
    kept = ((quizzes == 0) | (quizzes == grids)).all(axis=(1, 2))
    solved = np.array([is_solved(grid) and k for grid, k in zip(grids, kept)])
    return solved, passes / len(quizzes), seconds


def solve_file(model, args):
    """Print how main.py solves the puzzles of a file, one after the other. An answer is sure or
    not; wrong is one that is sure and no solution."""
    found = read_puzzles(read_text(args.file), 9)
    quizzes = np.reshape([[int(c) for c in puzzle.cells.replace("_", "0")] for puzzle in found],
                         (-1, 9, 9))
    answers = []

    def solve(x):
        for page in unmask_until_sure(model, x, EMPTY, **PUZZLE):
            yield page
        answers.append(certainty(model, page, x == EMPTY, EMPTY).item() >= SURE)
    solved, passes, seconds = solve_all(map(solve, to_page(quizzes).split(1)), quizzes)
    sure = np.array(answers)
    print(f"{args.file}: {len(quizzes)} puzzles: {solved.sum()} solved "
          f"({100 * solved.mean():.0f} %), {(~sure).sum()} not sure, "
          f"{(sure & ~solved).sum()} sure and wrong; "
          f"{passes:.0f} passes and {seconds:.2f} seconds per puzzle")


def solve_with_twin(twin, prompt):
    """Yield one state (N, 91), the twin's greedy answers to prompt (N, 91)."""
    x = torch.cat([prompt, torch.full_like(prompt, twin.config.mask_id)], dim=1)
    *_, x = left_to_right(twin, x, twin.config.mask_id, temperature=0.0)
    yield x[:, prepare.RECORD:]


def print_row(name, per_step, results):
    print(f"| {name} | {per_step} | "
          + " | ".join(f"{100 * solved.mean():.0f} %" for solved, _, _ in results)
          + f" | {results[-1][1]:.1f} | {results[-1][2]:.2f} |", flush=True)


def train_twin(args):
    """Train the twin with the flags of the mask predictor and for as long, going by the time that
    an iteration of each takes now. It learns lines of a puzzle and its solution: four puzzles of
    every grid, with the same shares of empty cells that the mask predictor saw masked."""
    _, _, info = load_checkpoint(resolve_path(args.model))
    config, rng, parts = info["hyperparameters"], np.random.default_rng(0), []
    for grids, copies in zip(load_grids(args), (4, 1)):
        grids = np.repeat(grids, copies, axis=0)
        hidden = rng.random(grids.shape).reshape(len(grids), 81).argsort(axis=1).argsort(axis=1)
        empty = 81 * rng.uniform(config["eps"], config["p_max"], len(grids))[:, None, None]
        quizzes = np.where(hidden.reshape(grids.shape) < empty, EMPTY, grids)
        parts.append(np.concatenate([prepare.to_ids(z).reshape(len(z), -1)
                                     for z in (quizzes, grids)], axis=1).ravel())
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), *parts, [*prepare.CHARS, "."], record=2 * prepare.RECORD)
        flags = [f"--{name}={config[name]}" for name in ("n_layer", "n_head", "n_embd", "rope",
                 "batch_size", "muon_lr", "learning_rate")]
        twin_flags = [*flags, f"--block_size={2 * prepare.RECORD}", f"--data_dir={folder}",
                      "--causal"]
        one, twin_s = (seconds_per_iteration(f) for f in ([*flags, f"--data_dir={args.data_dir}"],
                                                          twin_flags))
        iterations = max(1, int(info["iteration"] * one / twin_s))
        subprocess.run([sys.executable, str(ROOT / "train.py"), f"--save_filename={args.twin}",
                        *twin_flags, f"--max_iters={iterations}",
                        f"--eval_interval={-(-iterations // 4)}"], check=True)


def load_grids(args):
    """Return the grids for training and those for validation, each (N, 9, 9)."""
    data = load_data(Path(args.data_dir), prepare.RECORD)
    return [to_grids(ids.reshape(-1, prepare.RECORD)) for ids in (data.train, data.val)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sudoku")
    parser.add_argument("--twin", default="sudoku_twin")
    parser.add_argument("--train_twin", action="store_true")
    parser.add_argument("--puzzles", type=int, default=100)
    parser.add_argument("--file", help="solve the puzzles of this file, in any common notation")
    parser.add_argument("--data_dir", default=data_folder("sudoku"))
    args = parser.parse_args()
    if args.train_twin:
        return train_twin(args)
    model, _, info = load_checkpoint(resolve_path(args.model))
    dtype = pick_dtype("auto", torch.device("cpu"))
    model.to(getattr(torch, dtype))
    print(f"{info['command']}: {info['minutes']:.1f} minutes; {args.puzzles} puzzles each; "
          f"{torch.get_num_threads()} threads, {dtype}\n")
    if args.file:
        return solve_file(model, args)
    rng, (_, grids) = random.Random(0), load_grids(args)
    sets = {n: puzzles(grids, n, args.puzzles, rng) for n in GIVENS}
    print("| rule | cells per step | " + " | ".join(f"{n} givens" for n in GIVENS)
          + " | passes | seconds per puzzle |\n" + "|---" * (len(GIVENS) + 4) + "|")
    for name, how, per_step in RULES:
        results = []
        for givens, quizzes in sets.items():
            steps = 32 if per_step is None else max(1, round((81 - givens) / per_step))
            page = to_page(quizzes)
            if "tries" in how:
                batches = (unmask_until_sure(model, x, EMPTY, **how) for x in page.split(1))
            else:
                generator = torch.Generator().manual_seed(0)
                batches = [unmask(model, page, EMPTY, steps, generator=generator, **how)]
            results.append(solve_all(batches, quizzes))
        print_row(name, per_step or "", results)
    if resolve_path(args.twin).exists():
        twin, _, info = load_checkpoint(resolve_path(args.twin))
        twin.to(getattr(torch, dtype))
        results = []
        for quizzes in sets.values():
            solved, _, seconds = solve_all([solve_with_twin(twin, to_page(quizzes))], quizzes)
            results.append((solved, prepare.RECORD, seconds))             # a pass per character
        print_row(f"the twin, left to right, greedy ({info['minutes']:.1f} minutes)", 1, results)


if __name__ == "__main__":
    main()
