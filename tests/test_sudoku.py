"""Sudoku: the data, records, and solving through --infill."""

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error

import main as main_script
import train as train_script
from main import certainty, unmask_until_sure
from model import GPT, GPTConfig, save_checkpoint
from train import TrainConfig, get_batch, load_data


def load(path):
    spec = importlib.util.spec_from_file_location("sudoku_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sudoku = load(ROOT / "data" / "sudoku" / "prepare.py")
DIGITS = set(range(1, 10))


def is_valid(grid):
    boxes = [grid[r:r + 3, c:c + 3].ravel() for r in (0, 3, 6) for c in (0, 3, 6)]
    return all(set(unit) == DIGITS for unit in [*grid, *grid.T, *boxes])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sudoku")
    train, val = sudoku.make_grids(400, 1), sudoku.make_grids(80, 2)
    sudoku.write_dataset(folder, sudoku.to_ids(train), sudoku.to_ids(val), sudoku.CHARS,
                         record=91, training=sudoku.TRAINING)
    return folder


def test_the_grids_are_valid_different_and_not_shared_by_the_splits():
    train, val = sudoku.make_grids(400, 1), sudoku.make_grids(80, 2)
    assert all(map(is_valid, train)) and all(map(is_valid, val))
    assert len({grid.tobytes() for grid in [*train, *val]}) == 480
    assert np.array_equal(train, sudoku.make_grids(400, 1))  # seeded
    # every digit about equally often in every cell
    share = np.stack([(train == digit).mean(axis=0) for digit in DIGITS])
    assert abs(share - 1 / 9).max() < 0.1


def invariant(grid):
    """The same for all grids that the symmetries make of one: for each pair of rows in a band, and
    of columns in a stack, the cycles of the permutation that maps one line to the other."""
    def cycles(a, b):
        to, left, lengths = dict(zip(a, b)), set(a), []
        while left:
            digit, n = left.pop(), 1
            while to[digit] in left:
                digit, n = to[digit], n + 1
                left.remove(digit)
            lengths.append(n)
        return tuple(sorted(lengths))
    return sorted([sorted(sorted(cycles(lines[3 * band + i], lines[3 * band + j])
                                 for i, j in ((0, 1), (0, 2), (1, 2))) for band in range(3))
                   for lines in (grid.tolist(), grid.T.tolist())])


def test_shuffling_keeps_what_makes_two_grids_the_same():
    [base] = sudoku.solve([0] * 81, random.Random(3))
    base = np.reshape(base, (9, 9))
    made = sudoku.shuffled(base, 30, np.random.default_rng(0))
    assert all(is_valid(grid) and invariant(grid) == invariant(base) for grid in made)
    bases = {str(invariant(np.reshape(sudoku.solve([0] * 81, random.Random(seed))[0], (9, 9))))
             for seed in range(20)}
    assert len(bases) > 15  # so the splits, of other base grids, differ


def test_solve_finds_every_solution():
    rng = random.Random(0)
    [grid] = sudoku.solve([0] * 81, rng)
    assert sudoku.solve(grid, rng, most=2) == [grid]
    puzzle = [0 if digit in (1, 2) else digit for digit in grid]  # 1 and 2 may change places
    swapped = [{1: 2, 2: 1}.get(digit, digit) for digit in grid]
    solutions = sudoku.solve(puzzle, rng, most=100)
    assert grid in solutions and swapped in solutions
    assert all(is_valid(np.reshape(solution, (9, 9))) for solution in solutions)
    assert sudoku.solve([5, 5] + [0] * 79, rng) == []  # contradicts the rules


def test_the_puzzle_that_ships_has_one_solution():
    text = (ROOT / "assets" / "puzzle.txt").read_text()
    cells = [0 if c == "_" else int(c) for c in text.replace("\n", "")]
    assert [len(line) for line in text.splitlines()] == [9] * 9
    assert len(sudoku.solve(cells, random.Random(0), most=2)) == 1


def test_a_page_looks_like_a_sudoku(folder):
    data, _, chars = load_data(TrainConfig(data_dir=str(folder)), 91)
    lines = "".join(chars[i] for i in data[:91]).split("\n")
    assert len(data) == 400 * 91 and lines[9:] == ["", ""]
    assert is_valid(np.array([[int(c) for c in line] for line in lines[:9]]))


@pytest.mark.parametrize("records", [1, 2])
def test_windows_begin_where_a_record_begins(folder, records):
    config = TrainConfig(data_dir=str(folder), block_size=91 * records, batch_size=64)
    data, _, chars = load_data(config, config.block_size)
    seen = set()
    for seed in range(40):
        batch = get_batch(data, config, torch.Generator().manual_seed(seed), record=91)
        if batch.shape[1] == 91 * records:  # now and then a batch is shorter
            assert (batch[:, 9::10][:, :9] == 0).all() and (batch[:, 90] == 0).all()
            assert (batch[:, 0] > 0).all()
            seen |= {tuple(row.tolist()) for row in batch}
    assert len(seen) > 300  # of 400


def test_the_data_set_chooses_its_sizes(call, folder, tmp_path, monkeypatch):
    drawn, real = [], train_script.forward_process
    monkeypatch.setattr(train_script, "forward_process",
                        lambda *args: drawn.append(real(*args)) or drawn[-1])
    flags = [*(f for f in TINY if "block_size" not in f), f"--data_dir={folder}", "--max_iters=2",
             "--eval_interval=2"]
    result = call(train_script, *flags, f"--save_filename={tmp_path}/x")
    assert result.code == 0 and "characters per iteration: 364" in result.out, result
    assert len(drawn) == 2 and all(0.4 <= p <= 0.75 for _, _, p_mask in drawn for p in p_mask[:, 0])
    assert_one_line_error(call(train_script, *flags, "--block_size=90"), "--block_size=90", "91")
    few = call(train_script, *flags, "--eval_chars=91", f"--save_filename={tmp_path}/y")
    assert few.code == 0  # a window of the data set's own size
    page = call(main_script, f"--path={tmp_path}/x", f"--infill={ROOT}/assets/puzzle.txt",
                "--device=cpu")
    puzzle = (ROOT / "assets" / "puzzle.txt").read_text()
    assert page.code == 0 and len(page.out) == 91
    assert all(given in ("_", found) for given, found in zip(puzzle, page.out))


GRID = "1234\n3412\n2143\n4321\n\n"


class Rules(torch.nn.Module):
    """Knows the rules of 4 x 4, as a table: a cell may hold the digits that its row, column and box
    do not have yet; so the cell with one possible digit is the surest."""

    def __init__(self, config):
        super().__init__()
        self.config, self.wte = config, torch.nn.Embedding(1, 1)

    def forward(self, idx):
        logits = torch.full((*idx.shape, 6), -30.0)
        for row, ids in enumerate(idx.tolist()):
            for i, token in enumerate(ids):
                if i % 5 == 4 or i >= 20:
                    logits[row, i, 0] = 0.0
                    continue
                r, c = divmod(i, 5)
                seen = {ids[5 * a + b] for a in range(4) for b in range(4)
                        if (a == r or b == c or (a // 2, b // 2) == (r // 2, c // 2))
                        and 5 * a + b != i}
                for digit in {1, 2, 3, 4} - seen:
                    logits[row, i, digit] = 0.0
        return logits


@pytest.fixture
def solver(monkeypatch):
    config = GPTConfig(21, 6, 1, 1, 8)
    monkeypatch.setattr(main_script, "load_checkpoint", lambda path, device: (
        Rules(config).to(device), list("\n1234"), {"record": 21}))


@pytest.mark.parametrize("hole", "_.0")
def test_surest_first_solves_through_infill(call, solver, tmp_path, hole):
    puzzle = "___4\n34__\n__4_\n_3__\n"
    path = tmp_path / "puzzle.txt"
    path.write_text(puzzle.replace("_", hole))
    flags = (f"--infill={path}", "--device=cpu", "--dtype=float32", "--tries=1")
    result = call(main_script, *flags)
    assert result.code == 0 and solves(result.out, puzzle), result
    assert not all(solves(call(main_script, *flags, "--remasking=random", f"--seed={seed}").out,
                          puzzle) for seed in range(8))


GUESSWORK = "____\n____\n2__3\n34__\n"  # no cell is certain: the first digit is a guess


def test_a_wrong_guess_is_noticed_and_made_anew(call, solver, tmp_path):
    """The draft is the same with one try, and wrong; the tries after it depend on the seed."""
    path = tmp_path / "puzzle.txt"
    path.write_text(GUESSWORK)
    flags = (f"--infill={path}", "--device=cpu", "--dtype=float32")
    assert not solves(call(main_script, *flags, "--tries=1").out, GUESSWORK)
    for seed in range(5):
        page = call(main_script, *flags, f"--seed={seed}", f"--html={tmp_path}/run.html")
        assert page.code == 0 and solves(page.out, GUESSWORK)
    assert int(page.err.split()[0][1:]) > 12  # passes: more than a try of twelve cells


def to_ids(page):
    return torch.tensor([["\n1234_".index(c) for c in page]])


def test_certainty_is_the_least_probability_of_a_written_token():
    rules = Rules(GPTConfig(21, 6, 1, 1, 8))
    right, wrong = to_ids(GRID), to_ids("1" + GRID[1:].replace("1", "2"))
    written = right > 0
    assert certainty(rules, right, written, 5)[0] > 1 - 1e-9
    # what contradicts gets no probability: five tokens at exp(-30), or next to others at 1
    assert certainty(rules, wrong, written, 5)[0] < 0.21
    hidden = []  # four passes, each with another quarter of the sixteen cells masked
    certainty(lambda idx: hidden.append(idx == 5) or rules(idx), right, written, 5)
    assert [int(masks.sum()) for masks in hidden] == [4] * 4
    assert torch.equal(sum(masks.long() for masks in hidden), written.long())
    both = torch.cat([right, wrong])
    none = torch.zeros_like(both, dtype=torch.bool)
    assert certainty(rules, both, none, 5).tolist() == [1, 1]


def test_the_surest_try_is_the_answer_and_sure_rows_stay():
    """Givens that contradict each other: no try is sure. The other row is sure after the draft."""
    rules, easy = Rules(GPTConfig(21, 6, 1, 1, 8)), "___4\n34__\n__4_\n_3__\n\n"
    x = torch.cat([to_ids(easy), to_ids("11" + GUESSWORK[2:] + "\n")])
    settings = dict(remasking="low_confidence")
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    states = list(unmask_until_sure(rules, x, 5, 16, 6, generator=generator, **settings))
    full = [state for state in states if (state != 5).all()]
    tries = [certainty(rules, state, x == 5, 5) for state in full]
    assert len(full) == 7 and solves("".join("\n1234"[i] for i in full[0][0]), easy)
    assert all(torch.equal(state[0], full[0][0]) for state in full)
    assert tries[-1][1] == max(t[1] for t in tries) < 0.999
    alone = torch.Generator().manual_seed(2)
    *_, last = unmask_until_sure(rules, x[1:], 5, 16, 6, generator=[alone], **settings)
    assert torch.equal(last, full[-1][1:])


@pytest.mark.parametrize("flags, words", [
    (["--tries=0", "--infill=a_c"], ["--tries", "0"]),
    (["--tries=2"], ["--tries", "--infill"]),
])
def test_tries_that_make_no_sense(call, flags, words):
    assert_one_line_error(call(main_script, *flags), *words)


def solves(grid, puzzle):
    """Whether every row, column and box of the 4 x 4 grid holds the four digits, and all givens."""
    rows = grid.split()
    boxes = [rows[r][c:c + 2] + rows[r + 1][c:c + 2] for r in (0, 2) for c in (0, 2)]
    units = [*rows, *map("".join, zip(*rows)), *boxes]
    return (all(sorted(unit) == list("1234") for unit in units)
            and all(given in ("_", digit) for given, digit in zip(puzzle, grid)))


@pytest.mark.parametrize("puzzle, words", [
    ("12__\n__1_\n_1__\n__2\n", ["20", "21"]),                  # too short
    ("12__\n__1_\n_1__\n__21\n____\n", ["26", "21"]),           # too long
    ("12__\n__5_\n_1__\n__21\n", ["does not know", "5"]),
    (GRID, ["no holes"]),
])
def test_puzzles_that_can_t_be_read(call, solver, tmp_path, puzzle, words):
    (tmp_path / "puzzle.txt").write_text(puzzle)
    assert_one_line_error(call(main_script, f"--infill={tmp_path}/puzzle.txt"), *words)


@pytest.mark.parametrize("puzzle", ["____\n____\n____\n____", "11__\n____\n____\n____\n\n\n\n"])
def test_no_givens_and_givens_that_contradict_each_other(call, solver, tmp_path, puzzle):
    (tmp_path / "puzzle.txt").write_text(puzzle)
    result = call(main_script, f"--infill={tmp_path}/puzzle.txt")
    assert result.code == 0 and result.out.startswith(puzzle[:2].strip("_"))


def test_a_model_of_another_text_does_not_know_the_digits(call):
    result = call(main_script, f"--infill={ROOT}/assets/puzzle.txt")
    assert_one_line_error(result, "does not know", "'4'")


def test_prepare_is_a_script_like_the_other(call, tmp_path):
    assert call(sudoku, "--grids=50", f"--out_dir={tmp_path}").code == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["record"] == 91 and len(np.fromfile(tmp_path / "train.bin", "<u2")) == 50 * 91
    for bad in ("--grids=5", "--grids=x", "--size=4"):
        assert_one_line_error(call(sudoku, bad), bad.split("=")[0])


def test_a_record_that_is_no_number(call, tmp_path):
    model = GPT(GPTConfig(16, 4, 1, 2, 16))
    save_checkpoint(tmp_path / "x.pt", model, list("abc"), record="many")
    assert_one_line_error(call(main_script, f"--path={tmp_path}/x"), "records")


def test_a_page_is_a_record(call, solver, tmp_path):
    """It begins where a record begins, and does not go on beyond one."""
    page = call(main_script, "--device=cpu")
    assert page.code == 0 and len(page.out) == 22 and not page.out.startswith("\n")
    (tmp_path / "puzzle.txt").write_text(2 * "12__\n__1_\n_1__\n__21\n\n")
    assert_one_line_error(call(main_script, f"--infill={tmp_path}/puzzle.txt"), "at most 21", "42")
    assert_one_line_error(call(main_script, "--gen_length=22"), "at most 21")
