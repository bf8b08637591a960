"""
What does diffusion change? The claims, measured beside the autoregressive twin: the same network, script and data.

    python tests/benchmarks/claims.py --minutes=20     # train diffusion, twin and a judge for 20 minutes each, then measure
    python tests/benchmarks/claims.py                  # measure what an earlier run trained
    python tests/benchmarks/claims.py --diffusion=D --twin=T --judge=J --pages=64 --json=claims.json --picture=claims.png

Tiny Shakespeare must be prepared. The judge is a twin of another seed and size. Each number comes with its standard error: over
windows, or over groups of 8 pages (see metrics.py). Everything is printed as tables for the README and written to --json;
--picture needs matplotlib: pip install ".[picture]".
"""

import argparse
import copy
import json
import math
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from main import unmask  # noqa: E402
from metrics import Metrics, cut, draw, name_of, write  # noqa: E402
from model import GPT, GPTConfig, load_checkpoint, pick_device, pick_dtype, resolve_path  # noqa: E402

CONTESTANT = ["--n_layer=4", "--n_head=4", "--n_embd=256"]
JUDGE = ["--causal", "--n_layer=5", "--n_head=5", "--n_embd=320", "--seed=4242"]
TWIN = (0.6, 0.7, 0.8, 0.9, 1.0)  # temperatures
DIFFUSION = [  # unmask's arguments
    dict(remasking=remasking, temperature=temperature, steps=steps, block_length=block_length, remask=remask)
    for remasking, temperature, steps, block_length, remask in (
        ("low_confidence", 1.0, 64, None, 0), ("random", 0.7, 64, None, 0), ("random", 0.7, 32, None, 0),
        ("dilated", 1.0, 64, None, 0.2), ("dilated", 1.0, 32, None, 0.3), ("dilated", 0.8, 32, None, 0.3))
]
HOLES = [("random", share) for share in (0.10, 0.25, 0.50, 0.75)] + [("span", length) for length in (1, 2, 4, 8, 16, 32)]


def seconds_per_iteration(flags):
    """Of train.py with these flags, from a few iterations."""
    cfg, _ = train.parse_args(flags)
    device, _ = pick_device(cfg.device)
    data, _, chars = train.load_data(cfg)
    model = GPT(GPTConfig(cfg.block_size, len(chars) + 1, cfg.n_layer, cfg.n_head, cfg.n_embd, causal=cfg.causal)).to(device)
    optimizers, times = train.make_optimizers(model, cfg), []
    autocast = train.autocast_to(pick_dtype(cfg.dtype, device)[0], device)
    for i in range(12):
        start = time.perf_counter()
        train.accumulate_gradient(model, model.config.mask_id, cfg, train.get_batch(data, cfg, i, device), autocast)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def train_all(args):
    for path, flags in ((args.diffusion, CONTESTANT), (args.twin, [*CONTESTANT, "--causal"]), (args.judge, JUDGE)):
        iterations = int(60 * args.minutes / seconds_per_iteration(flags))
        command = ["train.py", f"--save_filename={path}", *flags, f"--max_iters={iterations}",
                   f"--eval_interval={math.ceil(iterations / 12)}"]
        print("python", *command, flush=True)
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def likelihood(models, splits, autocast):
    print("\n| | train nats | validation nats | validation bits |\n|---|---|---|---|")
    rows = {}
    for name, model in models.items():
        rows[name] = {split: train.measure(model, data, 8, autocast) for split, data in splits.items()}
        (measure, t, t_se), (_, v, v_se) = rows[name]["train"], rows[name]["val"]
        print(f"| {name}: {measure} | {t:.4f} ± {t_se:.4f} | {v:.4f} ± {v_se:.4f} | "
              f"{v / math.log(2):.4f} |", flush=True)
    return rows


