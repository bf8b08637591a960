"""
How long until the validation NELBO is at 2.5 nats per character, beside a plain reference?

    python tests/benchmarks/time_to_quality.py              # up to 20 minutes, on prepared Tiny Shakespeare

One after the other on the same network size and batch: train.py's defaults, and the plain reference: learned positions,
independent t, AdamW at 1e-3, float32. Seconds of training alone; the clock stands still during the evaluations, which come
every 50 iterations. A side that is not there after --cap seconds is "not reached".
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train as t  # noqa: E402
from model import GPT, GPTConfig, pick_device, pick_dtype  # noqa: E402


def independent(data, cfg, iteration, device):
    """get_batch, but with every row's t drawn on its own."""
    input_ids, _, u = t.get_batch(data, cfg, iteration, device)
    g = torch.Generator().manual_seed(t.seed_for(cfg.seed, iteration, 2))
    return input_ids, torch.rand(len(input_ids), generator=g).to(device), u


def seconds_to(target, cap, cfg, get_batch):
    device, _ = pick_device(cfg.device)
    torch.backends.cuda.enable_flash_sdp(True)
    dtype, _ = pick_dtype(cfg.dtype, device)
    autocast = t.autocast_to(dtype, device) if dtype != torch.float32 else torch.autocast(device.type, enabled=False)
    train_data, val_data, chars = t.load_data(cfg)
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(cfg.block_size, len(chars) + 1, cfg.n_layer, cfg.n_head, cfg.n_embd, rope=cfg.rope)).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = t.make_optimizers(model, cfg)
    spent, iteration, best = 0.0, 0, float("inf")
    while spent < cap:
        start = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * t.lr_scale(iteration, cfg)
        batch = get_batch(train_data, cfg, iteration, device)
        t.accumulate_gradient(model, model.config.mask_id, cfg, batch, autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            decay = min(cfg.ema_decay, (1 + iteration) / (10 + iteration))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        iteration += 1
        spent += time.perf_counter() - start
        if iteration % 50 == 0:
            nelbo, _ = t.estimate_nelbo(ema, val_data[:2**16], passes=2, autocast=autocast)
            best = min(best, nelbo)
            print(f"  {iteration:5} iterations, {spent:4.0f} s: {nelbo:.3f}", file=sys.stderr)
            if nelbo <= target:
                return f"{spent:.0f} s ({iteration} iterations)"
    return f"not reached in {cap:.0f} s ({iteration} iterations, best {best:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=2.5, help="nats per character")
    parser.add_argument("--cap", type=float, default=900, help="seconds")
    args = parser.parse_args()
    ours, _ = t.parse_args([])
    plain, _ = t.parse_args(["--rope=False", "--muon=False", "--learning_rate=1e-3", "--dtype=float32", "--eps=1e-3"])
    print(f"seconds of training to a validation NELBO of {args.target} nats per character; {torch.get_num_threads()} threads")
    print(f"{ours.n_layer} layers x {ours.n_embd} wide, {ours.batch_size} windows of {ours.block_size} per iteration")
    print("train.py's defaults:", seconds_to(args.target, args.cap, ours, t.get_batch), flush=True)
    print("the plain reference:", seconds_to(args.target, args.cap, plain, independent), flush=True)


if __name__ == "__main__":
    main()
