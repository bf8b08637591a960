"""
The reverse process: start from masks, unmask step by step, show text.

    python main.py                                        # the shipped model writes a page
    python main.py --prompt="ROMEO:" --num_samples=3 --animate         # watch it in the terminal
    python main.py --infill="To be, or ______: that is the ________:"  # holes anywhere; or a file
    python main.py --gen_length=1000 --html=run.html      # a long page, and a replay of the run
    python main.py --steps=64                             # slower, and more readable
    python main.py --path=twin                            # what train.py --causal trained

Only the text goes to stdout: python main.py > page.txt keeps just the text. Several pages are
separated by a form feed (\\f).
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (check, one_line_errors, open_streams, parse, regular_file, stop_signals,
                    write_atomically)
from model import load_checkpoint, pick_device, pick_dtype, resolve_path
from tokenizer import decode, encode

SHIPPED = Path(__file__).resolve().parent / "pretrained_gpt_last.pt"
TEMPLATE = Path(__file__).resolve().parent / "assets" / "replay.html"
REMASKING = ("random", "dilated", "low_confidence")
DEFAULTS = dict(temperature=0.65, remasking="dilated", revise=0.2, block_length=None, cfg_scale=0.0)
INFILL_DEFAULTS = dict(DEFAULTS, temperature=0.0, remasking="low_confidence", revise=0.0)
TWIN_DEFAULTS = dict(temperature=0.8)
PUZZLE_TRIES = 16           # for --infill, of a model of records
LARGEST = 10_000_000        # tokens of all pages together
ENOUGH_STEPS = 14           # forward passes for a window of the model's block_size


# -----------------------------------------------------------------------------
# the reverse process

@torch.no_grad()
def unmask(model, x, mask_id, steps, temperature=1.0, remasking="random", block_length=None,
           cfg_scale=0.0, revise=0.0, generator=None):
    """The reverse process (LLaDA, arXiv 2502.09992, algorithms 4 and 5): predict every masked
    token, keep some of the predictions, leave the rest masked, repeat. An iterator: yields a fresh
    (B, T) state whenever tokens were written or masked again; at the end no mask is left.

    model: any callable (B, T) long -> (B, T, vocab_size) logits.
    x (B, T) long: mask_id wherever text is wanted (after a prompt, in the middle of a sentence,
    everywhere). Nothing else is changed.
    steps: forward passes; fewer if there is nothing left to write.
    temperature: 0 is greedy, 1 samples from the model.
    remasking: which predictions to keep: random ones; random ones that are spread apart (dilated,
    after DUS, arXiv 2506.19037); the most probable ones (low_confidence: it remasks the others).
    block_length: write this many masks, from the left, before the next ones.
    cfg_scale > 0: classifier-free guidance towards the given tokens.
    revise > 0: half of the steps write a draft; each of the others masks a share of the text again,
    first this share, then less and less, and rewrites it (after ReMDM, arXiv 2503.00307).
    generator: a torch.Generator, or a list of one per row; then no row depends on the others, if
    all have equally many masks.
    ValueError for arguments that make no sense, or if the model's logits are no distribution."""
    check_arguments(x, steps, temperature, remasking, block_length, cfg_scale, revise, generator)
    given = x != mask_id                                                  # (B, T)
    order = writing_order(remasking, x, generator)                        # (B, T) in [0, 1)
    block = ((~given).cumsum(dim=1) - 1) // (block_length or x.shape[1])  # (B, T): 0, 1, ...
    p_written = torch.full(x.shape, torch.inf, dtype=torch.float64, device=x.device)
    for num_revised, num_transfer_tokens in schedule(~given, steps, block_length, revise):
        if num_revised is not None:
            x = torch.where(choose_revised(p_written, num_revised, generator), mask_id, x)
            yield x
        masked = x == mask_id                                             # (B, T), M of them
        logits = predict(model, x, mask_id, given, cfg_scale)             # (M, mask_id)
        drawn = sample(logits, masked.sum(dim=1).tolist(), temperature, generator)          # (M,)
        drawn_p = logits.softmax(dim=-1).gather(-1, drawn[:, None])[:, 0]                   # (M,)
        x0 = x.masked_scatter(masked, drawn)                              # (B, T)
        x0_p = torch.zeros_like(p_written).masked_scatter(masked, drawn_p)                  # (B, T)
        confidence = x0_p if remasking == "low_confidence" else order
        confidence = confidence - block                                   # an earlier block first
        confidence = torch.where(masked, confidence, -torch.inf)
        transfer_index = highest(confidence, num_transfer_tokens)         # (B, T) bool
        x = torch.where(transfer_index, x0, x)
        p_written = torch.where(transfer_index, x0_p, p_written)
        yield x


