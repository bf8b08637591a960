"""
Does a model that was fine-tuned on pairs use the prompt, and does it know where an answer ends?

    python data/dialogue/prepare.py
    python train.py --dataset=dialogue --init_from=pretrained_gpt_last --save_filename=dialogue
    python tests/benchmarks/dialogue.py                            # 15 minutes on two cores
    python tests/benchmarks/dialogue.py --path=Y --before=X --pairs=64 --picture=lengths.png

A twin is measured in the same way, but its values are exact, and it writes from left to right:

    python train.py --dataset=dialogue --init_from=twin --save_filename=dialogue_twin
    python tests/benchmarks/dialogue.py --path=dialogue_twin --before=twin

1. The bound of the answers of validation pairs, given their prompts, in nats per character of the
   answers: before the fine-tuning (the model gets the text of both, and so the length of the
   answer), after it, and after it with the prompts of other pairs.
2. How long the answers are that each order of writing writes, in characters: mean and standard
   deviation; the distance from the lengths of real answers (the largest difference of the two
   distribution functions, Kolmogorov and Smirnov's); the share of empty answers; and the share of
   answers with text after their first end. --picture needs matplotlib: pip install ".[picture]".
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import diffusion
from diffusion import estimate_nelbo, unmask
from lib.checkpoint import load_checkpoint, resolve_path
from lib.data import data_folder, load_data
from lib.device import autocast, pick_dtype
from lib.dialogue import ANSWER, END
from lib.llada import unmask_blocks
from lib.tokenizer import decode, encode
from lib.twin import estimate_nll, left_to_right
from main import PAGE, SHIPPED

SURE = dict(remasking="low_confidence", temperature=0.0)
SETTINGS = [  # name, arguments of unmask or, with block_length, of unmask_blocks
    ("spread apart, with revision: the default", PAGE),
    ("spread apart", dict(PAGE, revise=0.0)),
    ("random order", dict(PAGE, remasking="random", revise=0.0)),
    ("most confident first, 128 steps", dict(SURE, steps=128)),
    ("most confident first, 128 steps, temperature 0.8", dict(SURE, steps=128, temperature=0.8)),
    ("most confident first, blocks of 32, 128 steps", dict(SURE, steps=128, block_length=32)),
    ("most confident first, blocks of 8, 128 steps", dict(SURE, steps=128, block_length=8)),
    ("most confident first, but ends last, 128 steps", dict(SURE, steps=128,
                                                            remasking="ends last")),
]
OF_A_TWIN = [(f"left to right, temperature {t}", dict(temperature=t)) for t in (0.8, 1.0)]
written_in_diffusion = diffusion.writing_order


def order_with_ends_last(end):
    """Return writing_order with one more order: the most confident first, but the token end after
    all others, as LLaDA's generate can do (its flag confidence_eos_eot_inf)."""
    def writing_order(remasking, p, x0_p, noise):
        if remasking == "ends last":
            return x0_p - 2 * (p.argmax(dim=-1) == end).double()
        return written_in_diffusion(remasking, p, x0_p, noise)
    return writing_order


def windows_of(ids, record, count):
    """Return count records of ids (N,), spread evenly: (count, record)."""
    records = np.asarray(ids).reshape(-1, record)
    rows = np.linspace(0, len(records) - 1, count).astype(int)
    return torch.from_numpy(records[rows].astype(np.int64))


def texts_of(windows, vocab):
    """Return the (prompt, answer) of each record."""
    parts = [decode(row, vocab).partition(ANSWER) for row in windows.tolist()]
    return [(prompt.strip(END), answer.partition(END)[0]) for prompt, _, answer in parts]


def bound(model, windows, pairs, prompt_length):
    """Return the bound of the answers, per character, and its standard error over the passes; of a
    twin, the exact value, and its standard error over the pairs."""
    estimate = estimate_nll if model.config.causal else estimate_nelbo
    nats, se = estimate(model, windows, model.config.mask_id, prompt_length=prompt_length)
    scale = windows[:, prompt_length:].numel() / sum(len(answer) for _, answer in pairs)
    return nats * scale, se * scale


def bound_before(model, vocab, pairs):
    """The same of a model of plain text, which reads the prompt, an empty line and the answer. The
    standard error is over the pairs."""
    nats, estimate = [], estimate_nll if model.config.causal else estimate_nelbo
    for prompt, answer in pairs:
        x = torch.from_numpy(encode(f"{prompt}\n\n{answer}", vocab).astype(np.int64))[None]
        found, _ = estimate(model, x, len(vocab), prompt_length=len(prompt) + 2)
        nats.append(found * len(answer))
    n, nats = sum(len(answer) for _, answer in pairs), torch.tensor(nats)
    return nats.sum().item() / n, nats.std().item() * math.sqrt(len(nats)) / n


