"""Sudoku: the data, records, and solving through --infill."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error
from helpers import load_script, save_gpt, solves, use_rules

import main as main_script
import train as train_script
from lib.data import load_data, write_dataset
from train import TrainConfig, get_batch

sudoku = load_script(ROOT / "data" / "sudoku" / "prepare.py")
DIGITS = set(range(1, 10))


def is_valid(grid):
    boxes = [grid[r:r + 3, c:c + 3].ravel() for r in (0, 3, 6) for c in (0, 3, 6)]
    return all(set(unit) == DIGITS for unit in [*grid, *grid.T, *boxes])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sudoku")
    train, val = sudoku.make_grids(400, 1), sudoku.make_grids(80, 2)
    write_dataset(folder, sudoku.to_ids(train), sudoku.to_ids(val), sudoku.CHARS, record=91,
                  training=sudoku.TRAINING)
    return folder


# -----------------------------------------------------------------------------
# the data

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


def test_a_record_is_nine_lines_of_digits_and_an_empty_line(folder):
    data = load_data(folder, 91)
    lines = "".join(data.vocab[i] for i in data.train[:91]).split("\n")
    assert data.record == 91 and len(data.train) == 400 * 91 and lines[9:] == ["", ""]
    assert is_valid(np.array([[int(c) for c in line] for line in lines[:9]]))


@pytest.mark.parametrize("records", [1, 2])
def test_windows_begin_where_a_record_begins(folder, records):
    config = TrainConfig(data_dir=str(folder), block_size=91 * records, batch_size=64)
    data = load_data(folder, config.block_size).train
    seen = set()
    for seed in range(40):
        batch = get_batch(data, config, torch.Generator().manual_seed(seed), record=91)
        if batch.shape[1] == 91 * records:  # now and then a batch is shorter
            assert (batch[:, 9::10][:, :9] == 0).all() and (batch[:, 90] == 0).all()
            assert (batch[:, 0] > 0).all()
            seen |= {tuple(row.tolist()) for row in batch}
    assert len(seen) > 300  # of 400


def test_the_data_set_chooses_its_sizes_and_how_much_is_masked(call, folder, tmp_path,
                                                               monkeypatch):
    drawn, real = [], train_script.forward_process
    monkeypatch.setattr(train_script, "forward_process",
                        lambda *args: drawn.append(real(*args)) or drawn[-1])
    flags = [*(f for f in TINY if "block_size" not in f), f"--data_dir={folder}", "--max_iters=2",
             "--eval_interval=2", "--warmup_iters=1"]
    result = call(train_script, *flags, f"--save_filename={tmp_path}/x")
    assert result.code == 0 and "\n364 characters per iteration" in result.out, result
    assert len(drawn) == 2 and all(0.4 <= p <= 0.75 for _, _, p_mask in drawn for p in p_mask[:, 0])
    assert_one_line_error(call(train_script, *flags, "--block_size=90"), "--block_size=90", "91")
    few = call(train_script, *flags, "--eval_tokens=91", f"--save_filename={tmp_path}/y")
    assert few.code == 0  # a window of the data set's own size
    page = call(main_script, f"--path={tmp_path}/x", f"--infill={ROOT}/assets/puzzle.txt",
                "--device=cpu", "--tries=2")
    puzzle = (ROOT / "assets" / "puzzle.txt").read_text()
    assert page.code == 3 and len(page.out) == 91 and "wrong after 2 tries: " in page.err
    assert all(given in ("_", found) for given, found in zip(puzzle, page.out))


def test_prepare_is_a_script_like_the_other(call, tmp_path):
    assert call(sudoku, "--grids=50", f"--out_dir={tmp_path}").code == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["record"] == 91 and len(np.fromfile(tmp_path / "train.bin", "<u2")) == 50 * 91
    for bad in ("--grids=5", "--grids=x", "--seed=-1", "--size=4"):
        assert_one_line_error(call(sudoku, bad), bad.split("=")[0])


# -----------------------------------------------------------------------------
# solving, by a model that knows the rules of 4 x 4

EASY = "___4\n34__\n__4_\n_3__\n"        # every cell follows from the others, one after the other
GUESSWORK = "____\n_4__\n2__3\n_3__\n"   # not so: a digit has to be guessed, and is guessed wrong
NO_ANSWER = "12__\n____\n__3_\n__4_\n"   # no digit is left for the third cell


@pytest.fixture
def rules(monkeypatch):
    return use_rules(monkeypatch, 4)


def solve(call, puzzle, *flags):
    return call(main_script, f"--infill={puzzle}", "--device=cpu", "--dtype=float32", *flags)


def test_the_surest_cell_first_solves_and_a_random_one_does_not(call, rules):
    result = solve(call, EASY, "--tries=1")
    assert result.code == 0 and solves(result.out, EASY), result
    assert not all(solves(solve(call, EASY, "--remasking=random", f"--seed={seed}").out, EASY)
                   for seed in range(8))


def test_a_wrong_guess_is_noticed_and_replaced(call, rules, tmp_path):
    one = solve(call, GUESSWORK, "--tries=1")
    assert not solves(one.out, GUESSWORK) and "wrong after 1 tries: row 1 holds 3" in one.err
    page = solve(call, GUESSWORK, f"--html={tmp_path}/run.html")
    assert page.code == 0 and solves(page.out, GUESSWORK) and "not sure" not in page.err


def test_an_answer_that_breaks_a_rule_is_printed_and_has_a_status_of_its_own(call, rules):
    """The search knows no rule, but what is said of its answers is checked with the rules."""
    result = solve(call, NO_ANSWER)
    assert result.code == 3 and "wrong after 64 tries: row 1 holds 1 twice" in result.err, result
    assert len(result.out) == 21 and "_" not in result.out and not solves(result.out, NO_ANSWER)
    assert all(given in ("_", found) for given, found in zip(NO_ANSWER, result.out))
    assert "after 3 tries" in solve(call, NO_ANSWER, "--tries=3").err
    assert "after 1 tries" in solve(call, NO_ANSWER, "--remasking=low_confidence").err
    good_and_bad = solve(call, EASY + "\n" + NO_ANSWER)
    assert good_and_bad.code == 3 and good_and_bad.err.count("wrong") == 1
    assert solves(good_and_bad.out[:20], EASY) and len(good_and_bad.out) == 42


def test_a_wrong_answer_is_called_wrong_even_if_the_model_is_sure_of_it(call, rules, monkeypatch):
    monkeypatch.setattr("lib.search.certainty", lambda *_: torch.ones(1))
    result = solve(call, NO_ANSWER)
    assert result.code == 3 and "wrong after 64 tries" in result.err


def test_an_answer_that_breaks_no_rule_may_be_doubtful(call, rules, monkeypatch):
    monkeypatch.setattr("lib.search.certainty", lambda *_: torch.zeros(1))
    result = solve(call, EASY, "--tries=2")
    assert result.code == 0 and "not sure of this answer (2 tries)" in result.err


def test_the_steps_of_all_tries_are_counted(call, rules):
    """With unmask, a step for each of the 12 cells; the search goes back to its last guesses."""
    assert "[12 steps in " in solve(call, NO_ANSWER, "--remasking=low_confidence").err
    one, two = (int(solve(call, NO_ANSWER, f"--tries={n}").err.split("[")[1].split()[0])
                for n in (1, 2))
    assert one < two < 2 * one


def test_a_seed_gives_the_same_answer_again(call, rules):
    free = "_" * 16
    first, second = (solve(call, free, "--seed=1") for _ in range(2))
    assert first.code == 0 and first.out == second.out
    assert len({solve(call, free, f"--seed={s}", "--temperature=1").out for s in range(5)}) > 1


@pytest.mark.parametrize("flags, words", [
    (["--tries=0", "--infill=" + EASY], ["--tries", "0"]),
    (["--tries=2"], ["--tries", "puzzles"]),
    (["--tries=2", "--revise=0.1", "--infill=" + EASY], ["--tries", "--revise"]),
    (["--tries=2", "--steps=3", "--infill=" + EASY], ["--tries", "--steps"]),
    (["--steps=0", "--infill=" + EASY], ["steps", "0"]),
    (["--remasking=best", "--infill=" + EASY], ["remasking", "best"]),
])
def test_flags_that_make_no_sense(call, rules, flags, words):
    assert_one_line_error(call(main_script, *flags), *words)


@pytest.mark.parametrize("puzzle, words", [
    ("12__\n__1_\n_1__\n__2\n", ["4 lines of 4", "16 cells"]),  # too short
    ("12__\n__1_\n_1__\n__21\n____\n", ["4 lines of 4", "16 cells"]),  # too long
    ("12__\n__5_\n_1__\n__21\n", ["does not know", "5"]),
    ("1234\n3412\n2143\n4321\n", ["no empty cell"]),
    ("11__\n____\n____\n____\n", ["row 1 holds 1 twice"]),
])
def test_puzzles_that_can_t_be_solved_are_one_line(call, rules, puzzle, words):
    assert_one_line_error(solve(call, puzzle), *words)
    assert rules.calls == 0


def test_a_puzzle_without_givens_is_solved(call, rules):
    result = solve(call, "____\n____\n____\n____")
    assert result.code == 0 and solves(result.out, "_" * 16)


def test_a_twin_solves_no_puzzles(call, tmp_path):
    """It can't see what is to the right of an empty cell."""
    twin = save_gpt(tmp_path / "twin.pt", "\n1234", 21, causal=True, record=21)
    assert_one_line_error(call(main_script, f"--path={twin}", f"--infill={EASY}"), "--infill",
                          "causal")


