"""
What does diffusion change? The claims of the README are measured on a diffusion model and on its
twin, a GPT: the same network with a causal mask, trained by the same script on the same data.

    python tests/benchmarks/claims.py --minutes=20    # train diffusion, twin and a judge for 20
                                                      # minutes each, then measure
    python tests/benchmarks/claims.py                 # measure what an earlier run trained
    python tests/benchmarks/claims.py --diffusion=D --twin=T --judge=J --pages=64 \\
        --json=claims.json --picture=claims.png

Tiny Shakespeare must be prepared. The judge, which scores text that others write, is a GPT of
another seed and size. Each number comes with its standard error: of the bound over passes, of the
written text over groups of 8 pages (metrics.py), and otherwise over windows. Everything is printed
as tables and written to --json; --picture needs matplotlib: pip install ".[picture]".
"""

import argparse
import copy
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from metrics import DISTINCT, JUDGED, ROOT, TITLES, Metrics, cut, draw, name_of, write
from training import iteration, seconds, set_up

from diffusion import token_losses, unmask
from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import cut_windows, data_folder, load_data
from lib.device import autocast, choose_attention, pick_dtype
from lib.evaluate import measure
from lib.tokenizer import decode
from lib.twin import Cached, next_token_losses
from main import PAGE

CONTESTANT = ["--n_layer=4", "--n_head=4", "--n_embd=256"]
JUDGE = ["--causal", "--n_layer=5", "--n_head=5", "--n_embd=320", "--seed=4242"]
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)  # of the twin
DIFFUSION = [  # arguments of unmask
    dict(remasking="low_confidence", temperature=1.0, steps=64),
    dict(remasking="random", temperature=0.7, steps=64),
    dict(remasking="dilated", temperature=1.0, steps=32, revise=0.3),
    dict(remasking="dilated", temperature=0.8, steps=16, revise=0.3),
    dict(PAGE, steps=14),
    PAGE,
    dict(PAGE, steps=64),
]
HOLES = [("random", share) for share in (0.10, 0.25, 0.50, 0.75)]
HOLES += [("span", length) for length in (1, 2, 4, 8, 16, 32)]


def seconds_per_iteration(flags):
    """Measure a few iterations of train.py with these flags."""
    run, config, data = set_up(flags)
    device = run.model.wte.weight.device
    times = [seconds(lambda: iteration(run, config, data), device) for _ in range(12)]
    return float(np.median(times[2:]))


def train_all(args):
    for path, flags in ((args.diffusion, CONTESTANT), (args.twin, [*CONTESTANT, "--causal"]),
                        (args.judge, JUDGE)):
        iterations = max(1, int(60 * args.minutes / seconds_per_iteration(flags)))
        command = ["train.py", f"--save_filename={path}", *flags, f"--max_iters={iterations}",
                   f"--eval_interval={math.ceil(iterations / 12)}"]
        print("python", *command, flush=True)
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def likelihood(models, splits, text, context):
    """Measure the likelihood of both splits: for diffusion the bound, for the twin the exact
    value."""
    print("\n| | train nats | validation nats | validation bits |\n|---|---|---|---|")
    rows = {}
    for name, model in models.items():
        rows[name] = {split: measure(model, ids, text, 8, 64, context)
                      for split, ids in splits.items()}
        measured = "NLL" if model.config.causal else "NELBO"
        (t, t_se), (v, v_se) = rows[name]["train"], rows[name]["val"]
        print(f"| {name}: {measured} | {t:.4f} ± {t_se:.4f} | {v:.4f} ± {v_se:.4f} | "
              f"{v / math.log(2):.4f} |", flush=True)
    return rows