def write(model, windows, prompt_length, settings):
    """Return the answers (B, T) that the model writes to the prompts of windows."""
    x = windows.clone()
    x[:, prompt_length:] = model.config.mask_id
    generator = torch.Generator().manual_seed(1)
    sampler = (left_to_right if model.config.causal else
               unmask_blocks if "block_length" in settings else unmask)
    *_, x = sampler(model, x, model.config.mask_id, generator=generator, **settings)
    return x[:, prompt_length:]


def distance(a, b):
    """Return the largest difference of the distribution functions of two samples."""
    points = np.union1d(a, b)
    return max(abs(np.mean(a <= point) - np.mean(b <= point)) for point in points)


def draw(lengths, path):
    """lengths: {name: lengths of the answers}, of which the first is that of real answers."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for name, values in lengths.items():
        values = np.sort(values)
        ax.step([0, *values, 128], [0, *np.arange(1, len(values) + 1) / len(values), 1],
                where="post", label=name, lw=2.5 if name == "real answers" else 1.3,
                color="black" if name == "real answers" else None)
    ax.set(xlabel="characters of the answer", ylabel="share of answers that are at most so long",
           title="How long the answers are depends on the order of writing")
    ax.grid(alpha=0.2)
    fig.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    fig.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="dialogue", help="the fine-tuned model")
    parser.add_argument("--before", default=SHIPPED, help="the model that it was made from")
    parser.add_argument("--pairs", type=int, default=32, help="answers for each row of the lengths")
    parser.add_argument("--rows", default="", help="only the lengths, of rows whose name has this")
    parser.add_argument("--picture", help="draw the lengths to this file")
    args = parser.parse_args()
    model, vocab, info = load_checkpoint(resolve_path(args.path))
    before, plain_vocab, _ = load_checkpoint(resolve_path(args.before))
    data = load_data(data_folder("dialogue"), info["record"], vocab)
    dtype = pick_dtype("auto", torch.device("cpu"))
    print(f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {dtype}; fine-tuned in "
          f"{info['minutes']:.1f} minutes\n\n| | nats per character of the answer |\n|---|---|")
    windows = windows_of(data.val, info["record"], 256)
    pairs, others = texts_of(windows, vocab), windows.clone()
    others[:, :info["prompt"]] = windows[:, :info["prompt"]].roll(1, dims=0)
    bounds = {} if args.rows else {
        "before, with the length given": lambda: bound_before(before, plain_vocab, pairs[:64]),
        "after": lambda: bound(model, windows, pairs, info["prompt"]),
        "after, with the prompts of other pairs": lambda: bound(model, others, pairs,
                                                                info["prompt"])}
    for name, measure in bounds.items():
        with autocast(dtype, torch.device("cpu")):
            print("| {} | {:.3f} ± {:.3f} |".format(name, *measure()), flush=True)
    model.to(getattr(torch, dtype))
    diffusion.writing_order = order_with_ends_last(vocab.index(END))
    prompts = windows_of(data.val, info["record"], args.pairs)
    real = np.array([len(answer) for _, answer in pairs])
    lengths = {"real answers": real}
    print("\n| | characters | distance | empty | text after the end | seconds per answer |\n"
          f"|---|---|---|---|---|---|\n| real answers | {real.mean():.0f} ± {real.std():.0f} "
          "| | | | |", flush=True)
    all_settings = OF_A_TWIN if model.config.causal else SETTINGS
    for name, settings in [row for row in all_settings if args.rows in row[0]]:
        began = time.perf_counter()
        answers = [decode(row, vocab) for row in write(model, prompts, info["prompt"],
                                                       settings).tolist()]
        seconds = (time.perf_counter() - began) / len(answers)
        found = np.array([len(answer.partition(END)[0]) for answer in answers])
        after = np.mean([bool(answer.partition(END)[2].strip(END)) for answer in answers])
        lengths[name] = found
        print(f"| {name} | {found.mean():.0f} ± {found.std():.0f} | {distance(found, real):.2f} | "
              f"{np.mean(found == 0):.2f} | {after:.2f} | {seconds:.1f} |", flush=True)
    if args.picture:
        draw(lengths, args.picture)


if __name__ == "__main__":
    main()