def test_a_model_of_another_text_says_how_to_solve_a_puzzle(call):
    result = call(main_script, f"--infill={ROOT}/assets/puzzle.txt")
    assert_one_line_error(result, "does not know", "'4'", "--path=sudoku")
    dots = call(main_script, "--infill=" + "12.4|" * 20 + "_")
    assert_one_line_error(dots, "--path=sudoku")
    prose = call(main_script, "--infill=in 1234 _")
    assert_one_line_error(prose, "'4'")
    assert "--path=sudoku" not in prose.err


def test_a_page_of_a_puzzle_model_is_a_record(call, rules):
    """It begins where a record begins, and does not go on beyond one."""
    page = call(main_script, "--device=cpu")
    assert page.code == 0 and len(page.out) == 22 and not page.out.startswith("\n")
    assert_one_line_error(call(main_script, "--gen_length=22"), "records of 21", "22")


def test_texts_of_equal_records_that_are_no_puzzles_are_ordinary_texts(sample, tmp_path):
    """Records of 16 characters are no square grid: . and 0 are characters."""
    path = save_gpt(tmp_path / "x.pt", "ab.0\n", 32, record=16)
    text = ".0a_b.0\na..00 _\n"
    result = sample(f"--path={path}", f"--infill={text.replace(' ', 'b')}")
    assert result.code == 0 and len(result.out) == 16
    assert (result.out[:3], result.out[4:14], result.out[15:]) == (".0a", "b.0\na..00b", "\n")
    assert_one_line_error(sample(f"--path={path}", "--infill=.0_"), "records of 16", "3")
