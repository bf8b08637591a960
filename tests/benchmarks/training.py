"""
How fast does train.py train, beside a plain float32 loop and beside this machine's own matrix-product rate?

    python tests/benchmarks/training.py                     # 6 x 384, 16 windows of 256: nanoGPT's size
    python tests/benchmarks/training.py --n_layer=4 --n_head=4 --n_embd=256 --batch_size=8

All sides in one run, in turns, on random text: the step that train.py takes (its dtype, attention and optimizers; EMA
excluded), the same with AdamW alone, and the loop that one would write first: the same network in float32, PyTorch's defaults,
AdamW, each batch cut from a memory map window by window, the loss read at every iteration. FLOPs are counted as PaLM does
(arXiv 2204.02311, appendix B): 6 per parameter and character, and 12 * n_layer * n_embd * T per character for attention. At
the end a profile says where the time goes.
"""

import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import GPT, GPTConfig, pick_device, pick_dtype  # noqa: E402
from train import accumulate_gradient, autocast_to, diffusion_loss, get_batch, make_optimizers, parse_args  # noqa: E402

KINDS = {"mm": "matrix products", "addmm": "matrix products", "bmm": "matrix products", "baddbmm": "matrix products",
         "_scaled_dot_product_flash_attention_for_cpu": "flash attention",
         "_scaled_dot_product_flash_attention_for_cpu_backward": "flash attention",
         "gelu": "GELU", "gelu_backward": "GELU", "native_layer_norm": "layer norm", "native_layer_norm_backward": "layer norm",
         "_softmax": "softmax", "_softmax_backward_data": "softmax", "isneginf": "softmax", "where": "softmax", "all": "softmax",
         "copy_": "copies and changes of dtype", "cat": "copies and changes of dtype"}


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device):
    start = time.perf_counter()
    f()
    sync(device)
    return time.perf_counter() - start


def profile(f):
    """-> the share of each kind of operation in f's own time, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        f()
    kinds = Counter()
    for event in p.key_averages():
        kinds[KINDS.get(event.key.removeprefix("aten::"), "the rest")] += event.self_cpu_time_total
    return {kind: us / kinds.total() for kind, us in kinds.most_common()}


def main():
    cfg, _ = parse_args(["--n_layer=6", "--n_head=6", "--n_embd=384", "--batch_size=16", *sys.argv[1:]])
    device, _ = pick_device(cfg.device)
    dtype, why = pick_dtype(cfg.dtype, device)
    torch.manual_seed(0)
    size = dict(block_size=cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, dropout=cfg.dropout)
    model = GPT(GPTConfig(**size)).to(device)
    mask_id = model.config.mask_id
    B, T = cfg.batch_size * cfg.gradient_accumulation_steps, cfg.block_size
    n = sum(p.numel() for p in model.parameters())
    flops = B * T * (6 * n + 12 * cfg.n_layer * cfg.n_embd * T)

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "train.bin"
    np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint16).tofile(path)
    data = torch.from_numpy(np.fromfile(path, dtype=np.int16))
    data = data if device.type == "cpu" else data.to(device)

    def plain_step():
        data = np.memmap(path, dtype=np.uint16, mode="r")
        input_ids = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in torch.randint(len(data) - T, (B,))])
        loss = diffusion_loss(model, input_ids.to(device), mask_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        loss.item()

    def gradient():
        accumulate_gradient(net, mask_id, cfg, get_batch(data, cfg, 0, device), autocast)

    def update(optimizers):
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    def step(optimizers):
        gradient()
        update(optimizers)

    net = torch.compile(model) if cfg.compile else model
    plain_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    cfg.learning_rate = cfg.muon_lr = 1e-6
    muon = make_optimizers(model, cfg)
    cfg.muon = False
    adamw = make_optimizers(model, cfg)
    a = torch.randn(B * T, cfg.n_embd, device=device, dtype=dtype)
    b = torch.randn(cfg.n_embd, 4 * cfg.n_embd, device=device, dtype=dtype)
    sides = {"a plain float32 loop": plain_step,
             "train.py --muon=False": lambda: step(adamw),
             "train.py": lambda: step(muon),
             "its forward and backward": gradient,
             "matrix product": lambda: [a @ b for _ in range(20)]}
    times = {name: [] for name in sides}
    for i in range(10):
        for name, f in sides.items():
            torch.backends.cuda.enable_flash_sdp(True)  # the default, which autocast_to changes on a CPU
            autocast = autocast_to(dtype, device) if f is not plain_step else None
            s = seconds(f, device)
            if i >= 2:
                times[name].append(s)
    s = {name: statistics.median(t) for name, t in times.items()}
    matmul = 20 * 2 * B * T * cfg.n_embd * 4 * cfg.n_embd / s.pop("matrix product")

    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype} ({why})")
    print(f"{cfg.n_layer} layers x {cfg.n_embd} wide, {n:,} parameters, {B * T:,} characters a step, dropout {cfg.dropout}")
    print(f"matrix product: {matmul / 1e9:,.0f} GFLOP/s\n")
    print(f"{'':26}{'ms':>7}{'chars/s':>10}{'GFLOP/s':>9}{'of the matrix product':>23}{'of the plain loop':>19}")
    for name in s:
        rate = flops / s[name]
        print(f"{name:26}{s[name] * 1e3:7.0f}{B * T / s[name]:10,.0f}{rate / 1e9:9.0f}{rate / matmul:23.0%}"
              f"{s['a plain float32 loop'] / s[name]:18.2f}x")
    if device.type == "cpu":
        for name, f in (("forward and backward", gradient), ("clipping, Muon and AdamW", lambda: update(muon))):
            shares = "; ".join(f"{kind} {share:.0%}" for kind, share in profile(f).items())
            gradient()  # for the update to have one
            print(f"\n{name}: {shares}")


if __name__ == "__main__":
    main()