def writing(models, metrics, vocab, val_text, pages):
    """Measure the speed, quality and diversity of what both write, and score real text."""
    T = models["diffusion"].config.block_size
    rows = [dict(name="real validation text", **metrics(cut(val_text, T)))]
    settings = [("twin", dict(temperature=t), f"twin, temperature {t}") for t in TEMPERATURES]
    settings += [("diffusion", how, name_of(how)) for how in DIFFUSION]
    names = list(rows[0])[1:]
    print("\n| | s/page | s/page of 16 | " + " | ".join(names)
          + " |\n|" + "---|" * (len(names) + 3))
    for who, how, name in [(None, None, None), *settings]:
        if who:
            written, many, _ = write(models[who], how, pages, 16)
            _, one, _ = write(models[who], how, 2, 1)
            scores = metrics([decode(page, vocab) for page in written])
            rows.append(dict(name=name, who=who, one=one, many=many, **scores))
        row = rows[-1]
        times = f"{row['one']:.2f} | {row['many']:.2f}" if who else " | "
        scores = " | ".join(f"{row[n][0]:.3f} ± {row[n][1]:.3f}" for n in names)
        print(f"| {row['name']} | {times} | {scores} |", flush=True)
    compare(rows)
    return rows


def compare(rows):
    """Add to every row of diffusion how it compares with the twin at equal diversity and at equal
    likelihood."""
    twin = sorted((row[DISTINCT][0], row[JUDGED][0]) for row in rows if row.get("who") == "twin")
    distinct, judged = map(np.array, zip(*twin))

    def more(x, y, xs, ys):
        return y - np.interp(x, xs, ys) if xs[0] <= x <= xs[-1] else None

    print("\n| compared with the twin | judged nats minus the twin's, at equal distinct 4-grams | "
          "distinct 4-grams minus the twin's, at equal judged nats |\n|---|---|---|")
    for row in rows:
        if row.get("who") == "diffusion":
            d, j = row[DISTINCT][0], row[JUDGED][0]
            row["judged, beside the twin"] = more(d, j, distinct, judged)
            row["distinct, beside the twin"] = more(j, d, judged, distinct)
            cells = [f"{x:+.3f}" if x is not None else "out of the twin's range" for x in
                     (row["judged, beside the twin"], row["distinct, beside the twin"])]
            print(f"| {row['name']} | {cells[0]} | {cells[1]} |")


def hide(kind, size, W, L, g):
    """Return (W, L) bool, what is hidden in each window: a share of it at random, or one span."""
    rank = torch.rand(W, L, generator=g).argsort(1).argsort(1)
    if kind == "random":
        return rank < round(size * L)
    start = torch.randint(1, L - size + 1, (W, 1), generator=g)
    return (torch.arange(L) >= start) & (torch.arange(L) < start + size)


@torch.no_grad()
def missing(models, data, context, n_windows):
    """Measure the bits per hidden character, and the share of them that is restored exactly."""
    rows = []
    print("\n| hidden | diffusion, bits | twin, bits | diffusion, restored | twin, restored |\n"
          "|---|---|---|---|---|")
    for kind, size in HOLES:
        g = torch.Generator().manual_seed(0)
        W = n_windows if kind == "random" else 4 * n_windows
        L = models["diffusion"].config.block_size
        starts = np.linspace(0, len(data) - L, W).astype(int)
        x = torch.from_numpy(cut_windows(data, starts, L))
        hidden = hide(kind, size, W, L, g)
        n_hidden = hidden.sum(1)
        bits = dict(diffusion=diffusion_bits(models["diffusion"], x, hidden, context, g),
                    twin=twin_bits(models["twin"], x, hidden, context))
        filled = dict(diffusion=diffusion_fill(models["diffusion"], x, hidden),
                      twin=twin_fill(models["twin"], x, hidden))
        right = {name: ((page == x) & hidden).sum(1) / n_hidden for name, page in filled.items()}
        row = {f"{name} {what}": (v.mean().item(), v.std().item() / math.sqrt(W))
               for what, values in (("bits", bits), ("restored", right))
               for name, v in values.items()}
        name = f"{size:.0%} at random" if kind == "random" else f"a span of {size}"
        rows.append(dict(hidden=name, windows=W, **row))
        cells = " | ".join(f"{m:.3f} ± {se:.3f}" for m, se in row.values())
        print(f"| {name} | {cells} |", flush=True)
    return rows


