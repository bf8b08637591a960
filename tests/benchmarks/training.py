"""
What share of this machine's own matrix-product rate does training reach?

    python tests/benchmarks/training.py                     # 6 x 384, 16 windows of 256: nanoGPT's size
    python tests/benchmarks/training.py --n_layer=4 --n_head=4 --n_embd=256 --batch_size=8

Both sides in one run: a matrix product of the MLP's shape, and whole training steps (batch, forward, backward, clipping,
optimizers, EMA excluded) on random text, in the dtype that train.py would choose. FLOPs are counted as PaLM does
(arXiv 2204.02311, appendix B): 6 per parameter and character, and 12 * n_layer * n_embd * T per character for attention.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import GPT, GPTConfig, pick_device, pick_dtype  # noqa: E402
from train import diffusion_loss, get_batch, make_optimizers, parse_args  # noqa: E402


def seconds(f, device, repeats):
    """Median time of f() after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main():
    cfg, _ = parse_args(["--n_layer=6", "--n_head=6", "--n_embd=384", "--batch_size=16", *sys.argv[1:]])
    device, _ = pick_device(cfg.device)
    dtype, why = pick_dtype(cfg.dtype, device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd)).to(device)
    optimizers = make_optimizers(model, cfg)
    data = torch.randint(65, (100_000,))
    tokens = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.block_size

    a = torch.randn(tokens, cfg.n_embd, device=device, dtype=dtype)
    b = torch.randn(cfg.n_embd, 4 * cfg.n_embd, device=device, dtype=dtype)
    matmul = 2 * tokens * cfg.n_embd * 4 * cfg.n_embd / seconds(lambda: a @ b, device, 50)

    def step(optimize):
        input_ids, t, u = get_batch(data, cfg, 0, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = diffusion_loss(model, input_ids, model.config.mask_id, t=t, u=u)
        loss.backward()
        if optimize:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad()
    n = sum(p.numel() for p in model.parameters())
    flops = tokens * (6 * n + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype} ({why})")
    print(f"{cfg.n_layer} layers x {cfg.n_embd} wide, {n:,} parameters, {tokens:,} characters a step")
    print(f"matrix product:              {matmul / 1e9:7.0f} GFLOP/s")
    for name, optimize in (("forward and backward", False), ("whole step, optimizer too", True)):
        s = seconds(lambda optimize=optimize: step(optimize), device, 8)
        print(f"{name + ':':28} {flops / s / 1e9:7.0f} GFLOP/s = {flops / s / matmul:.0%} of it; {tokens / s:,.0f} characters/s")


if __name__ == "__main__":
    main()
