"""
The reverse process: start from masks, unmask step by step, show text.

    python main.py                                        # the shipped model writes a page of Shakespeare
    python main.py --path=X --prompt="ROMEO:" --num_samples=3
    python main.py --steps=64                             # faster and rougher
    python main.py --remasking=random --temperature=1 --block_length=256   # the model's own distribution, exactly
    python main.py --path=twin                            # a model of train.py --causal writes from left to right

The text goes to stdout and nothing else does: python main.py > page.txt keeps just the text.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import fail, load_checkpoint, pick_device, resolve_path

SHIPPED = Path(__file__).resolve().parent / "pretrained_gpt_last.pt"


def sample(logits, temperature, generator):
    """logits (B, T, V) -> (B, T) tokens, ~ softmax(logits / temperature). Gumbel-max, in float64: in float32 the noise is
    cut off at the top, which lowers the temperature (arXiv 2409.02908)."""
    if not 0 <= temperature < torch.inf:
        raise ValueError(f"temperature must be finite and at least 0, not {temperature}")
    uniform = torch.rand(logits.shape, dtype=torch.float64, generator=generator).clamp_min(1e-300)
    gumbel = -torch.log(-torch.log(uniform)).to(logits.device)
    return (logits.double() + temperature * gumbel).argmax(dim=-1)


@torch.no_grad()
def unmask(model, x, mask_id, steps, temperature=1.0, remasking="random", block_length=None, cfg_scale=0.0,
           generator=None):
    """LLaDA's reverse process (arXiv 2502.09992, algorithms 4 and 5): at each step predict every masked token, keep
    some of the predictions and leave the rest masked. An iterator: yields a fresh (B, T) state after every step, and
    ends when no mask is left.

    model: any callable (B, T) long -> (B, T, vocab_size) logits. x (B, T) long holds mask_id wherever text is wanted:
    after a prompt, in the middle of a sentence, everywhere. What is not mask_id is never changed.
    steps: forward passes; the tokens are spread over them evenly, and no pass is spent on none.
    temperature: 0 takes the likeliest token, 1 samples from the model.
    remasking: which predictions are kept: random ones or, for low_confidence, the likeliest ones.
    block_length: write this many masks, from the left, before the next ones; a pass that has tokens to spare at the
    end of a block begins the next.
    cfg_scale > 0: classifier-free guidance, away from what the model says without the given tokens.
    generator: a CPU torch.Generator; the same one gives the same text.
    ValueError, at the first step, for values that make no sense."""
    if steps < 1 or (block_length is not None and block_length < 1):
        raise ValueError(f"steps and block_length must be at least 1; not {steps=}, {block_length=}")
    if not 0 <= cfg_scale < torch.inf:
        raise ValueError(f"cfg_scale must be finite and at least 0, not {cfg_scale}")
    if remasking not in ("random", "low_confidence"):
        raise ValueError(f"remasking must be random or low_confidence, not {remasking}")
    work = torch.device("cpu") if x.device.type == "mps" else x.device                 # mps has no float64
    given = x != mask_id
    n_masks = (~given).sum(dim=1, keepdim=True).to(work)                               # (B, 1)
    block = ((~given).cumsum(dim=1) - 1).to(work) // (block_length or x.shape[1])      # (B, T) from the left
    steps = min(steps, int(n_masks.max()))
    for step in range(steps):
        if cfg_scale > 0:
            logits, blind = model(torch.cat([x, torch.where(given, mask_id, x)])).chunk(2)
            logits = blind + (1 + cfg_scale) * (logits - blind)
        else:
            logits = model(x)
        logits = logits[..., :mask_id].to(work).double()                               # (B, T, mask_id)
        x0 = sample(logits, temperature, generator)                                    # (B, T)
        if remasking == "random":
            confidence = torch.rand(x.shape, dtype=torch.float64, generator=generator).to(work)
        else:
            confidence = logits.softmax(dim=-1).gather(-1, x0[..., None]).squeeze(-1)
        confidence = (confidence - 2 * block).masked_fill((x != mask_id).to(work), -torch.inf)  # earlier blocks first
        rank = confidence.argsort(dim=1, descending=True).argsort(dim=1)               # (B, T), 0 is the surest
        count = (step + 1) * n_masks // steps - step * n_masks // steps                # (B, 1) tokens to keep now
        x = torch.where((rank < count).to(x.device), x0.to(x.device), x)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail  # one line, without the usage
    parser.add_argument("--path", default=SHIPPED, help="checkpoint, with or without .pt (default: the shipped one)")
    parser.add_argument("--prompt", default="", help="text to go on from (default: none)")
    parser.add_argument("--num_samples", type=int, default=1, help="pages, written together (default: 1)")
    parser.add_argument("--gen_length", type=int,
                        help="characters to write (default: what is left of the model's block)")
    parser.add_argument("--steps", type=int,
                        help="forward passes; fewer are faster and rougher (default: one per character)")
    parser.add_argument("--temperature", type=float,
                        help="0: the likeliest text; 1: the model's own odds (default: 1.3; for a causal model 0.8)")
    parser.add_argument("--remasking", choices=("random", "low_confidence"),
                        help="which predictions a step keeps: any, or the surest (default: low_confidence)")
    parser.add_argument("--block_length", type=int,
                        help="write this many characters before the next ones (default: 16 or, if less, gen_length)")
    parser.add_argument("--cfg_scale", type=float,
                        help="classifier-free guidance towards the prompt (default: 0, none)")
    parser.add_argument("--seed", type=int, default=1337, help="same seed, same text (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (untested)")
    args = parser.parse_args()
    try:
        write(args)
    except torch.OutOfMemoryError:
        fail("the device is out of memory: try fewer --num_samples")
    except (OSError, ValueError) as e:
        fail(e)
    except KeyboardInterrupt:
        sys.exit(130)


def write(args):
    device, _ = pick_device(args.device)
    model, chars, _ = load_checkpoint(resolve_path(args.path), device)
    config = model.config
    id_of = {c: i for i, c in enumerate(chars)}
    unknown = sorted(set(args.prompt) - set(chars))
    if unknown:
        raise ValueError(f"--prompt has characters that the model does not know: {' '.join(map(repr, unknown))}")
    left = config.block_size - len(args.prompt)
    gen_length = left if args.gen_length is None else args.gen_length
    if left < 1:
        raise ValueError(f"--prompt has {len(args.prompt)} characters: no room is left in the model's block of "
                         f"{config.block_size}")
    if not 1 <= gen_length <= left:
        raise ValueError(f"--gen_length must be 1 to {left}, what --prompt leaves of the model's block of "
                         f"{config.block_size}; not {gen_length}")
    if args.num_samples < 1:
        raise ValueError(f"--num_samples must be at least 1, not {args.num_samples}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be in 0 to 2**63 - 1, not {args.seed}")

    prompt = torch.tensor([id_of[c] for c in args.prompt], dtype=torch.long)
    x = torch.full((args.num_samples, len(prompt) + gen_length), config.mask_id)  # (num_samples, T) an empty page
    x[:, :len(prompt)] = prompt
    generator = torch.Generator().manual_seed(args.seed)
    x, temperature = x.to(device), args.temperature
    steps = gen_length if args.steps is None else args.steps
    if config.causal:
        for flag in ("steps", "remasking", "block_length", "cfg_scale"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} is for diffusion; {args.path} is a causal model and writes from left to right")
        states = write_left_to_right(model, x, config.mask_id, 0.8 if temperature is None else temperature, generator)
    else:
        block_length = min(16, gen_length) if args.block_length is None else args.block_length
        if not 1 <= block_length <= gen_length:
            raise ValueError(f"--block_length={block_length} does not fit: it must be 1 to gen_length={gen_length}")
        states = unmask(model, x, config.mask_id, steps, 1.3 if temperature is None else temperature,
                        args.remasking or "low_confidence", block_length, args.cfg_scale or 0.0, generator)
    started, passes = time.perf_counter(), 0
    for x in tqdm(states, total=min(max(steps, 1), gen_length), desc="unmasking", unit="step", leave=False, delay=0.1):
        passes += 1
    pages = ["".join(chars[i] for i in row) for row in x.tolist()]
    seconds = time.perf_counter() - started
    for number, page in enumerate(pages, 1):
        if len(pages) > 1:
            print(f"--- {number} of {len(pages)}", file=sys.stderr)
        print(page, flush=True)
    written = args.num_samples * gen_length
    print(f"[{passes} forward passes, {written} characters in {seconds:.1f} s: {written / seconds:.0f} characters/s; "
          f"seed {args.seed}]", file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # python main.py | head ends quietly
    main()
