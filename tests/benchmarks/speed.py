"""
Is diffusion faster than a GPT of the same size? Seconds for pages of 256 characters: the default
page of main.py beside a twin that writes with its key/value cache.

    python tests/benchmarks/speed.py                             # the shipped size
    python tests/benchmarks/speed.py --path=X --twin=twin        # what train.py made

Without --twin, the twin is untrained: only its time counts. Both sides write in turn, in the same
dtype, and the median of --runs is reported, with the ratio of the two: above 1, diffusion is
faster. With --twin, text in float32 is scored, too (metrics.py; Tiny Shakespeare must be prepared).
Run it on a quiet machine.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from metrics import DISTINCT, WORDS, Metrics, write

from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import data_folder, load_data
from lib.device import pick_device
from lib.tokenizer import decode
from main import PAGE, SHIPPED, TWIN
from model import GPT


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=SHIPPED)
    parser.add_argument("--twin", help="a causal checkpoint of the same size")
    parser.add_argument("--batches", default="1,8", help="pages at once, between commas")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pages", type=int, default=32, help="to score, a multiple of 8")
    args = parser.parse_args()
    device = pick_device()
    model, vocab, _ = load_checkpoint(resolve_path(args.path), device)
    if args.twin:
        twin, _, _ = load_checkpoint(resolve_path(args.twin), device)
    else:
        twin = GPT(replace(model.config, causal=True)).to(device).eval()
    temperature = dict(temperature=TWIN["temperature"])
    sides = {"diffusion": (model, PAGE), "twin": (twin, temperature)}
    print(f"{time.strftime('%Y-%m-%d')}, {device}, {torch.get_num_threads()} threads, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters\n\n"
          "| dtype | pages at once | diffusion, seconds | twin, seconds | ratio |\n|"
          + "---|" * 5)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        twin.to(dtype)
        for batch in map(int, args.batches.split(",")):
            seconds = {name: [] for name in sides}
            for run in range(args.runs + 1):
                for name, (writer, how) in sides.items():
                    spent = write(writer, how, batch, batch)[1] * batch
                    seconds[name] += [spent] if run else []               # the first warms up
            ours, twins = (statistics.median(seconds[name]) for name in sides)
            print(f"| {str(dtype)[6:]} | {batch} | {ours:.2f} | {twins:.2f} | "
                  f"{twins / ours:.2f} |", flush=True)
    if args.twin:
        data = load_data(data_folder("shakespeare_char"), model.config.block_size, vocab)
        metrics = Metrics(None, vocab, decode(data.train, vocab))
        for name, (writer, how) in sides.items():
            pages = [decode(row, vocab) for row in write(writer, how, args.pages, 8)[0]]
            scores = metrics(pages)
            cells = [f"{score} {scores[score][0]:.3f} ± {scores[score][1]:.3f}"
                     for score in (WORDS, DISTINCT)]
            print(f"\n{name}: {', '.join(cells)}", end="")
        print()


if __name__ == "__main__":
    main()
