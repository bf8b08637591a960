"""Puzzle files as people have them: read_puzzles, and main.py on such files."""

import io
import re
import sys

import pytest
from conftest import ROOT, assert_one_line_error
from helpers import load_script, solves, use_rules

import main as main_script
from lib.puzzles import Puzzle, read_puzzles

GRID = (ROOT / "assets" / "puzzle.txt").read_text()
ROWS = GRID.split()
CELLS = "".join(ROWS)
[ANSWER] = load_script(ROOT / "data" / "sudoku" / "prepare.py").solve(
    [0 if cell == "_" else int(cell) for cell in CELLS])
ANSWER = "".join(map(str, ANSWER))
OTHER = ANSWER[:60] + "_" * 21  # another puzzle
EMPTY = "0._*?\u00b7"  # what people write for an empty cell
SPACED = "\n".join(map(" ".join, ROWS))


def with_bars(space, rule, bar="|"):
    """The grid with a bar between the boxes, and a rule between the bands."""
    bar = f"{space}{bar}{space}"
    lines = [bar.join(space.join(row[i:i + 3]) for i in (0, 3, 6)) for row in ROWS]
    bands = ["\n".join(lines[i:i + 3]) for i in (0, 3, 6)]
    return f"\n{rule}\n".join(bands) + "\n"


def with_frame(text, top, bottom=None, bar="|"):
    lines = [f"{bar} {line} {bar}" if "_" in line else line for line in text.splitlines()]
    return "\n".join([top, *lines, bottom or top]) + "\n"


def drawn(corners):
    """A rule of box-drawing characters: corners are its left end, its crossings and its right
    end."""
    left, crossing, right = corners
    return left + crossing.join(["\u2500" * 7] * 3) + right


def full_width(text):
    """The digits and letters of a text as East Asian fonts have them, as wide as ideographs."""
    return text.translate({ord(char): ord(char) + 0xFEE0 for char in "0123456789.*?_"})


