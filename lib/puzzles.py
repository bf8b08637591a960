"""
Reads puzzle files in common notations, for models that were trained on grids such as Sudokus.
"""

import math
import re
from dataclasses import dataclass

from lib.common import check

EMPTY = "0._*?xX-"


@dataclass
class Puzzle:
    cells: str       # n * n characters, row by row; _ where a cell is empty
    one_line: bool   # how it was written, and how its answer is to be printed

    def to_page(self):
        """Return the record that a model was trained on: n lines and an empty line."""
        n = math.isqrt(len(self.cells))
        lines = [self.cells[i:i + n] + "\n" for i in range(0, n * n, n)]
        return "".join(lines) + "\n"


def read_puzzles(text, n):
    """Return the list of Puzzles, n x n cells each, that text holds: grids of n lines or one line
    per puzzle, in any of these notations.

    A cell is a digit, or empty: 0 . _ * ? x or -. Spaces, |, + and lines such as ---+---+--- only
    separate. Of the fields of a CSV row, the first that is a puzzle counts. Headings, comments
    after # and empty lines are skipped. ValueError if a puzzle does not have n * n cells, gives a
    digit twice in a row, column or box, or leaves no cell empty."""
    lines = [line.split("#")[0].strip() for line in text.split("\n")]
    dash_is_cell = any("-" in line and re.search("[0-9]", line) and not re.search("[A-Za-z]", line)
                       for line in lines)
    puzzles, rows = [], []

    def add(cells, one_line=False):
        number = len(puzzles) + 1
        check(len(cells) == n * n, f"{len(cells)} cells in puzzle {number}: {n * n} are needed")
        check("_" in cells, f"puzzle {number} has no empty cell")
        check_givens(cells, n, number)
        puzzles.append(Puzzle(cells, one_line))
        rows.clear()

    for line in lines:
        whole = [field for field in re.split("[,;\t]", line) if len(cells_of(field)) == n * n]
        line = whole[0] if whole else line
        cells, signs = cells_of(line), set(line) - set("| ")
        is_heading = re.search("[A-WYZa-wyz]", line) and len(cells) < n
        if rows and (is_heading or not line and len(rows) % math.isqrt(n)):
            add("".join(rows))  # a puzzle ends here, complete or not
        if is_heading or is_rule(signs, len(cells) == n and dash_is_cell):
            continue
        unknown = sorted(signs - set("123456789+,;\"'\t" + EMPTY))
        check(not unknown, f"puzzle {len(puzzles) + 1} has characters that are not cells: "
                           + " ".join(map(repr, unknown)))
        if len(cells) > 2 * n:
            add(cells, one_line=True)
        else:
            rows.append(cells)
        if len(rows) == n:
            add("".join(rows))
    if rows:
        add("".join(rows))
    check(puzzles, "no puzzle found")
    return puzzles


def is_rule(signs, may_be_row):
    """Whether a line of these signs only separates: it is empty or drawn with - + = *. A line of
    dashes alone may be a row of empty cells; a line of stars alone always is one."""
    return signs <= set("-+=*") and signs != {"*"} and not (signs == {"-"} and may_be_row)


def cells_of(text):
    """Return the digits of text, and _ for each of its empty cells."""
    return re.sub(f"[{re.escape(EMPTY)}]", "_", re.sub(r"[^1-9" + re.escape(EMPTY) + "]", "", text))


def check_givens(cells, n, number):
    """ValueError if a row, column or box of the puzzle holds a digit twice."""
    box = math.isqrt(n)
    units = {}
    for i, digit in enumerate(cells):
        row, column = divmod(i, n)
        for unit in (f"row {row + 1}", f"column {column + 1}",
                     f"the box of row {row // box * box + 1}, column {column // box * box + 1}"):
            check(digit == "_" or (unit, digit) not in units,
                  f"puzzle {number} has no answer: {unit} holds {digit} twice")
            units[unit, digit] = True
