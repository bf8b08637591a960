"""
Writing: load a checkpoint, make a page of masks, unmask it, show it. diffusion.py has the sampler.

    python main.py                                        # the shipped model writes a page
    python main.py --prompt="ROMEO:" --num_samples=3 --animate         # watch it in the terminal
    python main.py --infill="To be, or ______: that is the ________:"  # holes anywhere; or a file
    python main.py --gen_length=1000 --html=run.html      # a long page, and a replay of the run
    python main.py --steps=14                             # faster, and less readable
    python main.py --path=twin                            # what train.py --causal trained
    python main.py --score="To be, or not to be"          # how likely is this text?

Only the text goes to stdout: python main.py > page.txt keeps just the text. Several pages are
separated by a form feed (\\f).
"""

import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion import certainty, left_to_right, unmask, unmask_until_sure
from lib.checkpoint import load_checkpoint, resolve_path
from lib.common import (
    check,
    knob,
    one_line_errors,
    open_streams,
    parse_knobs,
    read_text,
    text_of,
    unify_line_ends,
)
from lib.device import home_of, on_its_device, pick_device, pick_dtype
from lib.pages import begin_word, generate_pages, page_windows, share_steps
from lib.puzzles import read_puzzles
from lib.rates import missing_rates, weighted
from lib.score import score
from lib.show import Watcher, save_replay
from lib.tokenizer import decode, encode

SHIPPED = Path(__file__).resolve().parent / "pretrained_gpt_last.pt"


@dataclass
class SampleConfig:
    path: str = knob("", "checkpoint, X or X.pt; without it, the one that ships", "page")
    prompt: str = knob(None, "text to continue, or - for standard input; without it, the page "
                             "begins at a line's start")
    gen_length: int = knob(None, "tokens (characters or word pieces) to write; without it, the "
                                 "model's block is filled")
    infill: str = knob(None, "text with holes, or - for standard input, or a file: a file of that "
                             "name exists, or the name ends like one, in .txt for example")
    mask_char: str = knob("_", "the character that marks a hole, one token each")
    score: str = knob(None, "print the likelihood of this text (or file, or -), and stop")
    num_samples: int = knob(1, "number of pages")
    seed: int = knob(1337, "same seed, device and dtype: same text")

    steps: int = knob(None, "forward passes: fewer are faster, more are more readable; with "
                            "--infill, one per hole if not given", "sampler")
    temperature: float = knob(None, "0: the likeliest tokens; 1: the model's distribution")
    remasking: str = knob(None, "which predictions a step keeps: random, dilated (spread apart) or "
                                "low_confidence (the most probable)")
    revise: float = knob(None, "a quarter of the steps write a draft; the others rewrite this "
                               "share of it, then less and less; 0 disables it")
    threshold: float = knob(None, "keep also all predictions more probable than this, in fewer "
                                  "steps")
    tries: int = knob(None, "for puzzles: while the model is not sure of its answer, replace a "
                            "guess, until this many answers were tried")
    block_length: int = knob(None, "finish this many tokens before the next ones")
    cfg_scale: float = knob(0.0, "classifier-free guidance towards the given text; 0 disables it")

    animate: bool = knob(False, "show the first page in the terminal while it is written",
                         "watching")
    html: str = knob(None, "write a page that replays the run to this .html file")

    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps (untested)", "device")
    dtype: str = knob("auto", "to compute in: auto, float32, bfloat16 or float16")


# flags that unmask takes, and their defaults
SAMPLER = ("temperature", "remasking", "revise", "threshold", "block_length", "cfg_scale")
PAGE = dict(steps=32, temperature=0.8, remasking="dilated", revise=0.3)
INFILL = dict(temperature=0.0, remasking="low_confidence", revise=0.0)
PUZZLE = dict(tries=64, threshold=0.999, sure=0.999)
TWIN = dict(temperature=0.8)
LONG_GAP = 64       # holes in a row from which --infill writes like a page


# -----------------------------------------------------------------------------
# a page of text

