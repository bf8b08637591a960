"""
Writing: load a checkpoint, make a page of masks, unmask it, print it. diffusion.py has the sampler.

    python main.py                                        # the shipped model writes a page
    python main.py --prompt="ROMEO:" --num_samples=3 --animate         # watch it in the terminal
    python main.py --infill="To be, or ______: that is the ________:"  # holes anywhere; or a file
    python main.py --gen_length=1000 --html=run.html      # a long page, and a replay of the run
    python main.py --steps=14                             # faster, and less readable
    python main.py --path=twin                            # what train.py --causal trained
    python main.py --score="To be, or not to be"          # how likely is this text?
    python main.py --path=dialogue                        # a model of pairs: a conversation

Only the text goes to stdout: python main.py > page.txt keeps just the text. Several pages are
separated by a form feed (\\f). The same in Python:

    import torch
    from diffusion import unmask
    from lib.checkpoint import load_checkpoint
    from lib.tokenizer import decode
    model, vocab, info = load_checkpoint("pretrained_gpt_last.pt")
    x = torch.full((1, 256), model.config.mask_id)
    *_, x = unmask(model, x, model.config.mask_id, steps=32, temperature=0.8, revise=0.3)
    print(decode(x[0].tolist(), vocab))
"""

import lib  # isort: skip  # noqa: F401  # before torch: see lib/__init__.py

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffusion import unmask
from lib.checkpoint import load_checkpoint, resolve_path
from lib.common import check, knob, one_line_errors, open_streams, parse_knobs, text_of
from lib.device import home_of, on_its_device, pick_device, pick_dtype
from lib.dialogue import ANSWER, END, at_terminal, converse
from lib.likelihood import score
from lib.llada import guided, unmask_blocks
from lib.pages import begin_word, generate_pages, make_page, page_windows
from lib.puzzles import side_of
from lib.rates import missing_rates, weighted
from lib.search import solve_puzzles
from lib.show import save_replay, shown, watch
from lib.twin import left_to_right

SHIPPED = Path(__file__).resolve().parent / "pretrained_gpt_last.pt"


# -----------------------------------------------------------------------------
# a page of text

def write_pages(config, model, vocab, info):
    """Write num_samples pages, with masks wherever text is wanted, print them, and return the text
    of the last one. info: that of the checkpoint."""
    mask_id, block_size = model.config.mask_id, model.config.block_size
    predictor = on_its_device(model)
    ids, hidden, new_word = make_page(config, vocab, model.config, info)
    x = torch.tensor([ids] * config.num_samples, device=home_of(model))   # (B, T)
    generator = torch.Generator(x.device).manual_seed(config.seed)
    if new_word:
        x = begin_word(predictor, x, model.config, vocab, config.temperature, generator)
    if config.infill is not None:
        predictor = weighted(predictor, missing_rates(predictor, x[0], mask_id, block_size))

    windows = page_windows(x[0] == mask_id, block_size)
    steps = config.steps * len(windows) if config.steps else int((x[0] == mask_id).sum())
    pages = generate_pages(lambda window: sample(config, model, predictor, window, generator),
                           x, mask_id, windows)
    states, summary = watch((page[:, hidden:] for page in pages), x[:, hidden:], steps, vocab,
                            mask_id, config)
    ends = ANSWER + END if info.get("prompt") and config.infill is None else ""
    for number, row in enumerate(states[-1].tolist(), 1):
        if config.num_samples > 1:
            print(f"--- {number} of {config.num_samples}", file=sys.stderr)
        text = shown(row, vocab, ends)
        end = "" if config.infill is not None and text.endswith("\n") else "\n"
        print("\f" if number > 1 else "", text, sep="", end=end, flush=True)
    print(summary, file=sys.stderr)
    if config.html:
        save_replay(config.html, states, mask_id, vocab)
    return text


def sample(config, model, predictor, x, generator):
    """Return an iterator of states that fills the masks of x (B, T). predictor: model, or a wrapper
    of it."""
    mask_id = model.config.mask_id
    if model.config.causal:
        return left_to_right(model, x, mask_id, config.temperature, generator)
    steps = config.steps or int((x[0] == mask_id).sum())
    settings = dict(temperature=config.temperature, remasking=config.remasking,
                    revise=config.revise, threshold=config.threshold, generator=generator)
    if config.cfg_scale:
        predictor = guided(predictor, x != mask_id, mask_id, config.cfg_scale)
    if config.block_length:
        return unmask_blocks(predictor, x, mask_id, steps, config.block_length, **settings)
    return unmask(predictor, x, mask_id, steps, **settings)


# -----------------------------------------------------------------------------
# the command line

