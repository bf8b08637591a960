"""
Which settings of main.py write text most like real text, and how fast?

    python tests/benchmarks/sampling.py                                    # the shipped model; Tiny Shakespeare must be prepared
    python tests/benchmarks/sampling.py --path=X --twin=T --judge=J --pages=64 --picture=sampling.png

Twin and judge are those that claims.py trains. Every rule, at several temperatures and numbers of steps, beside two references:
LLaDA's rule at one token per step, with a full float32 forward pass each, and plain random order at the same number of steps. All
scores as in metrics.py; "off" is the largest distance, of the three, from what all of the validation text scores, as a share of it.
Speed is that of one page of 256 characters at a time, in the dtype that main.py picks. --picture needs matplotlib: pip install
".[picture]".
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
from main import SHIPPED  # noqa: E402
from metrics import Metrics, cut, draw, name_of, write  # noqa: E402
from model import load_checkpoint, pick_dtype, resolve_path  # noqa: E402
from train import TrainConfig, load_data  # noqa: E402

JUDGED, WORDS, DISTINCT = SCORES = ("judged nats", "corpus words", "distinct 4-grams")
RULES = {  # label: what unmask is given, and with which numbers of steps
    "random order": (dict(remasking="random", temperature=0.7), (32, 64)),
    "low confidence": (dict(remasking="low_confidence", temperature=1.0), (32, 64)),
    "dilated": (dict(remasking="dilated", temperature=0.8), (32,)),
    "second thoughts": (dict(remasking="random", temperature=1.0, remask=0.3), (32,)),
    "dilated, second thoughts": (dict(remasking="dilated", temperature=1.0, remask=0.3), (16, 32, 64, 256)),
    "dilated, fewer second thoughts": (dict(remasking="dilated", temperature=1.0, remask=0.2), (64,)),
}
TWIN = "autoregressive twin"


def measure(model, full, twin, metrics, chars, val_text, pages):
    """Write and score with every setting, and print each row as it comes. -> rows; the first two: real text, the reference."""
    T = model.config.block_size
    settings = [("real text", "real validation text", None, {}),
                ("reference", "LLaDA's rule, float32", full, dict(remasking="low_confidence", temperature=1.0, steps=T))]
    settings += [(label, name_of({**how, "steps": steps}), model, {**how, "steps": steps})
                 for label, (how, all_steps) in RULES.items() for steps in all_steps]
    settings += [(TWIN, f"the twin, temperature {t}, cached", twin, dict(temperature=t)) for t in (0.6, 0.7, 0.8, 0.9, 1.0)]
    rows = []
    print("| | passes | characters per pass | characters/s | x the reference | " + " | ".join(SCORES) + " | off |")
    print("|" + "---|" * 9)
    for label, name, writer, how in settings:
        row, cells = dict(label=label, name=name, how=how), [""] * 4
        if writer:
            _, seconds = write(writer, how, 3, 1)
            written = ["".join(chars[i] for i in page) for page in write(writer, how, pages, 16)[0]]
            row.update(passes=how.get("steps", T), speed=T / seconds, scores=metrics(written))
        else:
            row.update(scores=metrics(cut(val_text, T)))
        rows.append(row)
        row["off"] = max(abs(row["scores"][s][0] / rows[0]["scores"][s][0] - 1) for s in SCORES)
        if writer:
            cells = [row["passes"], f"{T / row['passes']:.0f}", f"{row['speed']:.0f}", f"{row['speed'] / rows[1]['speed']:.1f}"]
        cells += ["{:.3f} ± {:.3f}".format(*row["scores"][s]) for s in SCORES] + [f"{row['off']:.1%}"]
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |", flush=True)
    return rows


def compare(rows):
    """Beside random order at as many steps; the frontier; beside the twin at equal diversity."""
    ours = [row for row in rows if row["label"] in RULES]
    plain = {row["passes"]: row for row in ours if row["label"] == "random order"}
    print("\n| beside random order, temperature 0.7, at as many steps | " + " | ".join(SCORES) + " |\n|" + "---|" * 4)
    for row in ours:
        if row["label"] != "random order" and row["passes"] in plain:
            gains = [row["scores"][s][0] - plain[row["passes"]]["scores"][s][0] for s in SCORES]
            print(f"| {row['name']} | " + " | ".join(f"{gain:+.3f}" for gain in gains) + " |")

    print("\nThe frontier: no other setting has both a lower judged likelihood and more distinct 4-grams")
    points = [(row["scores"][DISTINCT][0], row["scores"][JUDGED][0], row["name"]) for row in ours]
    for distinct, judged, name in sorted(points):
        if not any(d > distinct and j < judged for d, j, _ in points):
            print(f"  {distinct:.3f} distinct, {judged:.3f} nats: {name}")

    print("\nBeside the cached twin at equal distinct 4-grams, one page at a time")
    twin = sorted((row["scores"][DISTINCT][0], row["scores"][JUDGED][0], row["speed"]) for row in rows if row["label"] == TWIN)
    distinct, judged, speed = map(np.array, zip(*twin))
    for (d, j, name), row in zip(points, ours):
        if distinct[0] <= d <= distinct[-1]:
            ratio, more = row["speed"] / np.interp(d, distinct, speed), j - np.interp(d, distinct, judged)
            print(f"  {ratio:.2f} x its characters/s, {more:+.3f} nats: {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=SHIPPED)
    parser.add_argument("--twin", default="claims_twin.pt")
    parser.add_argument("--judge", default="claims_judge.pt")
    parser.add_argument("--pages", type=int, default=32, help="pages per setting, a multiple of 16")
    parser.add_argument("--picture", help="draw likelihood against diversity to this file")
    args = parser.parse_args()
    (model, chars, _), (twin, _, _), (judge, _, _) = (load_checkpoint(resolve_path(p)) for p in (args.path, args.twin, args.judge))
    full, (dtype, why) = copy.deepcopy(model), pick_dtype("auto", torch.device("cpu"))
    model.to(dtype)
    twin.to(dtype)
    data = load_data(TrainConfig(block_size=model.config.block_size), chars)[:2]
    train_text, val_text = ("".join(chars[i] for i in ids.tolist()) for ids in data)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, {torch.__version__}, {dtype}"
          f" ({why})\n{args.pages} pages of {model.config.block_size} characters for each row but the first\n")
    rows = measure(model, full, twin, Metrics(judge, chars, train_text), chars, val_text, args.pages)
    compare(rows)
    if args.picture:
        groups = {}
        for row in rows[1:]:
            text = str(row["how"]["temperature"]) + (f", {row['passes']}" if row["label"] in RULES else "")
            point = (row["scores"][DISTINCT][0], row["scores"][JUDGED][0], text)
            groups.setdefault(row["label"], []).append(point)
        real = rows[0]["scores"]
        draw(groups, (real[DISTINCT][0], real[JUDGED][0]), args.picture, "at each point: temperature, forward passes")


if __name__ == "__main__":
    main()
