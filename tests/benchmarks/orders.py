"""
Which order of writing is best? The exact likelihood of real text under each order, in nats per
character, with no judge.

    python tests/benchmarks/orders.py                      # the shipped model, 128 windows
    python tests/benchmarks/orders.py --path=X --steps=64,16 --orders=random,dilated
    python tests/benchmarks/orders.py --windows=435 --steps=256 --orders="left to right"   # all
    python tests/benchmarks/orders.py --json=shipped.json --picture=assets/orders.png

Tiny Shakespeare must be prepared. Windows of 256 characters are spread over the validation text.
All orders see the same windows, so each difference from random order has a far smaller error than
the values themselves. --picture needs matplotlib: pip install ".[picture]". A device with a GPU
takes two minutes for everything, two CPU cores take hours: choose fewer windows there.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import data_folder, load_data
from lib.device import pick_device
from lib.evaluate import spread_windows
from lib.likelihood import exact_nll
from lib.llada import unmask_blocks

ORDERS = {  # what exact_nll is given
    "left to right": dict(sampler=partial(unmask_blocks, block_length=1)),
    "most confident first": dict(remasking="low_confidence"),
    "random": dict(remasking="random"),
    "spread apart (dilated)": dict(remasking="dilated"),
}


def measure(model, windows, order, steps, batch_size=64):
    """Return the exact NLL of every window, (W,), in nats per token."""
    generator = torch.Generator(windows.device).manual_seed(0)
    parts = tqdm(windows.split(batch_size), desc=f"{order}, {steps} steps", leave=False,
                 disable=None)
    return torch.cat([exact_nll(model, part, model.config.mask_id, steps, generator=generator,
                                **ORDERS[order]) for part in parts]).cpu()


def mean_and_error(x):
    return x.mean().item(), x.std().item() / math.sqrt(len(x))


def print_tables(found, orders, all_steps):
    """found: {(order, steps): (W,)}."""
    print("| order | " + " | ".join(f"{n} steps" for n in all_steps) + " |\n"
          + "|---" * (len(all_steps) + 1) + "|")
    for order in orders:
        cells = [f"{mean_and_error(found[order, n])[0]:.3f}" for n in all_steps]
        print(f"| {order} | {' | '.join(cells)} |")
    base = found.get(("random", all_steps[0]))
    if base is not None:
        print(f"\nThe difference from random order in {all_steps[0]} steps, with its error:\n")
        for order in orders:
            cells = ["{:+.3f} ± {:.3f}".format(*mean_and_error(found[order, n] - base))
                     for n in all_steps]
            print(f"| {order} | {' | '.join(cells)} |")


def draw(found, orders, all_steps, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for order, marker in zip(orders, "o^sX"):
        ax.plot([256 / n for n in all_steps],
                [found[order, n].mean().item() for n in all_steps], marker=marker, label=order)
    ax.set(xscale="log", xlabel="characters written at once",
           ylabel="exact negative log-likelihood of validation text,\nnats per character "
                  "(lower is better)",
           title="Characters that are written at once should stand apart")
    ax.set_xticks([256 / n for n in all_steps], [f"{256 // n}" for n in all_steps])
    ax.minorticks_off()
    ax.grid(alpha=0.2)
    ax.legend(frameon=False)
    fig.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="pretrained_gpt_last", help="the checkpoint")
    parser.add_argument("--windows", type=int, default=128, help="how many windows of 256")
    parser.add_argument("--steps", default="256,128,64,32,16,8", help="between commas")
    parser.add_argument("--orders", default=",".join(ORDERS), help="between commas")
    parser.add_argument("--json", help="write the value of every window to this file")
    parser.add_argument("--picture", help="draw the table to this file")
    args = parser.parse_args()
    device = pick_device()
    model, vocab, _ = load_checkpoint(resolve_path(args.path), device)
    val_data = load_data(data_folder("shakespeare_char"), 256, vocab).val
    windows = spread_windows(val_data, args.windows * 256, 256).to(device)
    orders, all_steps = args.orders.split(","), [int(n) for n in args.steps.split(",")]
    print(f"{time.strftime('%Y-%m-%d')}, {device}, float32, {args.path}, "
          f"{len(windows)} windows\n", flush=True)
    found = {(order, n): measure(model, windows, order, n) for n in all_steps for order in orders}
    print_tables(found, orders, all_steps)
    for order in orders:
        value, error = mean_and_error(found[order, all_steps[0]])
        print(f"\n{order}, {all_steps[0]} steps: {value:.4f} ± {error:.4f}", end="")
    print()
    if args.json:
        Path(args.json).write_text(json.dumps({f"{order}, {n}": values.tolist()
                                               for (order, n), values in found.items()}))
    if args.picture:
        draw(found, orders, all_steps, args.picture)


if __name__ == "__main__":
    main()