def resolve(given, model, record):
    """Return the SampleConfig: flags that are given, {name: value}, count first, then the defaults
    of what is to be written (PAGE and so on). Its infill holds the text that the flag means.
    ValueError for flags that do not go together."""
    config, infilling = SampleConfig(**given), "infill" in given
    config.infill = text_of(config.infill) if infilling else None
    config.html = config.html and os.path.expanduser(config.html)
    check(len(config.mask_char) == 1, f"--mask_char={config.mask_char!r} is not one character")
    check(not infilling or not given.keys() & {"prompt", "gen_length"},
          "--infill goes with neither --prompt nor --gen_length: the page is its text")
    check(config.html is None or config.html.endswith(".html")
          and Path(config.html).resolve().parent.is_dir(),
          f"--html={config.html} must be the name of an .html file in a folder that exists")
    puzzle, defaults = infilling and side_of(record), PAGE
    check(puzzle or "tries" not in given, "--tries is for puzzles")
    of_unmask = [f"--{name}" for name in UNMASK if name in given]
    if model.config.causal:
        refused = sorted(({"infill", "threshold", *UNMASK} - {"temperature"}) & given.keys())
        check(not refused, f"{config.path} is causal and can't take --{' --'.join(refused)}")
        defaults = TWIN
    elif puzzle:
        check(not of_unmask or "tries" not in given,
              f"--tries does not go with {', '.join(of_unmask)}")
        defaults = INFILL if of_unmask else PUZZLE
    elif infilling:
        gaps = re.findall(f"{re.escape(config.mask_char)}+", config.infill)
        check(gaps, f"--infill={given['infill'][:60]!r} has no holes ({config.mask_char})")
        defaults = INFILL if max(map(len, gaps)) < 64 else PAGE  # a long gap is like a page
    return replace(config, **{name: defaults[name] for name in defaults.keys() - given.keys()})


def main():
    with one_line_errors("try fewer --num_samples or a smaller --gen_length"):
        given = parse_knobs(SampleConfig, __doc__, DEFAULTS)
        device = pick_device(given.get("device", "auto"))
        model, vocab, info = load_checkpoint(resolve_path(given.get("path", SHIPPED)), device)
        record = info.get("record", 1)
        config = resolve(given, model, record)
        if config.score is not None:
            print(score(model, vocab, text_of(config.score)), flush=True)
            return
        model.to(getattr(torch, pick_dtype(config.dtype, device)))
        if config.infill is not None and side_of(record):
            solve_puzzles(config, model, vocab, side_of(record), sample)
        elif info.get("prompt") and not given.keys() & {"prompt", "infill"} and at_terminal():
            converse(lambda text: write_pages(replace(config, prompt=text), model, vocab, info))
        else:
            write_pages(config, model, vocab, info)


# -----------------------------------------------------------------------------
# the flags

@dataclass
class SampleConfig:
    path: str = knob("", "checkpoint, X or X.pt; without it, the one that ships", "page")
    prompt: str = knob("", "text to continue, or - for standard input")
    gen_length: int = knob(None, "tokens to write; else a block is filled", low=1, high=10**6)
    infill: str = knob(None, "text with holes to fill, or a file, or - for standard input")
    mask_char: str = knob("_", "the character that marks a hole of one token")
    score: str = knob(None, "print how likely this text (or file, or -) is, and stop")
    num_samples: int = knob(1, "number of pages", low=1, high=10**6)
    seed: int = knob(1337, "same seed, device and dtype: same text", low=0, high=2**63 - 1)

    steps: int = knob(None, "forward passes for a block; with --infill, one for each hole if not "
                            "given", "sampler", low=1, high=10**6)
    temperature: float = knob(None, "0: the likeliest tokens; 1: the model's distribution", low=0)
    remasking: str = knob(None, "what is written first: random, dilated (places far apart) or "
                                "low_confidence (the most probable)")
    revise: float = knob(None, "share of the draft to mask again and rewrite", low=0, high=1)
    threshold: float = knob(1.0, "write also all that is more probable than this", low=0, high=1)
    tries: int = knob(None, "answers that the search for a puzzle's answer may try", low=1)
    block_length: int = knob(None, "finish this many tokens before the next ones", low=1)
    cfg_scale: float = knob(0.0, "guidance towards the given text", low=0, high=1000)

    animate: bool = knob(False, "show in the terminal how the first page is written", "watching")
    html: str = knob(None, "write a page that replays the run to this .html file")

    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps (untested)", "device")
    dtype: str = knob("auto", "to compute in: auto, float32, bfloat16 or float16")


# defaults that depend on what is written
PAGE = dict(steps=32, temperature=0.8, remasking="dilated", revise=0.3)
INFILL = dict(temperature=0.0, remasking="low_confidence", revise=0.0)
PUZZLE = dict(tries=64, threshold=0.999)
TWIN = dict(temperature=0.8)
DEFAULTS = (("of a page", PAGE), ("with --infill", INFILL), ("of puzzles", PUZZLE),
            ("of a twin", TWIN))
UNMASK = ("steps", "temperature", "remasking", "revise", "block_length", "cfg_scale")

if __name__ == "__main__":
    open_streams(encoding="utf-8")
    main()
