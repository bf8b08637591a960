"""
The reverse process: start from masks, unmask step by step, show text.

    python main.py                                        # the shipped model writes a page of Shakespeare
    python main.py --prompt="ROMEO:" --num_samples=3 --animate             # watch it in the terminal
    python main.py --infill="To be, or ______: that is the ________:"      # holes anywhere; from a file or - as well
    python main.py --gen_length=2000 --html=run.html      # longer than the model's block; a page that replays the run
    python main.py --remasking=random --remask=0 --steps=256               # the model's own distribution, exactly
    python main.py --path=twin                            # a model of train.py --causal writes from left to right

The text goes to stdout and nothing else does: python main.py > page.txt keeps just the text.
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
from tqdm import tqdm

from model import fail, load_checkpoint, pick_device, pick_dtype, resolve_path, write_atomically

SHIPPED = Path(__file__).resolve().parent / "pretrained_gpt_last.pt"
REMASKING = ("random", "dilated", "low_confidence")
TEMPLATE = Path(__file__).resolve().parent / "assets" / "replay.html"


# -----------------------------------------------------------------------------
# the reverse process

def uniform(shape, generator):
    """Draws in (0, 1) in float64. With a list of generators, row i's come from generator[i] alone."""
    if isinstance(generator, list):
        draws = torch.stack([torch.rand(shape[1:], dtype=torch.float64, generator=g) for g in generator])
    else:
        draws = torch.rand(shape, dtype=torch.float64, generator=generator)
    return draws.clamp_min(1e-300)


def gumbel(shape, generator):
    """Gumbel noise: the argmax of log p + noise is a sample of p. In float64: in float32 the noise is cut off at the top,
    which lowers the temperature (arXiv 2409.02908)."""
    return -torch.log(-torch.log(uniform(shape, generator)))


def sample(logits, temperature, generator):
    """logits (B, T, V) -> (B, T) tokens, ~ softmax(logits / temperature)."""
    if not 0 <= temperature < torch.inf:
        raise ValueError(f"temperature must be finite and at least 0, not {temperature}")
    return (logits.double() + temperature * gumbel(logits.shape, generator).to(logits.device)).argmax(dim=-1)


def highest(score, count):
    """score (B, T), count (B, 1) -> (B, T) bool: where the count highest of each row stand."""
    return score.argsort(dim=1, descending=True).argsort(dim=1) < count


