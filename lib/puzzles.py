"""
Puzzle files, for models that were trained on grids such as Sudokus.
"""

import math
import re
import unicodedata
from dataclasses import dataclass

from lib.common import check


@dataclass
class Puzzle:
    cells: str       # n * n characters, row by row; _ where a cell is empty
    one_line: bool   # how it was written, and how its answer is to be printed

    def to_page(self):
        """Return the record that a model was trained on: n lines and an empty line."""
        n = math.isqrt(len(self.cells))
        return re.sub("." * n, r"\g<0>\n", self.cells) + "\n"


def side_of(record):
    """Return the side of a Sudoku, 9 or 4, if records of so many tokens are such grids: lines of
    cells and an empty line. Else None."""
    return {91: 9, 21: 4}.get(record)


def read_puzzles(text, n):
    """Return the list of Puzzles that text holds: each is n lines of n cells, or a line of n * n
    cells, or a row of a CSV file of which a field is such a line. Frames, bars, rules, empty lines,
    headings and comments after # are skipped. ValueError if there is anything else, or if a puzzle
    has a digit twice in a row, column or box, or no empty cell."""
    puzzles, rows, form = [], [], (
        f"no puzzle in the form that is read: {n} lines of {n} cells, or {n * n} cells in a line; "
        "a cell is a digit, or . or 0 or _ where it is empty")
    for line in unicodedata.normalize("NFKC", text).split("\n"):
        line = re.sub("[|\u2500-\u257f]", "", line.split("#")[0])
        fields = (field.strip(" \"'") for field in re.split("[,;\t]", line))
        cells = cells_of(next((field for field in fields if len(field) == n * n), line), n)
        heading = re.search(r"[^\W\d_]", line) and len(re.findall("[0-9._]", line)) < n and not rows
        skipped = heading or re.fullmatch(r"[-+=*\s]*", line)
        check(len(cells) == n or len(cells) == n * n and not rows or skipped, form)
        if len(cells) in (n, n * n):
            rows.append(cells)
        if len("".join(rows)) == n * n:
            puzzles.append(Puzzle("".join(rows), one_line=len(rows) == 1))
            rows = []
    check(puzzles and not rows, form)
    for number, puzzle in enumerate(puzzles, 1):
        check("_" in puzzle.cells, f"puzzle {number} has no empty cell")
        twice = conflict(puzzle.cells, n)
        check(not twice, f"puzzle {number} has no answer: {twice}")
    return puzzles


def cells_of(text, n):
    """Return the cells of text, _ for the empty ones, or "" if it holds anything else. Spaces and
    commas separate; but in a line of at most n digits and spaces, the spaces are empty cells."""
    if re.fullmatch(f"[1-9 ]{{1,{n}}}", text) and text.strip():
        return text.ljust(n).replace(" ", "_")
    cells = re.sub(r"[\s,;\"']", "", text)
    return re.sub("[^1-9]", "_", cells) if re.fullmatch("[0-9._*?\u00b7]+", cells) else ""


def conflict(cells, n):
    """Return which row, column or box of n * n cells holds a digit twice, in words, or None."""
    box, seen = math.isqrt(n), set()
    for i, digit in enumerate(cells):
        row, column = divmod(i, n)
        for unit in (f"row {row + 1}", f"column {column + 1}",
                     f"the box of row {row // box * box + 1}, column {column // box * box + 1}"):
            if digit != "_" and (unit, digit) in seen:
                return f"{unit} holds {digit} twice"
            seen.add((unit, digit))