def writing(models, metrics, chars, val_text, pages):
    """Speed, quality and diversity of what both write, and of real text."""
    T = models["diffusion"].config.block_size
    rows = [dict(name="real validation text", **metrics(cut(val_text, T)))]
    settings = [("twin", dict(temperature=t), f"twin, temperature {t}") for t in TWIN]
    settings += [("diffusion", how, name_of(how)) for how in DIFFUSION]
    names = list(rows[0])[1:]
    print("\n| | s/page | s/page of 16 | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 3))
    for who, how, name in [(None, None, None), *settings]:
        if who:
            model = models[who]
            written, many = write(model, how, pages, 16)
            _, one = write(model, how, 2, 1)
            rows.append(dict(name=name, who=who, one=one, many=many, **metrics(["".join(chars[i] for i in x) for x in written])))
        row = rows[-1]
        times = f"{row['one']:.2f} | {row['many']:.2f}" if who else " | "
        print(f"| {row['name']} | {times} | " + " | ".join(f"{row[n][0]:.3f} ± {row[n][1]:.3f}" for n in names) + " |", flush=True)

    twin = sorted((row["distinct 4-grams"][0], row["judged nats"][0]) for row in rows if row.get("who") == "twin")
    distinct, judged = map(np.array, zip(*twin))
    print("\n| beside the twin | judged nats, more than the twin's at equal distinct 4-grams | distinct 4-grams, more than the "
          "twin's at equal judged nats |\n|---|---|---|")
    for row in rows:
        if row.get("who") == "diffusion":
            d, j = row["distinct 4-grams"][0], row["judged nats"][0]
            row["judged, beside the twin"] = j - np.interp(d, distinct, judged) if distinct[0] <= d <= distinct[-1] else None
            row["distinct, beside the twin"] = d - np.interp(j, judged, distinct) if judged[0] <= j <= judged[-1] else None
            cells = [f"{x:+.3f}" if x is not None else "out of the twin's range" for x in
                     (row["judged, beside the twin"], row["distinct, beside the twin"])]
            print(f"| {row['name']} | {cells[0]} | {cells[1]} |")
    return rows


def hide(kind, size, W, L, g):
    """-> (W, L) bool, what is hidden in each window: a share of it at random, or one span."""
    rank = torch.rand(W, L, generator=g).argsort(1).argsort(1)
    if kind == "random":
        return rank < round(size * L)
    start = torch.randint(1, L - size + 1, (W, 1), generator=g)
    return (torch.arange(L) >= start) & (torch.arange(L) < start + size)


@torch.no_grad()
def missing(models, data, autocast, windows):
    """Bits per hidden character, and the share restored exactly."""
    diffusion, twin = models["diffusion"], models["twin"]
    L, mask_id, rows = diffusion.config.block_size, diffusion.config.mask_id, []
    print("\n| hidden | diffusion, bits | twin, bits | diffusion, restored | twin, restored |\n|---|---|---|---|---|")
    for kind, size in HOLES:
        g = torch.Generator().manual_seed(0)
        W = windows if kind == "random" else 4 * windows
        starts = torch.linspace(0, len(data) - L, W).long()
        x = train.gather(data, starts, L, "cpu")
        hidden = hide(kind, size, W, L, g)
        n_hidden = hidden.sum(1)
        bits = dict(diffusion=torch.zeros(W), twin=None)
        for _ in range(8):  # the exact-count bound, on the hidden characters alone
            n = (torch.rand(W, generator=g) * n_hidden).long() + 1
            rank = torch.rand(W, L, generator=g).masked_fill(~hidden, 2.0).argsort(1).argsort(1)
            mask = rank < n[:, None]
            with autocast:
                losses = train.token_losses(diffusion, torch.where(mask, mask_id, x), x, mask_id)
            bits["diffusion"] += (losses * mask).sum(1) / n / 8 / math.log(2)
        with autocast:
            bits["twin"] = (train.next_token_losses(twin, x, mask_id) * hidden).sum(1) / n_hidden / math.log(2)

        page, steps = torch.where(hidden, mask_id, x), min(64, int(n_hidden.max()))
        *_, filled = unmask(diffusion, page, mask_id, steps, 0.0, "low_confidence")
        shifted, cache = torch.cat([torch.full((W, 1), mask_id), page], dim=1), twin.make_cache(W, L)
        for i in range(L):  # the likeliest character, given what stands or was filled in to the left
            best = twin(shifted[:, i:i + 1], cache, i)[:, 0, :mask_id].argmax(1)
            shifted[:, i + 1] = torch.where(hidden[:, i], best, shifted[:, i + 1])
        right = {name: ((page == x) & hidden).sum(1) / n_hidden for name, page in (("diffusion", filled), ("twin", shifted[:, 1:]))}
        row = {f"{name} {what}": (v.mean().item(), v.std().item() / math.sqrt(W))
               for what, values in (("bits", bits), ("restored", right)) for name, v in values.items()}
        rows.append(dict(hidden=f"{size:.0%} at random" if kind == "random" else f"a span of {size}", windows=W, **row))
        print(f"| {rows[-1]['hidden']} | " + " | ".join(f"{m:.3f} ± {se:.3f}" for m, se in row.values()) + " |", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", default="claims_diffusion.pt")
    parser.add_argument("--twin", default="claims_twin.pt")
    parser.add_argument("--judge", default="claims_judge.pt")
    parser.add_argument("--minutes", type=float, help="train the three first, for this long each")
    parser.add_argument("--pages", type=int, default=32, help="pages per setting, a multiple of 16")
    parser.add_argument("--windows", type=int, default=64, help="windows with holes; four times as many for the spans")
    parser.add_argument("--json", default="claims.json")
    parser.add_argument("--picture", help="draw the frontier to this file")
    args = parser.parse_args()
    if args.minutes:
        train_all(args)
    (diffusion, chars, d_info), (twin, _, t_info), (judge, judge_chars, _) = (
        load_checkpoint(resolve_path(path)) for path in (args.diffusion, args.twin, args.judge))
    assert twin.config.causal and judge.config.causal and not diffusion.config.causal and chars == judge_chars
    cfg = train.TrainConfig(block_size=diffusion.config.block_size)
    train_data, val_data, _ = train.load_data(cfg, chars)
    train_text, val_text = ("".join(chars[i] for i in ids.tolist()) for ids in (train_data, val_data))
    dtype, _ = pick_dtype("auto", torch.device("cpu"))
    autocast = train.autocast_to(dtype, torch.device("cpu")) if dtype != torch.float32 else nullcontext()
    models = dict(diffusion=diffusion, twin=twin)
    result = dict(command=" ".join(["python tests/benchmarks/claims.py", *sys.argv[1:]]), date=time.strftime("%Y-%m-%d"),
                  hardware=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}",
                  trained={name: {k: info.get(k) for k in ("command", "minutes", "iteration")}
                           for name, info in (("diffusion", d_info), ("twin", t_info))})
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters; {result['trained'][name]}")
    result["likelihood"] = likelihood(models, dict(train=train_data[:len(val_data)], val=val_data), autocast)
    fast = {name: copy.deepcopy(model).to(dtype) for name, model in models.items()}  # as main.py writes
    result["writing"] = rows = writing(fast, Metrics(judge, chars, train_text), chars, val_text, args.pages)
    result["missing"] = missing(models, val_data, autocast, args.windows)
    Path(args.json).write_text(json.dumps(result, indent=1, default=float))
    if args.picture:
        groups = {}
        for row in rows[1:]:
            label = row["who"] if row["who"] == "twin" else row["name"].split(",")[0]
            text = row["name"].removeprefix(f"{label}, temperature ").split(" steps")[0]
            groups.setdefault(label, []).append((row["distinct 4-grams"][0], row["judged nats"][0], text))
        real = rows[0]
        draw(groups, (real["distinct 4-grams"][0], real["judged nats"][0]), args.picture, "at each point: temperature, steps")


if __name__ == "__main__":
    main()
