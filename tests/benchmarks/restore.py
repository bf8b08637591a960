"""
How much of a damaged text does main.py restore? And what is it worth to estimate which characters
are missing (missing_rates in lib/rates.py)?

    python tests/benchmarks/restore.py                              # the shipped model
    python tests/benchmarks/restore.py --texts=40 --rows=vowels
    python tests/benchmarks/restore.py --rows="a gap of 20"         # or another number
    python tests/benchmarks/restore.py --path=X --dtype=bfloat16    # or any other flags of main.py

Texts of 1,024 characters are spread over the validation text of Tiny Shakespeare, which must be
prepared. Some of their characters are replaced by _, and main.py --infill fills the holes, with the
estimated rates and without them. The table shows what share of all holes is restored exactly, with
its standard error over the texts.
"""

import argparse
import io
import math
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import main as sampler
from lib.data import data_folder, load_data
from lib.tokenizer import decode

LENGTH = 1024
SETS = {"vowels": "aeiouAEIOU", "e": "eE", "spaces": " ", "punctuation": ".,;:!?'-"}
ROWS = (*SETS, "random 30 %", "a gap of 20")


def holes_of(row, text, generator):
    """Return (length of text,) bool: the characters that this row of the table takes out."""
    if row in SETS:
        return np.array([char in SETS[row] for char in text])
    if row.startswith("random"):
        return generator.random(len(text)) < int(row.split()[1]) / 100
    length = int(row.split()[-1])
    start = generator.integers(len(text) - length)
    return (np.arange(len(text)) >= start) & (np.arange(len(text)) < start + length)


def fill(text, flags):
    """Return what main.py --infill=text prints with these flags."""
    argv = ["main.py", f"--infill={text}", *flags]
    with (mock.patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()) as output,
          redirect_stderr(io.StringIO())):
        sampler.main()
    return output.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS),
                        help="of the table, between commas (default: %(default)s)")
    args, flags = parser.parse_known_args()
    data = load_data(data_folder("shakespeare_char"), LENGTH)
    corpus = decode(data.val, data.vocab)
    starts = np.linspace(0, len(corpus) - LENGTH, args.texts).astype(int)
    estimate, all_equal = sampler.missing_rates, lambda model, x, mask_id, _: torch.ones(mask_id)
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {args.texts} texts\n\n"
          "| missing | holes | restored without rates | with rates |\n" + "|---" * 4 + "|",
          flush=True)
    for row in args.rows.split(","):
        generator, right, holes = np.random.default_rng(0), {all_equal: [], estimate: []}, []
        for start in starts:
            text = np.array(list(corpus[start:start + LENGTH]))
            hole = holes_of(row, text, generator)
            holes.append(hole.sum())
            for rates, of_text in right.items():
                sampler.missing_rates = rates
                filled = fill("".join(np.where(hole, "_", text)), flags)
                of_text.append((np.array(list(filled[:LENGTH])) == text)[hole].sum())
        cells = []
        for of_text in right.values():
            share = sum(of_text) / sum(holes)
            deviations = np.array(of_text) - share * np.array(holes)
            se = math.sqrt(len(holes)) * deviations.std(ddof=1) / sum(holes)  # of a ratio
            cells.append(f"{share:.4f} ± {se:.4f}")
        print(f"| {row} | {sum(holes):,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