def write_pages(config, given, model, vocab, record):
    """Write num_samples pages: with a prompt, without one, or with holes to fill."""
    mask_id = model.config.mask_id
    ids, hidden, space = make_page(config, vocab, model.config, record)
    x = torch.tensor([ids] * config.num_samples, device=home_of(model))   # (num_samples, T)
    generator = torch.Generator(x.device).manual_seed(config.seed)
    started = time.perf_counter()
    given_text = decode([i for i in ids[hidden:] if i != mask_id], vocab)
    if space:
        temperature = given.get("temperature", PAGE["temperature"])
        x = begin_word(model, x, vocab, temperature, generator)
    windows = page_windows(x[0] == mask_id, model.config.block_size)
    fill, steps = make_sampler(config, given, model, x[0], windows, generator)
    with Watcher(x[:, hidden:], sum(steps), vocab, mask_id, config.animate) as watcher:
        for page in generate_pages(fill, x, mask_id, windows, steps):
            watcher.see(page[:, hidden:], keep_all=config.html)
    texts = [decode(row, vocab) for row in watcher.states[-1].tolist()]
    seconds = time.perf_counter() - started
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {number} of {len(texts)}", file=sys.stderr)
        end = "" if config.infill is not None and text.endswith("\n") else "\n"
        print("\f" if number > 1 else "", text, sep="", end=end, flush=True)
    if config.html:  # after the text: if this fails, the text is not lost
        save_replay(config.html, watcher.states, mask_id, vocab)
    written = sum(map(len, texts)) - len(texts) * len(given_text)
    speed = "" if watcher.animate else f" in {seconds:.1f} s: {written / seconds:,.0f} characters/s"
    print(f"[{watcher.passes} steps, {written:,} characters{speed}; seed {config.seed}]",
          file=sys.stderr)


