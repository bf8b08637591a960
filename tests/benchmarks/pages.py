"""
Which settings of main.py write pages that read well, and how long does a page take?

    python tests/benchmarks/pages.py                               # the default page
    python tests/benchmarks/pages.py 16,0.8,0.3 64,0.8,0.3         # steps,temperature,revise
    python tests/benchmarks/pages.py 256,1,0,random                # ... and the order
    python tests/benchmarks/pages.py --seed=2 --pages=64 --path=X

Tiny Shakespeare must be prepared. Like main.py, every setting writes pages of one block that begin
at a line's start. metrics.py defines the two scores, and the first row is real text. To choose a
setting, search with one seed, and report the result of another. The seconds are the median of three
pages that are written one at a time: measure them on a quiet machine.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from metrics import DISTINCT, Metrics, cut

from diffusion import unmask
from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import data_folder, load_data
from lib.device import pick_dtype
from lib.tokenizer import decode
from main import PAGE, SHIPPED


def write(model, vocab, n, seed, **settings):
    """Return n pages of text, and the seconds that they took."""
    mask_id = model.config.mask_id
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((n, model.config.block_size), mask_id)
    x[:, 0] = vocab.index("\n")
    started = time.perf_counter()
    *_, page = unmask(model, x, mask_id, generator=generator, **settings)
    seconds = time.perf_counter() - started
    return [decode(row, vocab)[1:] for row in page.tolist()], seconds


def show(setting, scores, seconds):
    cells = ["{:.3f} ± {:.3f}".format(*scores[name]) for name in ("corpus words", DISTINCT)]
    print(f"| {setting} | {' | '.join(cells)} | {seconds} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "{steps},{temperature},{revise}".format(**PAGE)
    parser.add_argument("settings", nargs="*", default=[default], help="(default: %(default)s)")
    parser.add_argument("--path", default=SHIPPED)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pages", type=int, default=32, help="per setting, a multiple of 16")
    args = parser.parse_args()
    model, vocab, _ = load_checkpoint(resolve_path(args.path))
    dtype = pick_dtype("auto", torch.device("cpu"))
    model.to(getattr(torch, dtype))
    data = load_data(data_folder("shakespeare_char"), model.config.block_size, vocab)
    train_text, val_text = decode(data.train, vocab), decode(data.val, vocab)
    metrics = Metrics(None, vocab, train_text)
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {torch.__version__}, "
          f"{dtype}, {args.pages} pages, seed {args.seed}\n\n"
          "| steps, temperature, revise, order | words that exist | distinct 4-grams | seconds |"
          "\n|---|---|---|---|", flush=True)
    show("real validation text", metrics(cut(val_text, model.config.block_size - 1)), "")
    for setting in args.settings:
        steps, temperature, revise, *order = setting.split(",")
        settings = dict(steps=int(steps), temperature=float(temperature), revise=float(revise),
                        remasking=order[0] if order else PAGE["remasking"])
        seconds = [write(model, vocab, 1, args.seed + i, **settings)[1] for i in range(3)]
        pages = []
        for start in range(0, args.pages, 16):
            pages += write(model, vocab, 16, 1000 * args.seed + start, **settings)[0]
        show(", ".join(map(str, settings.values())), metrics(pages),
             f"{statistics.median(seconds):.1f}")


if __name__ == "__main__":
    main()
