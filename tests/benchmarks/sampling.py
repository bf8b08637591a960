"""
Which settings of main.py write the text that is most like real text?

    python tests/benchmarks/sampling.py --judge=judge     # the shipped model
    python tests/benchmarks/sampling.py --path=X --judge=judge --pages=64 --picture=X.png

Tiny Shakespeare must be prepared, and claims.md says how to train the judge. Each row differs in
one setting from the default page of main.py. metrics.py defines the scores, which are those of the
first row for real text. The seconds are those of a page that is written alone. --picture needs
matplotlib: pip install ".[picture]".
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from metrics import DISTINCT, JUDGED, SCORES, TITLES, Metrics, cut, draw, write

from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import data_folder, load_data
from lib.device import pick_dtype
from lib.tokenizer import decode
from main import PAGE, SHIPPED

RULES = {
    "the default: 32 steps": PAGE,
    "14 steps": dict(PAGE, steps=14),
    "64 steps": dict(PAGE, steps=64),
    "without revision": dict(PAGE, revise=0.0),
    "random order, without revision": dict(PAGE, revise=0.0, remasking="random"),
    "most confident first, without revision": dict(PAGE, revise=0.0, remasking="low_confidence"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=SHIPPED)
    parser.add_argument("--judge", default="judge")
    parser.add_argument("--pages", type=int, default=32, help="per setting, a multiple of 16")
    parser.add_argument("--picture", help="draw two of the scores to this file")
    args = parser.parse_args()
    (model, vocab, _), (judge, _, _) = (load_checkpoint(resolve_path(path))
                                        for path in (args.path, args.judge))
    dtype = pick_dtype("auto", torch.device("cpu"))
    model.to(getattr(torch, dtype))
    data = load_data(data_folder("shakespeare_char"), model.config.block_size, vocab)
    metrics = Metrics(judge, vocab, decode(data.train, vocab))
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {torch.__version__}, "
          f"{dtype}, {args.pages} pages for each setting\n\n| | seconds per page | "
          + " | ".join(SCORES) + " |\n|" + "---|" * 5)
    points = []
    for name, how in {"real validation text": None, **RULES}.items():
        if how:
            pages = [decode(row, vocab) for row in write(model, how, args.pages, 16)[0]]
            seconds = f"{write(model, how, 3, 1)[1]:.1f}"
        else:
            pages, seconds = cut(decode(data.val, vocab), model.config.block_size), ""
        scores = metrics(pages)
        cells = ["{:.3f} ± {:.3f}".format(*scores[score]) for score in SCORES]
        print(f"| {name} | {seconds} | {' | '.join(cells)} |", flush=True)
        points.append((name, scores[DISTINCT][0], scores[JUDGED][0]))
    if args.picture:
        draw(points, args.picture, TITLES["sampling"])


if __name__ == "__main__":
    main()
