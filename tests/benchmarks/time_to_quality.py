"""
How long until the validation NELBO is at 2.0 nats per character, beside plain references?

    python tests/benchmarks/time_to_quality.py    # up to 45 minutes, on prepared Tiny Shakespeare

One after the other on the same network size and batch: train.py's defaults; what LLaDA's recipe
would be here (rotary positions, no QK-norm, independent t, AdamW at 1e-3, the same dtype); and
nanoGPT's settings for a CPU (learned positions, AdamW at 1e-3, float32) with independent t. Seconds
of training alone; the clock stands still during the evaluations, which come every 50 iterations. A
side that is not there after --cap seconds is "not reached".
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from training import add_gradient, sync  # noqa: E402


def independent(input_ids, mask_id, eps, generator, p_max):
    """forward_process, but with every row's t drawn on its own: each row is a batch."""
    rows = [train.forward_process(row, mask_id, eps, generator, p_max)
            for row in input_ids.split(1)]
    return [torch.cat(tensors) for tensors in zip(*rows)]


def seconds_to(target, cap, flags, forward_process):
    run = train.set_up(train.parse_args(flags)[0], {})
    if forward_process is independent:  # PyTorch's default, which train.py changes on a CPU
        torch.backends.cuda.enable_flash_sdp(True)
    spent, best = 0.0, float("inf")
    while spent < cap:
        start = time.perf_counter()
        train.set_learning_rates(run)
        add_gradient(run, run.model, forward_process)
        train.update_weights(run)
        run.iteration += 1
        sync(run.device)
        spent += time.perf_counter() - start
        if run.iteration % 50 == 0:
            nelbo, _ = train.estimate_nelbo(run.ema, run.val_data[:2**16], passes=2,
                                            autocast=run.autocast)
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
    for name, flags, forward_process in (
            ("train.py's defaults", [], train.forward_process),
            ("LLaDA's recipe", llada, independent),
            ("nanoGPT's settings", nanogpt, independent)):
        print(f"{name}: {seconds_to(args.target, args.cap, flags, forward_process)}\n", flush=True)


if __name__ == "__main__":
    main()