def check_arguments(x, steps, temperature, remasking, block_length, cfg_scale, revise, generator):
    check(steps >= 1, f"steps must be at least 1, not {steps}")
    check(0 <= temperature < torch.inf,
          f"temperature must be finite and at least 0, not {temperature}")
    check(remasking in REMASKING,
          f"remasking must be one of {', '.join(REMASKING)}, not {remasking}")
    check(block_length is None or block_length >= 1,
          f"block_length must be at least 1, not {block_length}")
    check(0 <= cfg_scale < torch.inf, f"cfg_scale must be finite and at least 0, not {cfg_scale}")
    check(0 <= revise <= 1, f"revise must be between 0 and 1, not {revise}")
    check(not isinstance(generator, list) or len(generator) == len(x),
          f"generators must be one per row, {len(x)}")


def predict(model, x, mask_id, given=None, cfg_scale=0.0):
    """The model's logits where x has masks, (M, mask_id) in float64. [MASK] is never an answer.
    With guidance, away from what the model says when the given tokens are masked, too."""
    masked = x == mask_id
    if cfg_scale:
        both = model(torch.cat([x, x.where(~given, mask_id)])).chunk(2)
        with_given, without = (logits[masked][:, :mask_id].double() for logits in both)
        logits = without + (cfg_scale + 1) * (with_given - without)
        logits = torch.where(with_given.isneginf(), with_given, logits)
    else:
        logits = model(x)[masked][:, :mask_id].double()
    check(logits.logsumexp(dim=-1).isfinite().all(),
          "the model's logits are no distribution: NaN, +inf, or -inf for every token")
    return logits


def uniform(counts, width, generator, device):
    """Draws in (0, 1), float64: counts[i] x width of them for row i of the batch. With a list of
    generators they come from generator[i] alone. -> (sum of counts, width)."""
    if isinstance(generator, list):
        return torch.cat([uniform([n], width, g, device) for n, g in zip(counts, generator)])
    source = generator.device if generator else device
    shape = sum(counts), width
    draws = torch.rand(shape, dtype=torch.float64, generator=generator, device=source)
    return draws.to(device).clamp_min(1e-300)


def gumbel(counts, width, generator, device):
    """Gumbel noise: the argmax of log p + noise is a sample of p. float32 would cut the noise off
    at the top, which lowers the temperature (arXiv 2409.02908)."""
    return -torch.log(-torch.log(uniform(counts, width, generator, device)))


def sample(logits, counts, temperature, generator):
    """logits (M, V), of which counts[i] are of row i of the batch -> (M,) tokens, ~ softmax(logits
    / temperature)."""
    if temperature:
        logits = logits + temperature * gumbel(counts, logits.shape[1], generator, logits.device)
    return logits.argmax(dim=-1)


def highest(score, count):
    """score (B, T), count (B, 1) -> (B, T) bool: True at the count highest scores of each row."""
    return score.argsort(dim=1, descending=True).argsort(dim=1) < count


def writing_order(remasking, x, generator):
    """A score for each position, (B, T) in [0, 1): higher is written earlier. It does not depend on
    the text; low_confidence does not use it."""
    B, T = x.shape
    if remasking == "dilated":  # multiples of the golden ratio, modulo 1: neighbours are far apart
        multiples = torch.arange(T, device=x.device) * ((math.sqrt(5) - 1) / 2)
        return (multiples + uniform([1] * B, 1, generator, x.device)) % 1
    return uniform([1] * B, T, generator, x.device)


def choose_revised(p_written, count, generator):
    """Choose count (B, 1) tokens per row to mask again. The others are drawn without replacement
    with weights p_written (B, T), the probability that each had when it was written (as in MaskGIT,
    arXiv 2202.04200), so improbable tokens tend to go. Given tokens have an infinite weight and
    always stay. -> (B, T) bool."""
    noise = gumbel([1] * len(p_written), p_written.shape[1], generator, p_written.device)
    return highest(-(p_written.log() + noise), count)