SHAPES = {
    "one line": CELLS,
    "nine lines": GRID,
    "spaces": SPACED,
    "spaces that do not break": SPACED.replace(" ", "\u00a0"),
    "tabs": "\n".join(map("\t".join, ROWS)),
    "commas": "\n".join(map(",".join, ROWS)),
    "a line of 81 with spaces": " ".join(CELLS),
    "bars and rules": with_bars("", "---+---+---"),
    "spaces, bars and rules": with_bars(" ", "------+-------+------"),
    "rules without a plus": with_bars(" ", "-" * 21),
    "a frame": with_frame(with_bars(" ", "|-------+-------+-------|"), "+-------+-------+-------+"),
    "a frame of box-drawing characters": with_frame(
        with_bars(" ", drawn("\u251c\u253c\u2524"), "\u2502"),
        drawn("\u250c\u252c\u2510"), drawn("\u2514\u2534\u2518"), "\u2502"),
    "white space around": f"\n\n  \n{GRID.replace(chr(10), '  ' + chr(10))}\n \n",
    "a line end before": "\n" + GRID,
    "a heading": "Grid 01\n" + GRID,
    "a heading with its difficulty": "Sudoku No. 7, very hard:\n" + GRID,
    "comments": f"# from a book, 1-2-3\n{GRID}# 123456789\n",
    "a comment behind it": CELLS + "  # hard, 27 givens",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("empty", EMPTY)
def test_every_notation_is_read_as_the_same_puzzle(shape, empty):
    text = SHAPES[shape].replace("_", empty)
    expected = [Puzzle(CELLS, one_line=len(ROWS[0]) * 9 <= len(text.split("\n")[0]))]
    assert read_puzzles(text, 9) == read_puzzles(full_width(text), 9) == expected


def test_spaces_are_empty_cells_where_nothing_else_is():
    """Also at the ends of lines, where editors remove them."""
    text = GRID.replace("_", " ")
    for stripped in (text, "\n".join(line.rstrip() for line in text.split("\n"))):
        assert read_puzzles(stripped, 9) == [Puzzle(CELLS, one_line=False)]


def test_a_row_without_givens_is_a_row_in_every_notation():
    bare = ["_" * 9 if i == 2 else row for i, row in enumerate(ROWS)]
    for empty in EMPTY:
        [puzzle] = read_puzzles("\n".join(bare).replace("_", empty), 9)
        assert puzzle.cells == "".join(bare)


def test_a_page_is_nine_lines_and_an_empty_one():
    assert read_puzzles(CELLS, 9)[0].to_page() == GRID + "\n"
    assert Puzzle("1234" * 4, False).to_page() == "1234\n" * 4 + "\n"


@pytest.mark.parametrize("empty", "0.")
@pytest.mark.parametrize("header, row", [
    ("quizzes,solutions", "{puzzle},{answer}"),               # 1 million Sudoku games
    ("puzzle,solution", "{puzzle},{answer}"),                 # 9 million Sudoku puzzles
    ("id,puzzle,solution,clues,difficulty", "{number},{puzzle},{answer},27,2.2"),   # 3 million
    ("puzzle", "{puzzle}"),
    ("puzzle;solution", '"{puzzle}";"{answer}"'),
])
def test_rows_of_csv_files_as_kaggle_has_them(header, row, empty):
    rows = [row.format(puzzle=cells.replace("_", empty), answer=ANSWER, number=number)
            for number, cells in enumerate((CELLS, OTHER), 1)]
    puzzles = read_puzzles("\n".join([header, *rows, ""]), 9)
    assert puzzles == [Puzzle(CELLS, True), Puzzle(OTHER, True)]


@pytest.mark.parametrize("text, expected", [
    (f"{CELLS}\n{OTHER}\n", [True, True]),
    (f"Grid 01\n{GRID}Grid 02\n{GRID}Grid 50\n{GRID}", [False] * 3),          # Project Euler 96
    (f"{GRID}\n{CELLS}\n\n\n{GRID}# the end\n", [False, True, False]),
    (GRID * 5, [False] * 5),
])
def test_a_file_may_hold_several_puzzles(text, expected):
    puzzles = read_puzzles(text, 9)
    assert [puzzle.one_line for puzzle in puzzles] == expected
    assert all(puzzle.cells in (CELLS, OTHER) for puzzle in puzzles)


FORM = ["9 lines of 9 cells", "81 cells in a line", "a cell is a digit, or . or 0 or _"]
UNKNOWN = f"{CELLS[:40]}a{CELLS[41:]}"  # one of its characters is no cell
NOT_READ = {
    "letters for empty cells": GRID.replace("_", "o"),
    "dashes for empty cells": GRID.replace("_", "-"),
    "-1 for empty cells": SPACED.replace("_", "-1"),
    "nothing for empty cells": "\n".join(map(",".join, ROWS)).replace("_", ""),
    "dashes beside the answer": f"puzzle,solution\n{CELLS.replace('_', '-')},{ANSWER}\n",
    "digits above": f"{' '.join('123456789')}\n{SPACED}",
    "labels": "    1 2 3   4 5 6   7 8 9\n" + "\n".join(
        f"{letter} | {line}" for letter, line in zip("ABCDEFGHI", SPACED.split("\n"))),
    "a line of 82": f"{CELLS}\n{OTHER}1\n",
    "a line of 80": CELLS[:-1],
    "a row of 10": f"{GRID}{GRID[:-1]}1\n",
    "eight rows": "\n".join(ROWS[:8]),
    "eight rows, and a puzzle": f"{GRID[:80]}Grid 02\n{GRID}",
    "a line of 81 between rows": f"{GRID[:40]}{CELLS}\n{GRID[40:]}",
    "an unknown character": UNKNOWN,
    "an unknown character in the second of three": f"{CELLS}\n{UNKNOWN}\n{OTHER}\n",
    "an unknown character in a row": f"{GRID[:20]}a{GRID[20:]}",
    "nothing but a comment": "\n# nothing\n",
    "nothing but a heading": "Grid 01\n",
}


@pytest.mark.parametrize("text", NOT_READ.values(), ids=NOT_READ)
def test_what_is_no_puzzle_is_answered_with_the_form_that_is_read(text):
    """Not with a reason that would be wrong, such as a digit that is there twice, and not by
    leaving something out."""
    with pytest.raises(ValueError) as e:
        read_puzzles(text, 9)
    assert [words for words in FORM if words not in str(e.value)] == []


BAD = [
    (NOT_READ["letters for empty cells"], FORM),
    (NOT_READ["a row of 10"], FORM),
    (f"{CELLS}\n{ANSWER}", ["puzzle 2 has no empty cell"]),
    # givens that contradict each other
    ("5___5" + "_" * 76, ["puzzle 1", "row 1 holds 5 twice"]),
    ("5________5" + "_" * 71, ["puzzle 1", "column 1 holds 5 twice"]),
    ("5" + "_" * 9 + "5" + "_" * 70, ["puzzle 1", "box", "holds 5 twice"]),
    (f"{CELLS}\n\n{'_' * 79}77", ["puzzle 2", "row 9 holds 7 twice"]),
]


@pytest.mark.parametrize("text, words", BAD)
def test_a_file_that_is_no_puzzle_is_one_line_before_any_work(call, monkeypatch, tmp_path,
                                                                    text, words):
    rules = use_rules(monkeypatch, 9)
    path = tmp_path / "puzzle.txt"
    path.write_text(text)
    result = call(main_script, f"--infill={path}")
    assert_one_line_error(result, *words)
    assert result.out == "" and rules.calls == 0


@pytest.mark.parametrize("other", range(1, 16))
def test_a_digit_twice_in_any_row_column_or_box_is_refused(other):
    """The first cell of a 4 x 4 puzzle and any other: refused if they share a unit, and read if
    they do not."""
    cells = ["3"] + ["_"] * 15
    cells[other] = "3"
    row, column = divmod(other, 4)
    if row == 0 or column == 0 or (row < 2 and column < 2):
        with pytest.raises(ValueError, match="holds 3 twice"):
            read_puzzles("".join(cells), 4)
    else:
        assert read_puzzles("".join(cells), 4)[0].cells == "".join(cells)


# -----------------------------------------------------------------------------
# the command

def solve(call, *flags):
    return call(main_script, "--device=cpu", "--dtype=float32", *flags)


@pytest.fixture
def easy(monkeypatch):
    """A puzzle in which every cell follows from the rules alone, and a model that knows them."""
    use_rules(monkeypatch, 9)
    return "".join("_" if i % 4 == 1 or i % 9 == 4 else digit for i, digit in enumerate(ANSWER))


def grid_of(cells):
    return "".join(cells[i:i + 9] + "\n" for i in range(0, 81, 9))


def test_an_answer_is_printed_as_its_puzzle_was_written(call, easy, tmp_path):
    """Grids as nine lines and an empty one, lines as lines, one after the other."""
    path = tmp_path / "many.txt"
    path.write_text(f"{easy}\n\nGrid 02\n{grid_of(easy)}\n{easy.replace('_', '.')}\n")
    result = solve(call, f"--infill={path}")
    assert result.code == 0 and "not sure" not in result.err, result
    assert result.out == f"{ANSWER}\n{grid_of(ANSWER)}\n{ANSWER}\n"
    assert len(re.findall(r"\[\d+ steps in \d+\.\d s; seed 1337\]\n", result.err)) == 3


@pytest.mark.parametrize("how", ["file", "stdin", "on the command line"])
def test_puzzles_come_from_a_file_from_stdin_and_from_the_command_line(call, easy, tmp_path, how,
                                                                       monkeypatch):
    """Where files have line ends of Windows and a byte order mark, too."""
    data = grid_of(easy).replace("\n", "\r\n").encode("utf-8-sig")
    (tmp_path / "puzzle.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    arg = {"file": tmp_path / "puzzle.txt", "stdin": "-",
           "on the command line": easy.replace("_", ".")}[how]
    result = solve(call, f"--infill={arg}")
    assert result.code == 0 and result.out.replace("\n", "") == ANSWER
    assert solves(grid_of(result.out.replace("\n", "")), grid_of(easy))


def test_each_puzzle_of_a_csv_file_is_solved(call, easy, tmp_path):
    path = tmp_path / "sudoku.csv"
    rows = [f"{number},{easy.replace('_', '.')},{ANSWER},54,0.0\n" for number in (1, 2, 3)]
    path.write_text("id,puzzle,solution,clues,difficulty\n" + "".join(rows))
    result = solve(call, f"--infill={path}")
    assert result.code == 0 and result.out == 3 * f"{ANSWER}\n"


def test_a_replay_is_for_a_single_puzzle(call, easy, tmp_path):
    page = tmp_path / "run.html"
    assert_one_line_error(solve(call, f"--infill={easy}\n{easy}", f"--html={page}"), "--html")
    assert not page.exists()
    assert solve(call, f"--infill={easy}", f"--html={page}").code == 0 and page.exists()
