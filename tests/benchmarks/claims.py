"""
What does diffusion change? The claims of the README are measured on a diffusion model and on its
twin, a GPT: the same network with a causal mask, trained by the same script on the same data.

    python train.py --save_filename=X
    python train.py --causal --save_filename=twin
    python train.py --causal --save_filename=judge --n_layer=5 --n_head=5 --n_embd=320 \\
        --seed=4242 --max_iters=1000 --eval_interval=250
    python tests/benchmarks/claims.py --picture=assets/claims.png

Tiny Shakespeare must be prepared. The judge, which scores text that others write, is a GPT of
another seed and size. Each number comes with its standard error: of the bound over passes, of the
written text over groups of 8 pages (metrics.py), and otherwise over windows. --picture needs
matplotlib: pip install ".[picture]".
"""

import argparse
import copy
import math
import platform
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from metrics import DISTINCT, JUDGED, TITLES, WORDS, Metrics, cut, draw, write

from diffusion import token_losses, unmask
from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import cut_windows, data_folder, load_data
from lib.device import autocast, choose_attention, pick_dtype
from lib.evaluate import measure
from lib.pages import generate_pages, page_windows
from lib.tokenizer import decode
from lib.twin import Cached, left_to_right, next_token_losses
from main import PAGE

WRITERS = {  # whose settings, and arguments of unmask or left_to_right
    "the twin, temperature 0.8": ("twin", dict(temperature=0.8)),
    "the twin, temperature 1.0": ("twin", dict(temperature=1.0)),
    "diffusion, the default: 32 steps": ("diffusion", PAGE),
    "diffusion, 64 steps": ("diffusion", dict(PAGE, steps=64)),
}
HOLES = [("random", share) for share in (0.10, 0.50)]
HOLES += [("span", length) for length in (1, 8, 32)]


def likelihood(models, splits, text, context):
    """Measure the likelihood of both splits: for diffusion the bound, for the twin the exact
    value."""
    print("\n| | train nats | validation nats |\n|---|---|---|")
    for name, model in models.items():
        (t, t_se), (v, v_se) = (measure(model, ids, text, 8, 64, context)
                                for ids in (splits["train"], splits["val"]))
        measured = "NLL" if model.config.causal else "NELBO"
        print(f"| {name}: {measured} | {t:.4f} ± {t_se:.4f} | {v:.4f} ± {v_se:.4f} |", flush=True)


def writing(models, metrics, vocab, val_text, pages):
    """Score real text and what both write. Returns rows for the picture."""
    T, points = models["diffusion"].config.block_size, []
    for name, (who, how) in {"real validation text": (None, None), **WRITERS}.items():
        written = write(models[who], how, pages, 16)[0] if who else []
        scores = metrics([decode(page, vocab) for page in written] or cut(val_text, T))
        if not who:
            print("\n| | " + " | ".join(scores) + " |\n|" + "---|" * (len(scores) + 1))
        cells = " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in scores.values())
        print(f"| {name} | {cells} |", flush=True)
        points.append((name, scores[DISTINCT][0], scores[JUDGED][0]))
    return points


def long_text(models, metrics, vocab, length=1024, pages=16):
    """Score pages that are four times as long as a block, as main.py --gen_length writes them."""
    print(f"\n| pages of {length:,} characters | words that exist | distinct 4-grams |\n"
          "|---|---|---|")
    for name in ("the twin, temperature 0.8", "diffusion, the default: 32 steps"):
        who, how = WRITERS[name]
        model, generator = models[who], torch.Generator().manual_seed(1)
        mask_id = model.config.mask_id
        fill = partial(left_to_right if model.config.causal else unmask, model, mask_id=mask_id,
                       generator=generator, **how)
        x = torch.full((pages, length), mask_id)
        windows = page_windows(x[0] == mask_id, model.config.block_size)
        *_, x = generate_pages(fill, x, mask_id, windows)
        scores = metrics([decode(row, vocab) for row in x.tolist()])
        cells = " | ".join("{:.3f} ± {:.3f}".format(*scores[s]) for s in (WORDS, DISTINCT))
        print(f"| {name} | {cells} |", flush=True)


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
        cells = " | ".join(f"{m:.3f} ± {se:.3f}" for m, se in row.values())
        print(f"| {name} | {cells} |", flush=True)


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
    parser.add_argument("--diffusion", default="X")
    parser.add_argument("--twin", default="twin")
    parser.add_argument("--judge", default="judge")
    parser.add_argument("--pages", type=int, default=32, help="per setting, a multiple of 16")
    parser.add_argument("--windows", type=int, default=64,
                        help="windows with holes; four times as many for the spans")
    parser.add_argument("--picture", help="draw likelihood against diversity to this file")
    args = parser.parse_args()
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
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {dtype}\n")
    for model, info in ((diffusion, d_info), (twin, t_info)):
        print(f"{info['command']}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{info['minutes']:.1f} minutes, the best at iteration {info['iteration']:,}")
    splits = dict(train=train_data[:len(val_data)], val=val_data)
    likelihood(models, splits, data, context)
    torch.backends.cuda.enable_flash_sdp(True)  # main.py does without choose_attention
    fast = {name: copy.deepcopy(model).to(getattr(torch, dtype)) for name, model in models.items()}
    metrics = Metrics(judge, vocab, decode(train_data, vocab))
    points = writing(fast, metrics, vocab, decode(val_data, vocab), args.pages)
    long_text(fast, Metrics(None, vocab, decode(train_data, vocab)), vocab)
    missing(models, val_data, context, args.windows)
    if args.picture:
        draw(points, args.picture, TITLES["claims"])


if __name__ == "__main__":
    main()
