"""
How fast does train.py train? It is compared with a plain float32 loop, with a loop like nanoGPT's,
and with the speed of matrix products on the same machine.

    python tests/benchmarks/training.py                # 6 x 384, 16 windows of 256: nanoGPT's size
    python tests/benchmarks/training.py --n_layer=4 --n_head=4 --n_embd=256 --batch_size=8

All sides are timed in turn, in one run, on random text:

* the iteration of train.py, with its dtype, attention, optimizers and EMA;
* the same iteration with AdamW alone;
* the plain loop, which one would write first: the same network in float32, with PyTorch's defaults
  and AdamW. It cuts each batch from a memory map window by window, and reads every loss;
* on a GPU, also a loop like nanoGPT's: it has train.py's dtype and compilation, fused AdamW, and
  batches in pinned memory, and it leaves the loss on the device.

FLOPs are counted as PaLM does (arXiv 2204.02311, appendix B): 6 per parameter and character, and
12 * n_layer * n_embd * T per character for attention. On a CPU, a profile at the end shows where
the time goes.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from diffusion import diffusion_loss, forward_process
from lib.common import parse_knobs
from lib.data import data_folder, load_data, write_dataset
from lib.device import Processes, autocast, choose_attention
from lib.muon import make_optimizers
from lib.run import Files
from lib.twin import autoregressive_loss

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "flash attention": ("_scaled_dot_product_flash_attention_for_cpu",
                        "_scaled_dot_product_flash_attention_for_cpu_backward"),
    "GELU": ("gelu", "gelu_backward"),
    "layer norm": ("native_layer_norm", "native_layer_norm_backward"),
    "softmax": ("_softmax", "_softmax_backward_data", "isneginf", "where", "all"),
    "copies and changes of dtype": ("copy_", "cat"),
}
KIND_OF = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device):
    start = time.perf_counter()
    f()
    sync(device)
    return time.perf_counter() - start


def profile(f):
    """Return the share of the time on the CPU that each kind of operation takes in f."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        f()
    kinds = Counter()
    for event in p.key_averages():
        kinds[KIND_OF.get(event.key, "the rest")] += event.self_cpu_time_total
    return {kind: us / kinds.total() for kind, us in kinds.most_common()}


def set_up(flags):
    """Return what train.py would set up for these flags: the Run, its config and its data."""
    with mock.patch.object(sys, "argv", ["train.py", *flags]):
        given = parse_knobs(train.TrainConfig, train.__doc__)
    config, device, *_ = train.resolve(given, Files(Path("none.pt")), Processes())
    data = load_data(data_folder(config.dataset, config.data_dir), config.block_size)
    choose_attention(device)
    return train.set_up(config, device, data), config, data


def iteration(run, config, data, net=None, forward_process=forward_process, update=True):
    """Do what an iteration of train.py's loop does; without update, the first half of it."""
    mask_id = run.model.config.mask_id
    generator = torch.Generator().manual_seed(train.seed_for(config.seed, run.iteration))
    input_ids = train.get_batch(data.train, config, generator, data.record)
    batch = (input_ids, *forward_process(input_ids, mask_id, config.eps, generator, config.p_max))
    train.set_learning_rates(run, config)
    loss_function = autoregressive_loss if config.causal else diffusion_loss
    train.add_gradient(net or run.model, loss_function, batch, run, config, Processes())
    if update:
        train.update_weights(run, config)
        run.iteration += 1


def seconds_per_iteration(flags):
    """Measure a few iterations of train.py with these flags: the median, in seconds."""
    run, config, data = set_up(flags)
    device = run.model.wte.weight.device
    times = [seconds(lambda: iteration(run, config, data), device) for _ in range(12)]
    return statistics.median(times[2:])


def main():
    size = ["--n_layer=6", "--n_head=6", "--n_embd=384", "--batch_size=16"]
    vocab = [chr(ord("0") + i) for i in range(65)]
    ids = np.random.default_rng(0).integers(0, len(vocab), 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), ids, ids, vocab)
        measure(*set_up([*size, *sys.argv[1:], "--learning_rate=1e-6", "--muon_lr=1e-6",
                         f"--data_dir={folder}"]))


def measure(run, config, data):
    model, mask_id = run.model, run.model.config.mask_id
    device, dtype = model.wte.weight.device, getattr(torch, config.dtype)
    B, T = config.batch_size * config.gradient_accumulation_steps, config.block_size
    n = sum(p.numel() for p in model.parameters())
    flops = B * T * (6 * n + 12 * config.n_layer * config.n_embd * T)
    net = torch.compile(model) if config.compile else model
    plain_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    fused_optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    adamw = make_optimizers(model, dataclasses.replace(config, muon=False))
    adamw_run = dataclasses.replace(run, optimizers=adamw)
    a = torch.randn(B * T, config.n_embd, device=device, dtype=dtype)
    b = torch.randn(config.n_embd, 4 * config.n_embd, device=device, dtype=dtype)

    def own_loop(net, optimizer, autocast, move):
        data = np.memmap(Path(config.data_dir) / "train.bin", dtype=np.uint16, mode="r")
        input_ids = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64))
                                 for i in torch.randint(len(data) - T, (B,))])
        batch = [input_ids, *forward_process(input_ids, mask_id)]
        with autocast:
            loss = diffusion_loss(net, mask_id, *(move(tensor) for tensor in batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def plain_step():
        own_loop(model, plain_optimizer, nullcontext(), lambda z: z.to(device)).item()

    def nanogpt_step():
        own_loop(net, fused_optimizer, autocast(config.dtype, device),
                 lambda z: train.to_device(z, device))

    def gradient():
        iteration(run, config, data, net, update=False)

    sides = {"a plain float32 loop": plain_step,
             **({"a loop like nanoGPT's": nanogpt_step} if device.type == "cuda" else {}),
             "train.py --muon=False": lambda: iteration(adamw_run, config, data, net),
             "train.py": lambda: iteration(run, config, data, net),
             "its forward and backward": gradient,
             "matrix product": lambda: [a @ b for _ in range(20)]}
    times = {name: [] for name in sides}
    for i in range(10):
        for name, f in sides.items():
            # flash attention is PyTorch's default; train.py disables it on a CPU
            torch.backends.cuda.enable_flash_sdp(f is plain_step or device.type != "cpu")
            s = seconds(f, device)
            if i >= 2:
                times[name].append(s)
    s = {name: statistics.median(t) for name, t in times.items()}
    rows = 20 * B * T
    matmul = 2 * rows * config.n_embd * 4 * config.n_embd / s.pop("matrix product")

    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{B * T:,} characters per iteration; matrix product: {matmul / 1e9:,.0f} GFLOP/s\n")
    print(f"{'':26}{'ms':>7}{'chars/s':>10}{'GFLOP/s':>9}{'of the matrix product':>23}"
          f"{'of the plain loop':>19}")
    for name in s:
        rate = flops / s[name]
        print(f"{name:26}{s[name] * 1e3:7.0f}{B * T / s[name]:10,.0f}{rate / 1e9:9.0f}"
              f"{rate / matmul:23.0%}{s['a plain float32 loop'] / s[name]:18.2f}x")
    if device.type == "cpu":
        update = "clipping, Muon, AdamW and EMA"
        for name, f in (("forward and backward", gradient),
                        (update, lambda: train.update_weights(run, config))):
            shares = "; ".join(f"{kind} {share:.0%}" for kind, share in profile(f).items())
            gradient()  # the update needs one
            print(f"\n{name}: {shares}")


if __name__ == "__main__":
    main()
