"""
Who solves Sudoku? A mask predictor by several orders of writing, and its autoregressive twin.

    python data/sudoku/prepare.py
    python train.py --dataset=sudoku --save_filename=sudoku
    python tests/benchmarks/sudoku.py --train_twin      # as long as the other, and the same size
    python tests/benchmarks/sudoku.py

The twin learns what a left-to-right model needs: the puzzle, and then its solution. Puzzles are
made of held-out grids, from base grids that no training grid comes from: with 50, 40 or 32 givens
at random places, and with 28 or 24 so that there is exactly one solution. "Solved" is a valid grid
with the givens kept. Seconds per puzzle are those of 24 givens, all puzzles in one batch; for
main.py's way of solving, one puzzle after the other.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "sudoku")]
import prepare  # noqa: E402
from claims import seconds_per_iteration  # noqa: E402
from common import write_dataset  # noqa: E402
from main import PUZZLE_TRIES, left_to_right, unmask, unmask_until_sure  # noqa: E402
from model import load_checkpoint, pick_dtype, resolve_path  # noqa: E402
from train import next_token_losses  # noqa: E402

GIVENS = {50: "random", 40: "random", 32: "random", 28: "one solution", 24: "one solution"}
SUREST = dict(remasking="low_confidence", temperature=0.0)
RULES = [  # name, unmask's arguments, cells a step
    (f"main.py's for puzzles: surest first, up to {PUZZLE_TRIES} tries",
     dict(SUREST, tries=PUZZLE_TRIES), 1),
    ("surest first", SUREST, 1),
    ("surest first", SUREST, 2),
    ("surest first", SUREST, 4),
    ("surest first", SUREST, 8),
    ("surest first, half of the steps revise 30 %", dict(SUREST, revise=0.3), 0.5),
    ("surest first, guidance 0.5", dict(SUREST, cfg_scale=0.5), 1),
    ("random order", dict(remasking="random", temperature=0.0), 1),
    ("dilated, temperature 1, revise 30 %, 32 steps",
     dict(remasking="dilated", temperature=1.0, revise=0.3), None),
    ("the same without revision", dict(remasking="dilated", temperature=1.0), None),
]
EMPTY = 10  # the twin's id of an empty cell; [MASK]'s of the mask predictor


def one_solution(grid, givens, rng):
    """grid (81,) -> a puzzle of so many givens that has this solution alone, or None."""
    cells = list(grid)
    for i in rng.sample(range(81), 81):
        if np.count_nonzero(cells) == givens:
            break
        digit, cells[i] = cells[i], 0
        if len(prepare.solve(cells, rng, most=2)) > 1:
            cells[i] = digit
    return cells if np.count_nonzero(cells) == givens else None


def puzzles(grids, givens, kind, count, rng):
    """-> count puzzles (count, 9, 9), 0 where a cell is empty."""
    made = []
    for grid in grids.reshape(len(grids), 81).tolist():
        if kind == "random":
            keep = set(rng.sample(range(81), givens))
            puzzle = [digit if i in keep else 0 for i, digit in enumerate(grid)]
        else:
            puzzle = one_solution(grid, givens, rng)
        made += [puzzle] if puzzle else []
        if len(made) == count:
            return np.reshape(made, (count, 9, 9))
    raise ValueError(f"{len(grids)} grids are too few for {count} puzzles")


def is_solved(grid):
    """Every row, column and box of grid (9, 9) holds the nine digits."""
    boxes = grid.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
    return all((np.sort(units, axis=1) == np.arange(1, 10)).all()
               for units in (grid, grid.T, boxes))


def to_page(quizzes):
    """(N, 9, 9) -> ids (N, 91), [MASK] where a cell is empty."""
    ids = prepare.to_ids(np.where(quizzes == 0, EMPTY, quizzes)).reshape(len(quizzes), -1)
    return torch.from_numpy(ids.astype(np.int64))


def to_grids(page):
    """ids (N, 91) -> (N, 9, 9)."""
    return page[:, :90].reshape(-1, 9, 10)[:, :, :9].numpy()


def solve_all(batches, quizzes):
    """-> (share solved, seconds per puzzle); batches: iterators of states, whose last is solved."""
    began, pages = time.perf_counter(), []
    for states in batches:
        *_, page = states
        pages.append(page)
    seconds = (time.perf_counter() - began) / len(quizzes)
    grids = to_grids(torch.cat(pages))
    kept = ((quizzes == 0) | (quizzes == grids)).all(axis=(1, 2))
    return np.mean([is_solved(grid) and k for grid, k in zip(grids, kept)]), seconds


def solve_with_twin(twin, prompt, tries):
    """prompt (N, 91) -> an iterator of one state, (N, 91): greedy or, of several samples at
    temperature 1, the one to which the twin gives the highest probability."""
    x = torch.cat([prompt, torch.full_like(prompt, twin.config.mask_id)], dim=1)
    x = x.repeat_interleave(tries, dim=0)                                 # (N * tries, 182)
    *_, x = left_to_right(twin, x, twin.config.mask_id, float(tries > 1),
                          torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = torch.cat([next_token_losses(twin, twin.config.mask_id, part)
                            for part in x.split(100)])                    # (N * tries, 182)
    best = losses[:, prepare.RECORD:].sum(dim=1).view(-1, tries).argmin(dim=1)
    yield x[:, prepare.RECORD:].view(len(prompt), tries, -1)[torch.arange(len(prompt)), best]


def row(name, passes, results):
    print(f"| {name} | {passes} | " + " | ".join(f"{100 * share:.0f} %" for share, _ in results)
          + f" | {results[-1][1]:.2f} |", flush=True)


def train_twin(args):
    """As long as the mask predictor was trained, by what an iteration of each takes now, with the
    same flags, on lines of a puzzle and its solution. Four puzzles of every grid; their empty cells
    are the same shares of it as in training the mask predictor."""
    _, _, info = load_checkpoint(resolve_path(args.model))
    config, rng, parts = info["hyperparameters"], np.random.default_rng(0), []
    for split in ("train", "val"):
        grids = held(split)
        grids = np.repeat(grids, 4 if split == "train" else 1, axis=0)
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
        one, twin_s = (seconds_per_iteration(f) for f in ([*flags, "--dataset=sudoku"], twin_flags))
        iterations = int(info["iteration"] * one / twin_s)
        subprocess.run([sys.executable, str(ROOT / "train.py"), f"--save_filename={args.twin}",
                        *twin_flags, f"--max_iters={iterations}",
                        f"--eval_interval={-(-iterations // 4)}"], check=True)


def held(split):
    """-> the grids of train.bin or val.bin, (N, 9, 9)."""
    data = np.fromfile(ROOT / "data" / "sudoku" / f"{split}.bin", "<u2")
    return to_grids(torch.from_numpy(data.reshape(-1, prepare.RECORD).astype(np.int64)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="sudoku")
    parser.add_argument("--twin", default="sudoku_twin")
    parser.add_argument("--train_twin", action="store_true")
    parser.add_argument("--puzzles", type=int, default=200)
    args = parser.parse_args()
    if args.train_twin:
        return train_twin(args)
    model, _, info = load_checkpoint(resolve_path(args.model))
    dtype, _ = pick_dtype("auto", torch.device("cpu"))
    model.to(dtype)
    print(f"{info['command']}: {info['minutes']:.1f} minutes; {args.puzzles} puzzles each; "
          f"{torch.get_num_threads()} threads, {dtype}\n")
    rng, grids = random.Random(0), held("val")
    sets = {n: puzzles(grids, n, kind, args.puzzles, rng) for n, kind in GIVENS.items()}
    print("| rule | cells a step | " + " | ".join(f"{n} givens" for n in GIVENS)
          + " | seconds per puzzle |\n" + "|---" * (len(GIVENS) + 3) + "|")
    for name, how, per_step in RULES:
        results = []
        for givens, quizzes in sets.items():
            steps = 32 if per_step is None else max(1, round((81 - givens) / per_step))
            how = dict(how, generator=torch.Generator().manual_seed(0))
            page = to_page(quizzes)
            if "tries" in how:
                batches = (unmask_until_sure(model, x, EMPTY, steps, **how) for x in page.split(1))
            else:
                batches = [unmask(model, page, EMPTY, steps, **how)]
            results.append(solve_all(batches, quizzes))
        row(name, per_step or "", results)
    if resolve_path(args.twin).exists():
        twin, _, info = load_checkpoint(resolve_path(args.twin))
        twin.to(dtype)
        for tries in (1, PUZZLE_TRIES):
            results = [solve_all([solve_with_twin(twin, to_page(quizzes), tries)], quizzes)
                       for quizzes in sets.values()]
            how = f"the likeliest of {tries} samples" if tries > 1 else "greedy"
            row(f"the twin, left to right, {how} ({info['minutes']:.1f} minutes)", 1, results)


if __name__ == "__main__":
    main()
