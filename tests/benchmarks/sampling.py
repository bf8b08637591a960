"""
Which settings of main.py write text most like real text?

    python tests/benchmarks/sampling.py                       # the shipped model; Tiny Shakespeare must be prepared
    python tests/benchmarks/sampling.py --path=X --pages=4

Two scores, for real validation text and for pages of each setting, in one run: the share of words that occur in the
training text (pages cut words at both ends; those are left out), and the share of 4-grams that differ from one another.
A setting is good if both are near those of real text: repetition raises the first and lowers the second.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from main import SHIPPED, unmask  # noqa: E402
from model import load_checkpoint, resolve_path  # noqa: E402
from train import TrainConfig, load_data  # noqa: E402

SETTINGS = [  # remasking, temperature, steps, block_length
    ("random", 1.0, 256, 256),
    ("random", 0.7, 256, 256),
    ("low_confidence", 1.0, 256, 256),
    ("low_confidence", 1.0, 256, 16),
    ("low_confidence", 1.3, 256, 16),
    ("low_confidence", 1.3, 128, 16),
    ("low_confidence", 1.3, 64, 16),
]


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=SHIPPED)
    parser.add_argument("--pages", type=int, default=8)
    args = parser.parse_args()
    model, chars, _ = load_checkpoint(resolve_path(args.path))
    T, mask_id = model.config.block_size, model.config.mask_id
    train_text, val_text = ("".join(chars[i] for i in ids.tolist()) for ids in load_data(TrainConfig(block_size=T), chars)[:2])
    known = set(words_of(train_text))

    def show(name, pages, seconds):
        words = [word for page in pages for word in words_of(page)[1:-1]]
        grams = [page[i:i + 4] for page in pages for i in range(len(page) - 3)]
        share = sum(word in known for word in words) / len(words)
        print(f"| {name} | {share:.2f} | {len(set(grams)) / len(grams):.2f} | {seconds} |", flush=True)

    print(f"{args.pages} pages of {T} characters, {torch.get_num_threads()} threads")
    print("| remasking | temperature | steps | block_length | words | distinct 4-grams | seconds |")
    stride = len(val_text) // args.pages
    show("real validation text | | | ", [val_text[i * stride:i * stride + T] for i in range(args.pages)], "")
    for remasking, temperature, steps, block_length in SETTINGS:
        x = torch.full((args.pages, T), mask_id)
        generator = torch.Generator().manual_seed(1)
        start = time.perf_counter()
        *_, x = unmask(model, x, mask_id, steps, temperature, remasking, block_length, generator=generator)
        pages = ["".join(chars[i] for i in row) for row in x.tolist()]
        show(f"{remasking} | {temperature} | {steps} | {block_length}", pages, f"{time.perf_counter() - start:.0f}")


if __name__ == "__main__":
    main()
