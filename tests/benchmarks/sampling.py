"""
Which settings of main.py write the text that is most like real text, and how fast are they?

    python tests/benchmarks/sampling.py    # the shipped model; Tiny Shakespeare must be prepared
    python tests/benchmarks/sampling.py --path=X --twin=T --judge=J --pages=64 --picture=X.png

claims.py trains the twin (the same network as an autoregressive GPT) and the judge. Every order of
writing, at several temperatures and numbers of steps, is compared with two references: LLaDA's
rule, which writes one token per step, in float32; and plain random order in as many steps.

metrics.py defines the scores. The deviation is the distance from the score of all of the validation
text, as a share of the latter, and of the three scores the largest. The speed is that of one page
of one block at a time, in the dtype that main.py picks. --picture needs matplotlib:
pip install ".[picture]".
"""

import argparse
import copy
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from metrics import DISTINCT, JUDGED, TITLES, Metrics, cut, draw, name_of, write

from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import data_folder, load_data
from lib.device import pick_dtype
from lib.tokenizer import decode
from main import PAGE, SHIPPED

SCORES = (JUDGED, "corpus words", DISTINCT)
RULES = [  # arguments of unmask, and numbers of steps
    (dict(remasking="random", temperature=0.6), (14, 32, 64)),
    (dict(remasking="random", temperature=1.0), (256,)),
    (dict(remasking="low_confidence", temperature=0.8), (14, 32, 64)),
    (dict(remasking="dilated", temperature=0.6), (14,)),
    (dict(remasking="random", temperature=0.65, revise=0.2), (14,)),
    (dict(remasking="dilated", temperature=0.65, revise=0.2), (10, 14, 20, 32, 64)),
    (PAGE, (14, 16, 32, 64)),
    (dict(remasking="dilated", temperature=1.0, revise=0.3), (32,)),
]
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)  # of the twin


def measure(model, full, twin, metrics, vocab, val_text, pages):
    """Write and score pages with every setting, and print each row when it is measured. Returns the
    rows, of which the first is real text and the second LLaDA's rule."""
    T = model.config.block_size
    llada = dict(remasking="low_confidence", temperature=1.0, steps=T)
    ours = [{**how, "steps": steps} for how, all_steps in RULES for steps in all_steps]
    settings = [("real validation text", None, {}), ("LLaDA's rule, float32", full, llada)]
    settings += [(name_of(how), model, how) for how in ours]
    settings += [(f"the twin, temperature {t}, cached", twin, dict(temperature=t))
                 for t in TEMPERATURES]
    rows = []
    print("| | steps | characters per step | characters/s | x the reference | "
          + " | ".join(SCORES) + " | deviation |\n|" + "---|" * 9)
    for name, writer, how in settings:
        row, cells = dict(name=name, writer=writer, how=how), [""] * 4
        if writer:
            _, seconds, steps = write(writer, how, 3, 1)
            written = [decode(page, vocab) for page in write(writer, how, pages, 16)[0]]
            row.update(steps=steps, speed=T / seconds, scores=metrics(written))
        else:
            row.update(scores=metrics(cut(val_text, T)))
        rows.append(row)
        row["deviation"] = max(abs(row["scores"][s][0] / rows[0]["scores"][s][0] - 1)
                               for s in SCORES)
        if writer:
            cells = [row["steps"], f"{T / row['steps']:.0f}", f"{row['speed']:.0f}",
                     f"{row['speed'] / rows[1]['speed']:.1f}"]
        cells += ["{:.3f} ± {:.3f}".format(*row["scores"][s]) for s in SCORES]
        cells += [f"{row['deviation']:.1%}"]
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |", flush=True)
    return rows


def compare(ours, twin):
    """Compare every setting with random order in as many steps, with all others, and with the twin
    at equal diversity."""
    plain = {row["steps"]: row for row in ours
             if row["how"]["remasking"] == "random" and "revise" not in row["how"]}
    print("\n| compared with random order in as many steps | " + " | ".join(SCORES)
          + " |\n|" + "---|" * 4)
    for row in ours:
        if row not in plain.values() and row["steps"] in plain:
            gains = [row["scores"][s][0] - plain[row["steps"]]["scores"][s][0] for s in SCORES]
            print(f"| {row['name']} | " + " | ".join(f"{gain:+.3f}" for gain in gains) + " |")

    print("\nThe frontier: no other setting has both fewer judged nats and more distinct 4-grams")
    points = [(row["scores"][DISTINCT][0], row["scores"][JUDGED][0], row["name"]) for row in ours]
    for distinct, judged, name in sorted(points):
        if not any(d > distinct and j < judged for d, j, _ in points):
            print(f"  {distinct:.3f} distinct, {judged:.3f} nats: {name}")

    print("\nCompared with the cached twin at equal distinct 4-grams, one page at a time")
    twin = sorted((row["scores"][DISTINCT][0], row["scores"][JUDGED][0], row["speed"])
                  for row in twin)
    distinct, judged, speed = map(np.array, zip(*twin))
    for (d, j, name), row in zip(points, ours):
        if distinct[0] <= d <= distinct[-1]:
            ratio = row["speed"] / np.interp(d, distinct, speed)
            more = j - np.interp(d, distinct, judged)
            print(f"  {ratio:.2f} x its characters/s, {more:+.3f} nats: {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=SHIPPED)
    parser.add_argument("--twin", default="claims_twin.pt")
    parser.add_argument("--judge", default="claims_judge.pt")
    parser.add_argument("--pages", type=int, default=32, help="per setting, a multiple of 16")
    parser.add_argument("--picture", help="draw likelihood against diversity to this file")
    args = parser.parse_args()
    (model, vocab, _), (twin, _, _), (judge, _, _) = (
        load_checkpoint(resolve_path(path)) for path in (args.path, args.twin, args.judge))
    full, dtype = copy.deepcopy(model), pick_dtype("auto", torch.device("cpu"))
    model.to(getattr(torch, dtype))
    twin.to(getattr(torch, dtype))
    T = model.config.block_size
    data = load_data(data_folder("shakespeare_char"), T, vocab)
    train_text, val_text = decode(data.train, vocab), decode(data.val, vocab)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, "
          f"{torch.__version__}, {dtype}\n"
          f"{args.pages} pages of {T} characters for each row but the first\n")
    rows = measure(model, full, twin, Metrics(judge, vocab, train_text), vocab, val_text,
                   args.pages)
    compare([row for row in rows if row["writer"] is model],
            [row for row in rows if row["writer"] is twin])
    if args.picture:
        points = [(row["name"], row["scores"][DISTINCT][0], row["scores"][JUDGED][0])
                  for row in rows]
        draw(points, args.picture, TITLES["sampling"])


if __name__ == "__main__":
    main()