def diffusion_bits(model, x, hidden, context, g, passes=8):
    """Return the bound of estimate_nelbo for the hidden characters alone, (W,) bits."""
    n_hidden, mask_id, bits = hidden.sum(1), model.config.mask_id, torch.zeros(len(x))
    for _ in range(passes):
        n = (torch.rand(len(x), generator=g) * n_hidden).long() + 1
        rank = torch.rand(x.shape, generator=g).masked_fill(~hidden, 2.0).argsort(1).argsort(1)
        mask = rank < n[:, None]
        with context:
            losses = token_losses(model, mask_id, x, torch.where(mask, mask_id, x))
        bits += (losses * mask).sum(1) / n / passes / math.log(2)
    return bits


def twin_bits(model, x, hidden, context):
    with context:
        losses = next_token_losses(model, model.config.mask_id, x)
    return (losses * hidden).sum(1) / hidden.sum(1) / math.log(2)


def diffusion_fill(model, x, hidden):
    page = torch.where(hidden, model.config.mask_id, x)
    *_, page = unmask(model, page, model.config.mask_id, steps=min(64, int(hidden.sum(1).max())),
                      temperature=0.0, remasking="low_confidence")
    return page


def twin_fill(model, x, hidden):
    """Fill one hidden character after the other, from left to right, with the likeliest one given
    the characters to its left."""
    W, L = x.shape
    mask_id, cached = model.config.mask_id, Cached(model, W, L)
    page = torch.cat([torch.full((W, 1), mask_id), x.masked_fill(hidden, mask_id)], dim=1)
    for i in range(L):
        best = cached(page[:, i:i + 1])[:, 0, :mask_id].argmax(1)
        page[:, i + 1] = torch.where(hidden[:, i], best, page[:, i + 1])
    return page[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", default="claims_diffusion.pt")
    parser.add_argument("--twin", default="claims_twin.pt")
    parser.add_argument("--judge", default="claims_judge.pt")
    parser.add_argument("--minutes", type=float, help="train the three first, for this long each")
    parser.add_argument("--pages", type=int, default=32, help="per setting, a multiple of 16")
    parser.add_argument("--windows", type=int, default=64,
                        help="windows with holes; four times as many for the spans")
    parser.add_argument("--json", default="claims.json")
    parser.add_argument("--picture", help="draw likelihood against diversity to this file")
    args = parser.parse_args()
    if args.minutes:
        train_all(args)
    (diffusion, vocab, d_info), (twin, _, t_info), (judge, judge_vocab, _) = (
        load_checkpoint(resolve_path(path)) for path in (args.diffusion, args.twin, args.judge))
    assert twin.config.causal and judge.config.causal and not diffusion.config.causal
    assert vocab == judge_vocab
    data = load_data(data_folder("shakespeare_char"), diffusion.config.block_size, vocab)
    train_data, val_data, device = data.train, data.val, torch.device("cpu")
    dtype = pick_dtype("auto", device)
    context = autocast(dtype, device)
    choose_attention(device)
    models = dict(diffusion=diffusion, twin=twin)
    result = dict(
        command=" ".join(["python tests/benchmarks/claims.py", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
        hardware=f"{platform.machine()}, {torch.get_num_threads()} threads, "
                 f"torch {torch.__version__}, {dtype}",
        trained={name: {key: info.get(key) for key in ("command", "minutes", "iteration")}
                 for name, info in (("diffusion", d_info), ("twin", t_info))})
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters; "
              f"{result['trained'][name]}")
    splits = dict(train=train_data[:len(val_data)], val=val_data)
    result["likelihood"] = likelihood(models, splits, data, context)
    torch.backends.cuda.enable_flash_sdp(True)  # main.py does without choose_attention
    fast = {name: copy.deepcopy(model).to(getattr(torch, dtype)) for name, model in models.items()}
    metrics = Metrics(judge, vocab, decode(train_data, vocab))
    result["writing"] = rows = writing(fast, metrics, vocab, decode(val_data, vocab), args.pages)
    result["missing"] = missing(models, val_data, context, args.windows)
    Path(args.json).write_text(json.dumps(result, indent=1, default=float))
    if args.picture:
        points = [(row["name"], row[DISTINCT][0], row[JUDGED][0]) for row in rows]
        draw(points, args.picture, TITLES["claims"])


if __name__ == "__main__":
    main()