def make_page(config, vocab, model_config, record):
    """Return the ids of the page, mask_id wherever text is wanted; how many of them not to show;
    and whether the first token to write must begin with a space."""
    hidden, gen_length, space = 0, 0, False
    if config.infill is not None:
        flag, text, holes = "--infill", text_of(config.infill), config.mask_char
        check(holes in text, f"--infill={config.infill[:60]!r} has no holes ({holes}) to fill, or "
                             "is no file")
    else:
        flag, holes = "--prompt", ""
        text = read_text("-") if config.prompt == "-" else unify_line_ends(config.prompt or "")
        space = text.endswith(" ") and any(len(token) > 1 for token in vocab)
        text = text[:-1] if space else text  # word pieces begin with their space
        if not text and "\n" in vocab and record == 1:
            text, hidden = "\n", 1  # a page without a prompt begins at a line's start
    try:
        ids = encode(text, vocab, holes, model_config.mask_id).tolist()
    except ValueError as e:
        raise ValueError(f"{flag} has {e}{hint(text, flag)}") from e
    if config.infill is None:
        gen_length = config.gen_length
        if gen_length is None:
            gen_length = max(model_config.block_size - len(ids), model_config.block_size // 2)
        check(gen_length >= 1, f"--gen_length must be at least 1, not {gen_length}")
    length = len(ids) + gen_length
    check(length * config.num_samples <= 10_000_000,
          f"{config.num_samples} x {length} tokens are more than 10,000,000: give a smaller "
          "--gen_length or fewer --num_samples")
    check(record == 1 or length <= model_config.block_size,
          f"this model writes {model_config.block_size} characters at most, not {length}")
    check(record == 1 or config.infill is None or length % record == 0,
          f"--infill has {length} characters, and this model was trained on records of {record}")
    return ids + [model_config.mask_id] * gen_length, hidden, space


def hint(text, flag):
    """Guess why a text has unknown characters."""
    if "\\n" in text:
        return f". For line ends, pipe the text in: printf 'ROMEO:\\n' | python main.py {flag}=-"
    if re.fullmatch(r"[\d_.*?|\s+-]+", text):
        return ". To solve a puzzle, name a model that was trained on puzzles: --path=sudoku"
    return ""


def make_sampler(config, given, model, page, windows, generator):
    """Return the sampler of a window, fill(x, steps), and the steps of each window. page (T,)."""
    model_config, mask_id = model.config, model.config.mask_id
    chosen = {name: given[name] for name in SAMPLER if name in given}
    if model_config.causal:
        settings = {**TWIN, **chosen, "generator": generator}
        return (lambda x, _: left_to_right(model, x, mask_id, **settings),
                share_steps(windows, None, model_config.block_size))
    check("tries" not in given, "--tries is for puzzles")
    gaps = "".join("_" if i == mask_id else " " for i in page.tolist()).split()
    short = config.infill is not None and max(map(len, gaps)) < LONG_GAP
    settings = {**(INFILL if short else PAGE), **chosen, "generator": generator}
    enough = settings.pop("steps", model_config.block_size)
    steps = share_steps(windows, config.steps, enough)
    if not settings["revise"]:
        steps = [min(n, n_masks) for n, (*_, n_masks) in zip(steps, windows)]
    if short and not settings["temperature"] and config.num_samples > 1:
        print(f"the {config.num_samples} texts will be equal: give a --temperature above 0 for "
              "different ones", file=sys.stderr)
    predictor = on_its_device(model)
    if config.infill is not None:
        rates = missing_rates(predictor, page, mask_id, model_config.block_size)
        predictor = weighted(predictor, rates)
    return lambda x, n_steps: unmask(predictor, x, mask_id, n_steps, **settings), steps


# -----------------------------------------------------------------------------
# puzzles

def solve_puzzles(config, given, model, vocab, n):
    """Solve the puzzles of --infill, n x n cells each, one after the other: by a search or, if
    steps or flags of unmask alone are given, by one run of unmask."""
    mask_id, tries = model.config.mask_id, PUZZLE["tries"] if config.tries is None else config.tries
    chosen = {name: given[name] for name in ("steps", *SAMPLER) if name in given}
    of_unmask = [f"--{name}" for name in chosen if name != "threshold"]
    search = not of_unmask
    check(tries >= 1, f"--tries must be at least 1, not {tries}")
    check(search or config.tries is None, f"--tries does not go with {', '.join(of_unmask)}")
    puzzles = read_puzzles(text_of(config.infill), n)
    check(len(puzzles) == 1 or not config.html, "--html is for a single puzzle")
    generator = torch.Generator(home_of(model)).manual_seed(config.seed)
    predictor = on_its_device(model)
    for puzzle in puzzles:
        ids = encode(puzzle.to_page(), vocab, "_", mask_id).tolist()
        x = torch.tensor([ids], device=generator.device)                  # (1, T)
        empty = x == mask_id
        if search:
            settings = {**PUZZLE, **chosen, "tries": tries}
            states = unmask_until_sure(predictor, x, mask_id, **settings)
        else:
            settings = {"steps": int(empty.sum()), **INFILL, **chosen, "generator": generator}
            states = unmask(predictor, x, mask_id, **settings)
        with Watcher(x, int(empty.sum()), vocab, mask_id, config.animate) as watcher:
            for page in states:
                watcher.see(page, keep_all=config.html)
        text = decode(page[0].tolist(), vocab)
        print(text.replace("\n", "") + "\n" if puzzle.one_line else text, end="", flush=True)
        if certainty(predictor, page, empty, mask_id).item() < PUZZLE["sure"]:
            print(f"not sure of this answer ({tries if search else 1} tries)", file=sys.stderr)
        print(f"[{watcher.passes} steps; seed {config.seed}]", file=sys.stderr)
        if config.html:
            save_replay(config.html, watcher.states, mask_id, vocab)


# -----------------------------------------------------------------------------
# the command line

def run(config, given):
    check(config.num_samples >= 1, f"--num_samples must be at least 1, not {config.num_samples}")
    check(0 <= config.seed < 2**63, f"--seed must be in 0 to 2**63 - 1, not {config.seed}")
    check(len(config.mask_char) == 1, f"--mask_char must be one character, not "
                                      f"{config.mask_char!r}")
    check(config.html is None or config.html.endswith(".html")
          and Path(config.html).resolve().parent.is_dir(),
          f"--html={config.html} must be the name of an .html file in a folder that exists")
    check(config.steps is None or config.steps >= 1, f"--steps must be at least 1, not "
                                                     f"{config.steps}")
    for name in ("prompt", "gen_length"):
        check(config.infill is None or name not in given,
              f"--infill and --{name} do not go together: the page is the text of --infill")
    device, _ = pick_device(config.device)
    model, vocab, info = load_checkpoint(resolve_path(config.path or SHIPPED), device)
    model.to(pick_dtype(config.dtype, device)[0])
    for flag in ("infill", "steps", "tries", *SAMPLER):
        check(not model.config.causal or flag not in given or flag == "temperature",
              f"--{flag} is for diffusion; {config.path} is causal and writes from left to right")
    record = info.get("record", 1)
    check(type(record) is int and record > 0, f"{config.path} has records of {record!r} characters")
    n = math.isqrt(record)  # a grid of n lines of n cells is a record of n * (n + 1) + 1 tokens
    if config.score is not None:
        print(score(model, vocab, text_of(config.score)), flush=True)
    elif config.infill is not None and n > 1 and record == n * (n + 1) + 1:
        solve_puzzles(config, given, model, vocab, n)
    else:
        write_pages(config, given, model, vocab, record)


def main():
    with one_line_errors("try fewer --num_samples or a smaller --gen_length"):
        given = parse_knobs(SampleConfig, __doc__, [
            ("of a page", PAGE), ("with --infill", INFILL), ("of puzzles", PUZZLE),
            ("of a twin", TWIN)])
        run(SampleConfig(**given), given)


if __name__ == "__main__":
    open_streams(encoding="utf-8")
    main()