def schedule(masked, steps, block_length, revise):
    """For every forward pass: how many tokens to mask again before it (or None), and how many to
    write. masked (B, T) bool -> a list of pairs of (B, 1)."""
    n_masks = masked.sum(dim=1, keepdim=True)                             # (B, 1)
    longest = int(n_masks.max())
    draft = min((steps + 1) // 2 if revise else steps, longest)
    block_length = block_length or longest
    n_blocks = math.ceil(longest / block_length) if longest else 0
    passes, waiting = [], 0
    for i in range(n_blocks):
        # with fewer steps than blocks, a block without a step is written with the next that has one
        waiting = waiting + (n_masks - i * block_length).clamp(0, block_length)
        block_steps = draft * (i + 1) // n_blocks - draft * i // n_blocks
        for step in range(block_steps):  # evenly; the first steps take the remainder, as in LLaDA
            passes.append((None, waiting // block_steps + (step < waiting % block_steps)))
        waiting = 0 if block_steps else waiting
    if revise and longest:
        for left in range(steps - draft, 0, -1):
            count = (revise * left / (steps - draft) * n_masks).ceil()
            passes.append((count, count))
    return [(again, count) for again, count in passes if count.any()]


def unmask_until_sure(model, x, mask_id, steps, tries, temperature=0.0, sure=0.999, **settings):
    """unmask for puzzles, whose right answers are certain. If the certainty of a filled row is less
    than sure, a guess was probably wrong: the row is masked again and filled anew, until it is sure
    or has had so many tries. Its surest try is the answer. Later tries have temperature 3,
    so that their guesses differ; with low_confidence, what is certain is still written first. An
    iterator like unmask, which the settings go to."""
    masked = x == mask_id                                                 # (B, T)
    best, surest = x, torch.full((len(x),), -1.0, dtype=torch.float64, device=x.device)
    for attempt in range(tries):
        doubtful = surest < sure                                          # (B,)
        if not doubtful.any():
            break
        if attempt:
            x = torch.where(masked & doubtful[:, None], mask_id, best)
            yield x
            temperature = 3.0
        for x in unmask(model, x, mask_id, steps, temperature, **settings):
            yield x
        found = certainty(model, x, masked, mask_id)                      # (B,)
        best = torch.where((found > surest)[:, None], x, best)
        surest = torch.maximum(found, surest)
    yield best


@torch.no_grad()
def certainty(model, x, written, mask_id):
    """How sure the model is of what was written, (B, T) bool, in each row of x (B, T) long: mask a
    quarter of it at a time, and take the least probability that any token has when it is masked.
    -> (B,) float64, 1 if nothing was written."""
    p = torch.ones(x.shape, dtype=torch.float64, device=x.device)
    for quarter in range(4):
        masked = written & (written.cumsum(dim=1) % 4 == quarter)
        logits = predict(model, torch.where(masked, mask_id, x), mask_id)
        p[masked] = logits.softmax(dim=-1).gather(-1, x[masked][:, None])[:, 0]
    return p.amin(dim=1)


@torch.no_grad()
def missing_rates(model, x, mask_id, block_size):
    """Estimate for every token what share of its occurrences is missing from a text x (T,) long,
    which has mask_id where a token is missing: near 1 for vowels and near 0 for the rest, if the
    vowels were taken out. In training, the model sees tokens missing at random, at equal rates. If
    the rates differ, Bayes' rule makes the probability of a token in a hole, approximately, the
    model's p(token | what is left) times the token's rate, divided by the sum of these products.
    A model that does not know the kind of text misleads the estimate. -> (mask_id,) float64.

    Expectation maximization (Dempster et al., 1977): count every token in what is left and, as the
    model and the rates so far expect it, in the holes; compute the rates from the counts; repeat.
    """
    masked = x == mask_id                                                 # (T,), M of them
    logits = torch.cat([predict(model, part[None], mask_id)
                        for part in x.split(block_size) if (part == mask_id).any()])
    p = logits.softmax(dim=-1)                                            # (M, mask_id)
    left = x[~masked].bincount(minlength=mask_id)                         # (mask_id,)
    share = masked.double().sum() / (len(x) + 1)                          # less than 1
    rates = torch.ones_like(p[0])                                         # (mask_id,)
    for _ in range(10):
        weights = p * rates
        missing = (weights / weights.sum(dim=1, keepdim=True)).sum(dim=0)
        total = left + missing
        # The correlation between places with the same token: 0 if tokens are missing at random, 1
        # if all of a token is missing or none. Of a beta-binomial distribution, (missing - share *
        # total)**2 is on average share * (1 - share) * total * (1 + correlation * (total - 1)).
        # Here that total - 1 is simply total. At most 0.95, so that no token is ruled out.
        correlation = ((missing - share * total) ** 2).sum() / (share * (1 - share)) - len(x)
        correlation = (correlation / (total ** 2).sum()).clamp(0, 0.95)
        rates = (1 - correlation) * share + correlation * missing
        rates = rates / ((1 - correlation) + correlation * total)
    return rates


def weighted(model, rates):
    """-> a mask predictor whose probabilities are model's times rates (mask_id,), normalized."""
    log_rates = F.pad(rates.log(), (0, 1))                                # (vocab_size,)
    return lambda idx: model(idx) + log_rates


@torch.no_grad()
def left_to_right(model, x, mask_id, temperature=1.0, generator=None):
    """The twin's counterpart of unmask: one token per forward pass, each given those to its left,
    with a key/value cache. x (B, T) long holds a prompt, equally long in each row, and then
    mask_id. An iterator: yields a fresh (B, T) state after every step."""
    cache, done = model.make_cache(*x.shape), 0
    for i in range(int((x[0] != mask_id).sum()), x.shape[1]):
        shifted = F.pad(x, (1, 0), value=mask_id)             # what predicts position i stands at i
        logits = model(shifted[:, done:i + 1].to(cache.device), cache, done)
        x, done = x.clone(), i + 1
        logits = logits[:, -1, :mask_id].to(x.device).double()
        x[:, i] = sample(logits, [1] * len(x), temperature, generator)
        yield x


def page_windows(masked, block_size):
    """How to write a page of any length: a window slides along, with up to half of it before the
    first mask, and what is written in one window is context for the next. Where text follows a
    window, its last quarter is left to the next one, so that every mask is written with context on
    both sides. masked (T,) bool -> a list of (start, end, keep, n_masks): fill the n_masks masks of
    start to end, and keep what stands before keep."""
    masked, windows = masked.clone(), []
    while masked.any():
        start = max(0, min(int(masked.int().argmax()) - block_size // 2, len(masked) - block_size))
        end = min(start + block_size, len(masked))
        keep = end if masked[end:].all() else end - block_size // 4
        windows.append((start, end, keep, int(masked[start:end].sum())))
        masked[start:keep] = False
    return windows


def share_steps(windows, steps, enough):
    """-> the forward passes of each window: one per mask, but no more than enough, so that a window
    with few new masks is written as well as a full one. If steps is given, that many in all, in
    the same proportions, and at least one each."""
    wanted = [min(n_masks, enough) for *_, n_masks in windows]
    if steps is None or not wanted:
        return wanted
    ends = [steps * sum(wanted[:i]) // sum(wanted) for i in range(len(wanted) + 1)]
    return [max(1, end - begin) for begin, end in zip(ends, ends[1:])]


def generate_pages(fill, x, mask_id, windows, steps):
    """Write one window after the other. fill(window, steps) -> an iterator of states, such as
    unmask; x (B, T) long, masked at the same places in each row; windows of page_windows, steps of
    share_steps. Yields (B, T) states."""
    page = x
    for (start, end, keep, _), window_steps in zip(windows, steps):
        for state in fill(x[:, start:end], window_steps):
            x = torch.cat([x[:, :start], state, x[:, end:]], dim=1)
            yield x
        if (page[:, keep:end] == mask_id).any():
            x = torch.cat([x[:, :keep], page[:, keep:]], dim=1)
            yield x


# -----------------------------------------------------------------------------
# something to watch

@contextmanager
def own_screen():
    """The terminal's alternate screen, without a cursor and without wrapping; afterwards, whatever
    happens, the first one comes back."""
    try:
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[?7l")
        yield
    finally:
        sys.stdout.write("\x1b[?7h\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def frame(row, before, mask_id, chars, footer, width, height):
    """What the terminal shows of a page, in width x height: row and before, (T,) lists of ids now
    and a state ago; what has changed is highlighted. Of a page that is too tall: the lines around
    the first mask, or the last ones."""
    lines, column, first_mask = [""], 0, None
    for now, old in zip(row, before):
        for char in "░" if now == mask_id else chars[now]:
            if char == "\n" or column == width:
                lines.append("")
                column = 0
            if now == mask_id and first_mask is None:
                first_mask = len(lines) - 1
            if char != "\n":
                char = char if char.isprintable() else "·"
                style = "30;43" if now != old else "2" if now == mask_id else "0"
                lines[-1] += f"\x1b[{style}m{char}\x1b[0m"
                column += 1
    height = max(1, height - 2)  # an empty line and the footer
    top = len(lines) if first_mask is None else first_mask - height // 2
    top = max(0, min(top, len(lines) - height))
    shown = [*lines[top:top + height], "", f"\x1b[2m{footer}\x1b[0m"]
    return "\x1b[H" + "\r\n".join(line + "\x1b[K" for line in shown) + "\x1b[J"


def save_replay(path, states, mask_id, chars):
    """Write one self-contained page that replays a run: states, a list of (B, T) tensors."""
    states, chars = [state.cpu() for state in states], {**dict(enumerate(chars)), mask_id: None}
    start = [[chars[i] for i in row] for row in states[0].tolist()]
    changes = [[(b, i, chars[int(after[b, i])]) for b, i in (after != before).nonzero().tolist()]
               for before, after in zip(states, states[1:])]
    run = json.dumps(dict(start=start, changes=changes), separators=(",", ":"))
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{RUN}}", run.replace("<", "\\u003c"))
    write_atomically(path, html.encode())  # with no "<", no tag can begin in run


# -----------------------------------------------------------------------------
# the command line

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("page").add_argument
    add("--path", default=SHIPPED, help="checkpoint, X or X.pt (default: the one that ships)")
    add("--prompt", help="text to continue, or - for standard input (default: none; the page "
                         "begins at a line's start)")
    add("--gen_length", type=int, help="tokens (characters or word pieces) to write (default: "
                                       "fill the model's block)")
    add("--infill", help="text with holes, or - for standard input, or a file: a file of that "
                         "name exists, or the name is a word with an ending such as .txt "
                         "(default: none)")
    add("--mask_char", help="the character that marks a hole, one token each (default: _, and . "
                            "and 0 where the model does not know them)")
    add("--num_samples", type=int, default=1, help="number of pages (default: %(default)s)")
    add("--seed", type=int, default=1337,
        help="same seed, device and dtype: same text (default: %(default)s)")
    add = parser.add_argument_group(
        "sampler", "With --infill the defaults are a step per hole, --temperature=0,\n"
                   "--revise=0 and --remasking=low_confidence, and which characters are\n"
                   "missing is estimated first: in a text without vowels, the vowels.").add_argument
    add("--steps", type=int, help="forward passes: fewer are faster, more are more readable "
                                  f"(default: {ENOUGH_STEPS} for each window of the model's block)")
    add("--temperature", type=float, help="0: greedy (it repeats itself); 1: the model's "
                                          "distribution (default: 0.65; of a twin 0.8)")
    add("--revise", type=float, help="fraction of the text that the second half of the steps "
                                     "begins to rewrite, then less and less; 0 disables it "
                                     "(default: 0.2)")
    add("--remasking", choices=REMASKING, help="which predictions a step keeps: random, spread "
                                               "apart, or most confident (default: dilated)")
    add("--tries", type=int, help="for --infill: while the model is not sure of all that it wrote, "
                                  "fill the holes anew, with other guesses, at most so many times "
                                  f"in all (default: 1; of puzzles {PUZZLE_TRIES})")
    add("--block_length", type=int,
        help="finish this many tokens before the next ones (default: no blocks)")
    add("--cfg_scale", type=float,
        help="classifier-free guidance towards the given text; 0 disables it (default: 0)")
    add = parser.add_argument_group("watching").add_argument
    add("--animate", action="store_true",
        help="show the first page in the terminal while it is written (default: off)")
    add("--html", type=os.path.expanduser,
        help="write a page that replays the run to this file (default: none)")
    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto",
        help="auto, cpu, cuda, cuda:N or mps (untested) (default: %(default)s)")
    add("--dtype", default="auto",
        help="to compute in: auto, float32, bfloat16 or float16 (default: %(default)s)")
    return parse(parser)


def read_text(flag, value, files):
    """--prompt or --infill: - is standard input. With files, what names a file, or looks like the
    name of one (play.txt), is read from it. Anything else is the text itself."""
    path = os.path.expanduser(value)
    named = files and (os.path.exists(path) and not os.path.isdir(path)
                       or re.fullmatch(r"\S+\.[A-Za-z]\w*", value))
    if value != "-" and not named:
        return value
    try:
        data = sys.stdin.buffer.read() if value == "-" else regular_file(path).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")  # as prepare.py reads text
    except UnicodeDecodeError as e:
        raise ValueError(f"{flag}={value} is not UTF-8 text") from e


def make_page(args, chars, mask_id, block_size, record):
    """-> (the ids of the page, mask_id wherever text is wanted; how many of them not to show)."""
    gen_length = hidden = 0
    if args.infill is None:
        text, flag, holes = read_text("--prompt", args.prompt or "", files=False), "--prompt", ""
        if not text and "\n" in chars and record == 1:
            text, hidden = "\n", 1  # a page without a prompt begins at a line's start
    else:
        for name in ("prompt", "gen_length"):
            check(getattr(args, name) is None,
                  f"--infill and --{name} do not go together: the page is the text of --infill")
        text, flag = read_text("--infill", args.infill, files=True), "--infill"
        check(args.mask_char is None or len(args.mask_char) == 1,
              f"--mask_char must be one character, not {args.mask_char!r}")
        holes = args.mask_char or "_" + "".join(c for c in ".0" if c not in chars)
        check(set(holes) & set(text), f"--infill={args.infill[:60]!r} has no holes "
                                      f"({' or '.join(holes)}) to fill, or is no file")
        if record > 1:  # the empty line that ends a record may be missing
            text = text.rstrip("\n") + "\n" * min(2, -len(text.rstrip("\n")) % record)
            check(len(text) % record == 0, f"--infill has {len(text)} characters, and the model "
                                           f"was trained on records of {record}")
    try:
        ids = encode(text, chars, holes, mask_id).tolist()
    except ValueError as e:
        raise ValueError(f"{flag} has {e}") from e
    if args.infill is None:
        gen_length = args.gen_length
        if gen_length is None:
            gen_length = max(block_size - len(ids), block_size // 2)
        check(gen_length >= 1, f"--gen_length must be at least 1, not {gen_length}")
    check((len(ids) + gen_length) * args.num_samples <= LARGEST,
          f"{args.num_samples} x {len(ids) + gen_length} tokens are more than {LARGEST:,}: "
          "give a smaller --gen_length or fewer --num_samples")
    check(record == 1 or len(ids) + gen_length <= block_size,
          f"a page of records has at most {block_size} characters, not {len(ids) + gen_length}: "
          "give one at a time")
    return ids + [mask_id] * gen_length, hidden


def make_sampler(args, model, page, generator, windows, record):
    """-> fill and steps, for generate_pages."""
    chosen = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    config, steps = model.config, args.steps
    if config.causal:
        for flag in ("infill", "steps", "tries", *chosen):
            check(getattr(args, flag) is None or flag == "temperature",
                  f"--{flag} is for diffusion; {args.path} is causal and writes from left to right")
        settings = dict(TWIN_DEFAULTS, **chosen, generator=generator)
        return (lambda x, _: left_to_right(model, x, config.mask_id, **settings),
                share_steps(windows, None, config.block_size))
    infill = args.infill is not None
    settings = {**(INFILL_DEFAULTS if infill else DEFAULTS), **chosen, "generator": generator}
    check(steps is None or steps >= 1, f"--steps must be at least 1, not {steps}")
    steps = share_steps(windows, steps, config.block_size if infill else ENOUGH_STEPS)
    check(infill or args.tries is None, "--tries is for --infill")
    check(args.tries is None or args.tries >= 1, f"--tries must be at least 1, not {args.tries}")
    tries = args.tries or (PUZZLE_TRIES if infill and record > 1 else 1)
    if not settings["revise"]:
        steps = [min(n, n_masks) for n, (*_, n_masks) in zip(steps, windows)]

    def predictor(idx):  # the sampler's float64 stays off mps, which has none
        return model(idx.to(model.wte.weight.device)).to(idx.device)
    if infill and record == 1:  # the cells of a puzzle are missing at random
        rates = missing_rates(predictor, page, config.mask_id, config.block_size)
        predictor = weighted(predictor, rates)

    def fill(x, window_steps):
        if tries == 1:
            return unmask(predictor, x, config.mask_id, window_steps, **settings)
        return unmask_until_sure(predictor, x, config.mask_id, window_steps, tries, **settings)
    return fill, steps


def generate(args):
    device, _ = pick_device(args.device)
    model, chars, info = load_checkpoint(resolve_path(args.path), device)
    model.to(pick_dtype(args.dtype, device)[0])
    mask_id, block_size = model.config.mask_id, model.config.block_size
    check(args.num_samples >= 1, f"--num_samples must be at least 1, not {args.num_samples}")
    check(0 <= args.seed < 2**63, f"--seed must be in 0 to 2**63 - 1, not {args.seed}")
    if args.html is not None:
        check(args.html.endswith(".html") and Path(args.html).resolve().parent.is_dir(),
              f"--html={args.html} must be the name of an .html file in a folder that exists")
    record = info.get("record", 1)
    check(type(record) is int and record > 0, f"{args.path} has records of {record!r} characters")
    ids, hidden = make_page(args, chars, mask_id, block_size, record)
    device = torch.device("cpu") if device.type == "mps" else device
    x = torch.tensor([ids] * args.num_samples, device=device)            # (num_samples, T)
    stream = torch.Generator().manual_seed(args.seed)                    # of seeds, one per sample
    seeds = [int(torch.randint(2**63 - 1, (), generator=stream)) for _ in range(args.num_samples)]
    generator = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    windows = page_windows(x[0] == mask_id, block_size)
    started = time.perf_counter()
    fill, window_steps = make_sampler(args, model, x[0], generator, windows, record)
    steps = sum(window_steps)

    page, passes, animate = x[:, hidden:], 0, args.animate and sys.stdout.isatty()
    states = [page]
    bar = tqdm(total=steps, desc="unmasking", unit="step", leave=False, delay=0.1,
               disable=animate or None)  # None: unless stderr is a terminal
    with own_screen() if animate else nullcontext(), bar:
        if animate:
            show(page, page, mask_id, chars, f"step 0 of {steps}")
        for x in generate_pages(fill, x, mask_id, windows, window_steps):
            before, page = page, x[:, hidden:]
            if (page == mask_id).sum() < (before == mask_id).sum():  # else: masked again
                passes += 1
                bar.update()
            if animate:
                show(page, before, mask_id, chars, f"step {passes} of {max(steps, passes)}")
            if args.html:
                states.append(page)
        time.sleep(1.5 if animate else 0)
    texts = [decode(row, chars) for row in page.tolist()]
    seconds = time.perf_counter() - started
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {number} of {len(texts)}", file=sys.stderr)
        end = "" if args.infill and text.endswith("\n") else "\n"
        print("\f" if number > 1 else "", text, sep="", end=end, flush=True)
    if args.html:  # after the text: if this fails, the text is not lost
        save_replay(args.html, states, mask_id, chars)
    written = sum(map(len, texts)) - args.num_samples * len(decode(
        (i for i in ids[hidden:] if i != mask_id), chars))
    speed = "" if animate else f" in {seconds:.1f} s: {written / seconds:,.0f} characters/s"
    print(f"[{passes} steps, {written:,} characters{speed}; seed {args.seed}]",
          file=sys.stderr)


def show(x, before, mask_id, chars, footer):
    """A frame of the first page, long enough to see."""
    size = shutil.get_terminal_size()
    sys.stdout.write(frame(x[0].tolist(), before[0].tolist(), mask_id, chars, footer, *size))
    sys.stdout.flush()
    time.sleep(0.05)


def main():
    with one_line_errors("try fewer --num_samples or a smaller --gen_length"):
        generate(parse_args())


if __name__ == "__main__":
    open_streams(encoding="utf-8")
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)  # KeyboardInterrupt restores the screen
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # python main.py | head ends quietly
    main()
