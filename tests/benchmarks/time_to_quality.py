"""
How long does training take until the validation NELBO is at 2.0 nats per character? train.py is
compared with two plain recipes.

    python tests/benchmarks/time_to_quality.py    # up to 45 minutes, on prepared Tiny Shakespeare

The three train one after the other, with the same network size and batch: train.py's defaults; what
LLaDA's recipe would be here (rotary positions, no QK-norm, independent t, AdamW at 1e-3, the same
dtype); and nanoGPT's settings for a CPU (learned positions, AdamW at 1e-3, float32) with
independent t. Only the seconds of training count: the clock stands still during the evaluations,
which come every 50 iterations. After --cap seconds, a recipe is given up as "not reached".

The evaluations are of the first 65,536 characters of the validation text, which are easier than the
rest (recipe.md), so that the table of recipe.md can be measured again.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training import iteration, set_up, sync

from diffusion import forward_process
from lib.device import autocast
from lib.evaluate import measure


def independent_t(input_ids, mask_id, eps, generator, p_max):
    """Like forward_process, but the t of every row is drawn on its own: each row is a batch."""
    rows = [forward_process(row, mask_id, eps, generator, p_max)
            for row in input_ids.split(1)]
    return [torch.cat(tensors) for tensors in zip(*rows)]


def seconds_to(target, cap, flags, masking):
    """Train until the NELBO is at target. masking: forward_process or independent_t."""
    run, config, data = set_up(flags)
    device = run.model.wte.weight.device
    if masking is independent_t:  # PyTorch's default, which train.py changes on a CPU
        torch.backends.cuda.enable_flash_sdp(True)
    spent, best = 0.0, float("inf")
    while spent < cap:
        start = time.perf_counter()
        iteration(run, config, data, forward_process=masking)
        sync(device)
        spent += time.perf_counter() - start
        if run.iteration % 50 == 0:
            nelbo, _ = measure(run.ema, data.val[:2**16], data, 2, 64,
                               autocast(config.dtype, device))
            best = min(best, nelbo)
            print(f"  {run.iteration:5} iterations, {spent:4.0f} s: {nelbo:.3f}", file=sys.stderr)
            if nelbo <= target:
                return f"{spent:.0f} s ({run.iteration} iterations)"
    return f"not reached in {cap:.0f} s ({run.iteration} iterations, best {best:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=2.0, help="nats per character")
    parser.add_argument("--cap", type=float, default=900, help="seconds")
    args = parser.parse_args()
    llada = ["--qk_norm=False", "--muon=False", "--learning_rate=1e-3", "--eps=1e-3"]
    nanogpt = [*llada, "--rope=False", "--dtype=float32"]
    print(f"seconds of training to a validation NELBO of {args.target} nats per character; "
          f"{torch.get_num_threads()} threads")
    for name, flags, masking in (
            ("train.py's defaults", [], forward_process),
            ("LLaDA's recipe", llada, independent_t),
            ("nanoGPT's settings", nanogpt, independent_t)):
        print(f"{name}: {seconds_to(args.target, args.cap, flags, masking)}\n", flush=True)


if __name__ == "__main__":
    main()