@torch.no_grad()
def unmask(model, x, mask_id, steps, temperature=1.0, remasking="random", block_length=None, cfg_scale=0.0,
           remask=0.0, generator=None):
    """The reverse process (LLaDA, arXiv 2502.09992, algorithms 4 and 5): at each step predict every masked token, keep
    some of the predictions and leave the rest masked; then, with remask, second thoughts. An iterator: yields a fresh
    (B, T) state after every step, and ends when no mask is left.

    model: any callable (B, T) long -> (B, T, vocab_size) logits. x (B, T) long holds mask_id wherever text is wanted:
    after a prompt, in the middle of a sentence, everywhere. What is not mask_id is never changed.
    steps: forward passes; the tokens are spread over them evenly, and no pass is spent on none.
    temperature: 0 takes the likeliest token, 1 samples from the model.
    remasking: which predictions are kept. random: any; dilated: any, but those of one step stand far apart, since neighbours
    depend on each other most (after DUS, arXiv 2506.19037); low_confidence: the likeliest ones.
    block_length: write this many masks, from the left, before the next ones; a pass that has tokens to spare at the
    end of a block begins the next.
    cfg_scale > 0: classifier-free guidance, away from what the model says without the given tokens.
    remask > 0: second thoughts. The first half of the steps writes a draft; each of the others masks a share of the tokens
    again and writes them anew: at first this share, then less and less. Kept is what is drawn first with odds of p, the
    probability with which a token was written (after ReMDM, arXiv 2503.00307, and MaskGIT, arXiv 2202.04200). With it, more
    steps than tokens make sense.
    generator: a CPU torch.Generator, or a list of one per row: then no row depends on how many others there are.
    ValueError, at the step, for values that make no sense and for a model that answers with no distribution."""
    if steps < 1 or (block_length is not None and block_length < 1):
        raise ValueError(f"steps and block_length must be at least 1; not {steps=}, {block_length=}")
    if not 0 <= cfg_scale < torch.inf:
        raise ValueError(f"cfg_scale must be finite and at least 0, not {cfg_scale}")
    if not 0 <= remask <= 1:
        raise ValueError(f"remask must be in 0 to 1, not {remask}")
    if remasking not in REMASKING:
        raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, not {remasking}")
    if isinstance(generator, list) and len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators must be as many as the {len(x)} rows")
    (B, T), device = x.shape, x.device
    work = torch.device("cpu") if device.type == "mps" else device                     # mps has no float64
    given = (x != mask_id).to(work)                                                    # (B, T)
    n_masks = (~given).sum(dim=1, keepdim=True)                                        # (B, 1)
    block = ((~given).cumsum(dim=1) - 1) // min(block_length or T, T)                  # (B, T) from the left
    draft = min((steps + 1) // 2 if remask else steps, int(n_masks.max()))
    steps = steps if remask and draft else draft
    if remasking == "dilated":  # multiples of the golden ratio, modulo 1: those of neighbours are far from each other
        order = (torch.arange(T) * (math.sqrt(5) - 1) / 2 + uniform((B, 1), generator)) % 1      # (B, T)
    else:
        order = uniform((B, T), generator)
    order = order.to(work)
    sureness = torch.full(x.shape, torch.inf, dtype=torch.float64, device=work)        # of each token when it was written
    for step in range(steps):
        if step >= draft:
            count = (remask * (steps - step) / (steps - draft) * n_masks).ceil()       # (B, 1) tokens to write anew
            doubt = -(sureness.log() + gumbel(x.shape, generator).to(work)).masked_fill(given, torch.inf)
            x = torch.where(highest(doubt, count).to(device), mask_id, x)
        seen = torch.cat([x, torch.where(given.to(device), mask_id, x)]) if cfg_scale else x
        logits = model(seen)[..., :mask_id].to(work).double()                          # (B or 2B, T, mask_id)
        if cfg_scale:
            logits, blind = logits.chunk(2)
            logits = torch.where(logits.isneginf(), logits, blind + (1 + cfg_scale) * (logits - blind))
        masked = (x == mask_id).to(work)
        if not (logits.logsumexp(dim=-1).isfinite() | ~masked).all():
            raise ValueError("the model's logits are no distribution: NaN, +inf, or -inf for every token")
        x0 = sample(logits, temperature, generator)                                    # (B, T)
        p = logits.softmax(dim=-1).gather(-1, x0[..., None]).squeeze(-1)               # (B, T)
        confidence = p if remasking == "low_confidence" else order
        confidence = (confidence - 2 * block).masked_fill(~masked, -torch.inf)         # earlier blocks first
        written = n_masks * min(step + 1, draft) // draft                              # (B, 1) after this step
        keep = highest(confidence, written - n_masks + masked.sum(dim=1, keepdim=True))
        x = torch.where(keep.to(device), x0.to(device), x)
        sureness = torch.where(keep, p, sureness)
        yield x


@torch.no_grad()
def write_left_to_right(model, x, mask_id, temperature=1.0, generator=None):
    """The causal twin's counterpart of unmask: one token per forward pass, each given those to its left, with a
    key/value cache. x (B, T) long holds a prompt, equally long in each row, and mask_id after it. An iterator: yields a
    fresh (B, T) state after every step."""
    cache, done = model.make_cache(*x.shape), 0
    for i in range(int((x[0] != mask_id).sum()), x.shape[1]):
        shifted = torch.cat([torch.full_like(x[:, :1], mask_id), x], dim=1)            # what predicts i stands at i
        logits = model(shifted[:, done:i + 1], cache, done)[:, -1:, :mask_id]          # (B, 1, mask_id)
        x = x.clone()
        x[:, i:i + 1] = sample(logits.cpu(), temperature, generator).to(x.device)
        done = i + 1
        yield x


def write_pages(write, x, mask_id, block_size, steps):
    """Pages of any length: a window slides along, with up to half of it before the first mask, and what is written in
    one is context for the next. write(window, steps) -> an iterator of states, such as unmask, for a window of at most
    block_size. x (B, T) long, masked at the same places in each row; steps: for all windows together, one each at least. Yields
    a fresh (B, T) state after every step."""
    def masks(part):
        return int((part == mask_id).sum(dim=1).max())
    total = left = masks(x)
    while left:
        first = int((x == mask_id).any(dim=0).int().argmax())
        start = max(0, min(first - block_size // 2, x.shape[1] - block_size))
        window = x[:, start:start + block_size]
        before, left = left, left - masks(window)
        share = steps * (total - left) // total - steps * (total - before) // total
        for state in write(window, max(1, share)):
            x = torch.cat([x[:, :start], state, x[:, start + block_size:]], dim=1)
            yield x


# -----------------------------------------------------------------------------
# something to watch

@contextmanager
def own_screen():
    """The terminal's second screen, without a cursor and without wrapping; whatever happens, the first one comes back."""
    try:
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[?7l")
        yield
    finally:
        sys.stdout.write("\x1b[?7h\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def frame(row, before, mask_id, chars, width, height):
    """What the terminal shows of a page: row and before, (T,) lists of ids now and a step ago. What is fresh is highlighted;
    of a page that is too tall there are the lines around the first mask, or the last ones."""
    lines, column, middle = [""], 0, None
    for now, old in zip(row, before):
        char = "░" if now == mask_id else chars[now]
        if char == "\n" or column == width:
            lines.append("")
            column = 0
        if now == mask_id and middle is None:
            middle = len(lines) - 1
        if char != "\n":
            char = char if char.isprintable() else "·"
            lines[-1] += f"\x1b[30;43m{char}\x1b[0m" if now != old else f"\x1b[2m{char}\x1b[0m" if now == mask_id else char
            column += 1
    top = max(0, min(len(lines) if middle is None else middle - height // 2, len(lines) - height))
    return "\x1b[H" + "\r\n".join(line + "\x1b[K" for line in lines[top:top + height]) + "\x1b[J"


def save_replay(path, states, mask_id, chars):
    """Write one self-contained page that replays a run: states, a list of (B, T) tensors, the first one before step 1."""
    start = [[None if i == mask_id else chars[i] for i in row] for row in states[0].tolist()]
    steps = [[(b, i, chars[after[b, i]]) for b, i in (after != before).nonzero().tolist()]
             for before, after in zip(states, states[1:])]
    run = json.dumps(dict(start=start, steps=steps), separators=(",", ":")).replace("<", "\\u003c")  # no tag can begin
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{RUN}}", run)
    write_atomically(path, lambda f: f.write(html.encode()))


# -----------------------------------------------------------------------------
# the command line

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    add("--path", default=SHIPPED, help="checkpoint, with or without .pt (default: the shipped one)")
    add("--prompt", help="text to go on from (default: none)")
    add("--gen_length", type=int, help="characters to write, any number (default: the rest of the model's block, or half)")
    add("--infill", help="text with holes to fill, or a file that holds it, or - for standard input")
    add("--mask_char", default="_", help="the character that is a hole in --infill (default: %(default)s)")
    add("--num_samples", type=int, default=1, help="pages, written together (default: 1)")
    add("--steps", type=int, help="forward passes; fewer: faster and rougher (default: 32; one for 8 characters of a long page)")
    add("--temperature", type=float, help="0: the likeliest text; 1: the model's own odds (default: 1.0; of a causal model 0.8)")
    add("--remask", type=float, help="second thoughts: share of the text that is written anew; 0: none (default: 0.3)")
    add("--remasking", choices=REMASKING,
        help="which predictions a step keeps: any, any that stand apart, or the surest (default: dilated)")
    add("--block_length", type=int, help="write this many characters before the next ones (default: no blocks)")
    add("--cfg_scale", type=float, help="classifier-free guidance towards the given text (default: 0, none)")
    add("--seed", type=int, default=1337, help="same seed, device and dtype: same text (default: %(default)s)")
    add("--animate", action="store_true", help="show the first page in the terminal while it is written")
    add("--html", help="write a page that replays the run to this file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (untested)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16: what the model computes in")
    args = parser.parse_args()
    try:
        write(args)
    except (MemoryError, OverflowError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("out of memory|allocate memory", str(e)):  # on CUDA, on the CPU
            raise
        fail("that does not fit into memory: try fewer --num_samples or a smaller --gen_length")
    except (OSError, ValueError) as e:
        fail(e)
    except KeyboardInterrupt:
        sys.exit(130)


def read_infill(text):
    """--infill: a text, the name of a file that holds it, or - for standard input."""
    if text != "-" and (not os.path.exists(text) or os.path.isdir(text)):
        return text
    data = sys.stdin.buffer.read() if text == "-" else Path(text).read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"--infill={text} is not UTF-8 text") from e


def make_page(args, chars, mask_id, block_size):
    """-> the ids of the page to write, mask_id wherever text is wanted."""
    id_of, flag, gen_length = {c: i for i, c in enumerate(chars)}, "--prompt", 0
    if args.infill is None:
        text = args.prompt or ""
        gen_length = max(block_size - len(text), block_size // 2) if args.gen_length is None else args.gen_length
        if gen_length < 1:
            raise ValueError(f"--gen_length must be at least 1, not {gen_length}")
    else:
        for name in ("prompt", "gen_length"):
            if getattr(args, name) is not None:
                raise ValueError(f"--infill and --{name} do not go together: the page is the text of --infill")
        text, flag = read_infill(args.infill), "--infill"
        if len(args.mask_char) != 1:
            raise ValueError(f"--mask_char must be one character, not {args.mask_char!r}")
        if args.mask_char not in text:
            raise ValueError(f"--infill={args.infill[:60]} has no holes ({args.mask_char!r}) to fill, or is no file")
        id_of[args.mask_char] = mask_id
    unknown = sorted(set(text) - set(id_of))
    if unknown:
        raise ValueError(f"{flag} has characters that the model does not know: {' '.join(map(repr, unknown))}")
    return [id_of[c] for c in text] + [mask_id] * gen_length


def make_writer(args, model, generator, n_masks):
    """-> what write_pages calls for each window, and with how many steps in all."""
    if model.config.causal:
        for flag in ("infill", "steps", "remask", "remasking", "block_length", "cfg_scale"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} is for diffusion; {args.path} is a causal model and writes from left to right")
        temperature, steps = 0.8 if args.temperature is None else args.temperature, n_masks

        def write_window(window, _):
            return write_left_to_right(model, window, model.config.mask_id, temperature, generator)
    else:
        steps = max(math.ceil(n_masks / 8), min(n_masks, 32)) if args.steps is None else args.steps
        if steps < 1:
            raise ValueError(f"--steps must be at least 1, not {steps}")
        how = dict(temperature=1.0 if args.temperature is None else args.temperature,
                   remask=0.3 if args.remask is None else args.remask, remasking=args.remasking or "dilated",
                   block_length=args.block_length, cfg_scale=args.cfg_scale or 0.0, generator=generator)
        steps = steps if how["remask"] else min(steps, n_masks)

        def write_window(window, steps):
            return unmask(model, window, model.config.mask_id, steps, **how)
    return write_window, steps


def write(args):
    device, _ = pick_device(args.device)
    model, chars, _ = load_checkpoint(resolve_path(args.path), device)
    model.to(pick_dtype(args.dtype, device)[0])
    config, mask_id = model.config, model.config.mask_id
    page = make_page(args, chars, mask_id, config.block_size)
    n_masks = page.count(mask_id)
    if args.num_samples < 1:
        raise ValueError(f"--num_samples must be at least 1, not {args.num_samples}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be in 0 to 2**63 - 1, not {args.seed}")
    if args.html is not None:
        if not args.html.endswith(".html"):  # not over a checkpoint or a text
            raise ValueError(f"--html={args.html} must be the name of an .html file")
        try:  # an unwritable place must show now, not at the end
            write_atomically(f"{args.html}.probe", lambda f: None)
            os.unlink(f"{args.html}.probe")
        except OSError as e:
            raise OSError(f"--html={args.html} can't be written: {e.strerror}") from e

    x = torch.tensor([page] * args.num_samples, device=device)                         # (num_samples, T)
    stream = torch.Generator().manual_seed(args.seed)                                  # a seed for each sample, in turn
    generator = [torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=stream)))
                 for _ in range(args.num_samples)]
    write_window, steps = make_writer(args, model, generator, n_masks)
    states, watching = [x], args.animate and sys.stdout.isatty()
    started, passes, frames = time.perf_counter(), 0, 0.0
    bar = tqdm(write_pages(write_window, x, mask_id, config.block_size, steps), total=steps, desc="unmasking", unit="step",
               leave=False, delay=0.1, disable=watching)
    with own_screen() if watching else nullcontext():
        for x in bar:
            passes += 1
            if watching:
                showing = time.perf_counter()
                sys.stdout.write(frame(x[0].tolist(), states[-1][0].tolist(), mask_id, chars, *shutil.get_terminal_size()))
                sys.stdout.flush()
                time.sleep(0.05)  # slow enough to see
                frames += time.perf_counter() - showing
            if not args.html:
                states.clear()
            states.append(x)
    pages = ["".join(chars[i] for i in row) for row in x.tolist()]
    seconds = time.perf_counter() - started - frames
    if args.html:
        save_replay(args.html, states, mask_id, chars)
    for number, text in enumerate(pages, 1):
        if len(pages) > 1:
            print(f"--- {number} of {len(pages)}", file=sys.stderr)
        print(text, end="" if args.infill and text.endswith("\n") else "\n", flush=True)
    written = args.num_samples * n_masks
    print(f"[{passes} forward passes, {written} characters in {seconds:.1f} s: {written / seconds:.0f} characters/s; "
          f"seed {args.seed}]", file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # python main.py | head ends quietly
    main()
