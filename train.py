"""
The forward process: mask a random share of the text, learn to predict it back.

    python data/shakespeare_char/prepare.py
    python train.py --save_filename=X                # CPU or CUDA; the defaults fit the device
    python train.py --save_filename=X --resume       # resume the interrupted run
    python train.py --eval_only --init_from=X        # the NELBO of any checkpoint on any data
    python train.py --save_filename=X --n_layer=2 --n_embd=64 --n_head=1 --max_iters=200   # a toy

N processes, one for each GPU or CPU core, share the work of each iteration. On one machine, run the
first command. On several, with a shared file system, run the second on each, with a --node_rank of
its own:

    torchrun --standalone --nproc_per_node=N train.py --save_filename=X
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 \\
        --master_port=29500 train.py --save_filename=X

Also writes X.pt.csv, the loss curve, and, until the run is complete, X.pt.state for --resume.
"""

import argparse
import copy
import itertools
import json
import math
import os
import signal
import sys
import time
import zlib
try:
    import fcntl
except ImportError:
    fcntl = None
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import check, fail, one_line_errors, open_streams, parse, stop_signals, write_atomically
from model import (GPT, GPTConfig, load_checkpoint, pick_device, pick_dtype, read_file,
                   resolve_path, save_checkpoint, write_file)
from muon import Muon
from tokenizer import decode, encode

# torchrun says which of the run's processes this is, over all machines and on this one
try:
    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = (
        int(os.environ.get(name) or default) for name, default in
        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    check(0 <= RANK < WORLD_SIZE, f"RANK={RANK} and WORLD_SIZE={WORLD_SIZE} do not fit")
except ValueError as e:
    fail(f"{e}: leave RANK and WORLD_SIZE to torchrun, or unset them")


def knob(default, help, group=None):
    """A field of TrainConfig and a flag at once; group begins a group of --help."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass
class TrainConfig:
    save_filename: str = knob("unmask", "checkpoint to write, X or X.pt: the best model", "files")
    dataset: str = knob("shakespeare_char", "folder of data/ that prepare.py filled")
    data_dir: str = knob("", "any other folder that prepare.py filled, instead of --dataset")
    init_from: str = knob("", "checkpoint to start from (its model sizes apply) or to evaluate")
    eval_only: bool = knob(False, "print the NELBO of --init_from on both splits, and stop")
    resume: bool = knob(False, "resume the interrupted run of --save_filename")

    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps (untested)", "device")
    dtype: str = knob("auto", "to compute in: auto, float32, bfloat16 or float16")
    compile: bool = knob(False, "torch.compile the model")

    block_size: int = knob(256, "window length, in tokens: characters or word pieces", "model")
    n_layer: int = knob(4, "blocks")
    n_head: int = knob(4, "attention heads per block; n_embd / n_head = 64 is fast")
    n_embd: int = knob(256, "width of the residual stream")
    dropout: float = knob(0.0, "for runs of many epochs, say 0.2; slow on a CPU")
    bias: bool = knob(False, "biases in Linears and LayerNorms")
    rope: bool = knob(True, "rotary positions; False: GPT-2's learned positions")
    qk_norm: bool = knob(True, "normalize queries and keys, which learns in fewer iterations")
    causal: bool = knob(False, "the autoregressive twin: causal attention, next-token loss")

    max_iters: int = knob(2500, "iterations", "optimization")
    batch_size: int = knob(16, "windows per forward pass, of all processes together")
    gradient_accumulation_steps: int = knob(1, "forward passes per iteration")
    muon: bool = knob(True, "Muon for the blocks' matrices; False: AdamW for everything")
    muon_lr: float = knob(4e-3, "peak learning rate of Muon")
    learning_rate: float = knob(3e-3, "peak learning rate of AdamW; without Muon take 1e-3")
    final_lr_frac: float = knob(0.05, "final learning rate, as a fraction of the peak")
    warmup_iters: int = knob(100, "iterations of linear warm-up")
    weight_decay: float = knob(0.1, "of matrices")
    beta1: float = knob(0.9, "of AdamW")
    beta2: float = knob(0.99, "of AdamW")
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 disables it")
    ema_decay: float = knob(0.999, "decay of the averaged weights, which are saved; 0 disables it")
    eps: float = knob(0.1, "smallest probability of masking: p_mask = (p_max - eps) * t + eps")
    p_max: float = knob(1.0, "largest probability of masking; below 1 for puzzles")
    seed: int = knob(1337, "of weights, batches, masks and dropout")

    eval_interval: int = knob(500, "iterations between evaluations, which save", "evaluation")
    eval_chars: int = knob(2**16, "tokens of each split, spread over it; --eval_only: all")
    eval_passes: int = knob(2, "passes, each with other masks; --eval_only: at least 8")
    log_interval: int = knob(10, "iterations between loss readings")

    def __post_init__(self):
        at_least = dict(max_iters=1, batch_size=1, gradient_accumulation_steps=1, eval_interval=1,
                        log_interval=1, eval_passes=2, warmup_iters=0,
                        learning_rate=0, muon_lr=0, final_lr_frac=0, weight_decay=0, grad_clip=0)
        for name, bound in at_least.items():  # written so that nan is refused, too
            check(bound <= getattr(self, name) < math.inf,
                  f"--{name} must be finite and at least {bound}, not {getattr(self, name)}")
        for name, end in dict(beta1=1, beta2=1, ema_decay=1, eps=1, seed=2**63).items():
            check(0 <= getattr(self, name) < end,
                  f"--{name} must be at least 0 and less than {end}, not {getattr(self, name)}")
        check(self.eps < self.p_max <= 1,
              f"--p_max must be more than --eps={self.eps} and at most 1, not {self.p_max}")

    @property
    def tokens(self):
        """Of one iteration."""
        return self.batch_size * self.gradient_accumulation_steps * self.block_size


CUDA_DEFAULTS = dict(n_layer=6, n_head=6, n_embd=384, dropout=0.2, batch_size=64, max_iters=5000)


# -----------------------------------------------------------------------------
# the algorithm: forward process, loss, loop

def forward_process(input_ids, mask_id, eps=1e-3, generator=None, p_max=1.0):
    """Mask every token independently with probability p_mask, from eps at t = 0 to p_max at t = 1
    (LLaDA, arXiv 2502.09992, sec. 2.1, has p_max = 1). Every row's t is uniform on [0, 1]; together
    they are stratified, one in each of B equal parts of [0, 1], so that a batch meets all amounts
    of masking (MDLM, arXiv 2406.07524). input_ids (B, T): clean tokens x_0, on the CPU; generator:
    a CPU torch.Generator. -> noisy_batch x_t, masked_indices, p_mask, each (B, T)."""
    B, T = input_ids.shape
    t = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    p_mask = ((p_max - eps) * t + eps)[:, None].expand(B, T)
    masked_indices = torch.rand(B, T, generator=generator) < p_mask
    noisy_batch = torch.where(masked_indices, mask_id, input_ids)
    return noisy_batch, masked_indices, p_mask


def token_losses(model, idx, targets, mask_id):
    """Cross-entropy of every target, (B, T), when the model reads idx. [MASK] is never an answer,
    so its logit is cut off."""
    logits = model(idx)[..., :mask_id].float()               # (B, T, mask_id)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def diffusion_loss(model, mask_id, input_ids, noisy_batch, masked_indices, p_mask):
    """LLaDA's eq. 3 per token: the cross-entropy of the masked tokens, each divided by p_mask, over
    B * T. Its expectation is an upper bound on -log p(x_0), except for the shares of masks that eps
    and p_max cut off. A scalar, in nats per token; the tensors are (B, T)."""
    losses = token_losses(model, noisy_batch, input_ids, mask_id)
    return (losses * masked_indices / p_mask).sum() / input_ids.numel()


def autoregressive_loss(model, mask_id, input_ids):
    """What a GPT (causal=True) learns instead: -log p of each token given those before it, exactly.
    A scalar, in nats per token."""
    return next_token_losses(model, mask_id, input_ids).mean()


def next_token_losses(model, mask_id, input_ids):
    """(B, T). The twin reads [MASK] + x[:-1] and predicts x: the first token is scored too."""
    shifted = F.pad(input_ids[:, :-1], (1, 0), value=mask_id)
    return token_losses(model, shifted, input_ids, mask_id)


def train(run):
    """The loop. Every process runs it; the first one alone evaluates and writes files."""
    config, mask_id = run.config, run.model.config.mask_id
    net = torch.compile(run.model) if config.compile else run.model
    net = DistributedDataParallel(net) if WORLD_SIZE > 1 else net
    loss_function = autoregressive_loss if config.causal else diffusion_loss
    new_losses = []                                          # since the last reading, on the device
    bar = tqdm(total=config.max_iters, initial=run.iteration, unit="it",
               disable=None if RANK == 0 else True)          # None: unless stderr is a terminal
    with stop_on_signals(run), bar:
        while run.iteration < config.max_iters and not run.interrupted:
            # draws depend on seed and iteration alone, however often a run is interrupted
            generator = torch.Generator().manual_seed(seed_for(config.seed, run.iteration))
            torch.manual_seed(seed_for(config.seed, run.iteration, 1 + RANK))  # for dropout
            batch = [get_batch(run.train_data, config, generator, run.record)]      # (B, T)
            if not config.causal:
                batch += forward_process(batch[0], mask_id, config.eps, generator, config.p_max)
            set_learning_rates(run)
            # a window of a rare length is not worth a compilation of its own
            eager = config.compile and batch[0].shape[1] < config.block_size
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                new_losses.append(accumulate_gradient(net, loss_function, batch, run))
            update_weights(run)
            run.iteration += 1
            bar.update()

            last = run.iteration == config.max_iters
            evaluating = last or run.iteration % config.eval_interval == 0
            if (evaluating or run.iteration % config.log_interval == 0
                    or run.stop_requested and WORLD_SIZE == 1):
                speed = read_losses(run, new_losses, evaluating)
                show_progress(run, bar, speed)
                if RANK == 0 and evaluating:
                    evaluate(run)
                if evaluating or run.interrupted:
                    save(run)
                run.clock = time.perf_counter()


# -----------------------------------------------------------------------------
# what the loop calls

def say(text):
    """Print a line above the bar. Standard output may go away; the run does not end with it."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


def seed_for(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def windows(data, starts, length):
    """The windows of data (N,) that begin at starts (B,) -> (B, length) long."""
    positions = starts[:, None] + torch.arange(length)       # (B, length)
    return torch.from_numpy(np.asarray(data)[positions.numpy()].astype(np.int64))


def spread_windows(data, n_tokens, length):
    """As many windows of data (N,) as n_tokens hold, spread evenly over it, one after the other."""
    n_windows = min(n_tokens, len(data)) // length
    starts = length * torch.linspace(0, len(data) // length - 1, n_windows).round().long()
    return windows(data, starts, length).flatten().numpy()


def get_batch(data, config, generator, record=1):
    """-> input_ids (B, T): the windows of one iteration, of all processes and forward passes.
    Each begins where a record begins; data is a whole number of records."""
    B, T = config.batch_size * config.gradient_accumulation_steps, config.block_size
    if torch.rand((), generator=generator) < 0.01:           # as in LLaDA: 1 % are shorter
        T = int(torch.randint(1, T + 1, (), generator=generator))
    n_starts = (len(data) - T) // record + 1
    return windows(data, record * torch.randint(n_starts, (B,), generator=generator), T)


def set_learning_rates(run):
    """Linear warm-up to the peak, then half a cosine down to final_lr_frac of it at max_iters."""
    config = run.config
    if run.iteration < config.warmup_iters:
        fraction = (run.iteration + 1) / (config.warmup_iters + 1)
    else:
        decay_iters = config.max_iters - config.warmup_iters
        cosine = math.cos(math.pi * (run.iteration - config.warmup_iters) / decay_iters)
        fraction = config.final_lr_frac + (1 - config.final_lr_frac) * 0.5 * (1 + cosine)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction


def accumulate_gradient(net, loss_function, batch, run):
    """Add the gradient of the batch's loss, in gradient_accumulation_steps passes. Each process
    takes the rows RANK, RANK + WORLD_SIZE, ...; the last pass averages the gradients of all.
    -> this process's mean loss, on the device."""
    micro_steps, loss = run.config.gradient_accumulation_steps, 0.0
    for i in range(micro_steps):
        rows = slice(RANK + i * WORLD_SIZE, None, micro_steps * WORLD_SIZE)
        part = [to_device(tensor[rows], run.device) for tensor in batch]
        wait = WORLD_SIZE > 1 and i < micro_steps - 1
        with net.no_sync() if wait else nullcontext(), run.autocast:
            part_loss = loss_function(net, run.model.config.mask_id, *part) / micro_steps
            run.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
    return loss


def to_device(tensor, device):
    if device.type == "cuda":  # from pinned memory, a copy does not wait for the GPU
        tensor = tensor.contiguous().pin_memory()  # p_mask is one column, expanded
    return tensor.to(device, non_blocking=True)


def update_weights(run):
    """A step of the optimizers along the gradient, and of the moving average (EMA)."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_clip or math.inf)
    if not run.scaler.is_enabled() or norm.isfinite():       # float16: an overflow skips the step
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    decay = min(run.config.ema_decay, (1 + run.iteration) / (10 + run.iteration))  # short at first
    with torch.no_grad():
        for average, p in zip(run.ema.parameters(), run.model.parameters()):
            average.lerp_(p, 1 - decay)


def make_optimizers(model, config):
    """Muon for the blocks' matrices, AdamW for the rest."""
    blocks = [p for p in model.h.parameters() if p.ndim == 2]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and name[:2] != "h."]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decayed = embeddings if config.muon else embeddings + blocks
    groups = [dict(params=decayed, weight_decay=config.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True,
                                    betas=(config.beta1, config.beta2))]
    if config.muon:
        optimizers.append(Muon(blocks, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def read_losses(run, new_losses, evaluating):
    """Move new_losses from the device to run.losses, as means over the processes, and agree on
    whether to stop. FloatingPointError if training has diverged: by the loss and, before anything
    is saved, by the weights. -> characters per second since the last reading."""
    stop = torch.tensor(float(run.stop_requested), device=run.device)
    readings = torch.stack([*new_losses, stop])
    if WORLD_SIZE > 1:
        dist.all_reduce(readings)
    *losses, stop = (readings / WORLD_SIZE).tolist()         # waits for the device
    run.losses += [loss / run.characters_per_token for loss in losses]
    run.interrupted = stop > 0
    seconds = time.perf_counter() - run.clock
    new_losses.clear()
    finite = math.isfinite(losses[-1])
    if evaluating or run.interrupted:
        finite = finite and all(p.isfinite().all() for p in run.ema.parameters())
    if not finite:
        raise FloatingPointError(f"training diverged at iteration {run.iteration:,} (loss "
                                 f"{losses[-1]}). Earlier checkpoints are intact; try a lower "
                                 "learning rate")
    return len(losses) * run.config.tokens * run.characters_per_token / seconds


def show_progress(run, bar, speed):
    """The loss and the speed, in the bar; where stderr is no terminal, in a line now and then."""
    interval = run.config.log_interval
    loss = np.mean(run.losses[-interval:])
    text = f"loss {loss:.2f}, {speed:,.0f} characters/s"
    bar.set_postfix_str(text, refresh=False)
    first_or_tenth = run.iteration <= interval or run.iteration % (10 * interval) == 0
    if RANK == 0 and bar.disable and first_or_tenth:
        print(f"iteration {run.iteration:,}: {text}", file=sys.stderr, flush=True)


@contextmanager
def stop_on_signals(run):
    """Ctrl-C, SIGTERM (of schedulers) and SIGHUP ask the run to stop after the iteration; a second
    signal does not wait."""
    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(*_):
        run.stop_requested = True
        restore()
        say("stopping soon")
    previous = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        yield
    finally:
        restore()


# -----------------------------------------------------------------------------
# measurement

@torch.no_grad()
def estimate_nelbo(model, data, passes=8, batch_size=64, seed=0, autocast=nullcontext()):
    """The bound, measured with little noise (LLaDA eq. 14; arXiv 2409.02908 eq. 7): mask exactly n
    of a window's L tokens, n uniform on 1..L, and take the mean cross-entropy of those n. Its
    expectation is the NELBO per token. A pass covers all windows of block_size tokens once, with n
    spread evenly over 1..L; the last, shorter window is left out. The same seed gives every
    model the same masks. data (N,) ids; model: a GPT in eval mode, or any module with a config.
    -> (mean over the passes, at least 2, and its standard error), in nats per token."""
    L, mask_id = model.config.block_size, model.config.mask_id
    device, W = next(model.parameters()).device, len(data) // L
    g = torch.Generator().manual_seed(seed)
    means = []
    for _ in tqdm(range(passes), desc="evaluating", leave=False, disable=None):
        u = (torch.randperm(W, generator=g) + torch.rand(W, generator=g, dtype=torch.float64)) / W
        n = (u * L).long() + 1                                                     # (W,) in 1..L
        total = 0.0
        for w in torch.arange(W).split(batch_size):
            input_ids = windows(data, w * L, L)                                    # (B, L)
            rank = torch.rand(len(w), L, generator=g).argsort(dim=1).argsort(dim=1)
            masked_indices = rank < n[w, None]                                     # n in each row
            noisy_batch = torch.where(masked_indices, mask_id, input_ids)
            with autocast:
                losses = token_losses(model, noisy_batch.to(device), input_ids.to(device), mask_id)
            total += ((losses.cpu() * masked_indices).sum(dim=1).double() / n[w]).sum().item()
        means.append(total / W)
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(passes))


@torch.no_grad()
def estimate_nll(model, data, batch_size=64, autocast=nullcontext()):
    """estimate_nelbo's counterpart for the causal twin, on the same windows, but exact: -> (mean
    over the windows, and its standard error), in nats per token."""
    L, device = model.config.block_size, next(model.parameters()).device
    nll = []
    for starts in torch.arange(0, len(data) - L + 1, L).split(batch_size):
        with autocast:
            input_ids = windows(data, starts, L).to(device)
            nll.append(next_token_losses(model, model.config.mask_id, input_ids).mean(dim=1).cpu())
    nll = torch.cat(nll).double()                                                  # (W,)
    se = float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else math.inf      # one: unknown
    return float(nll.mean()), se


def measure(model, data, chars, passes, batch_size, autocast):
    """-> (name, nats per character, standard error): the bound or, of the twin, the exact value.
    The windows' sum over their tokens is divided by their number of characters, so that models of
    different vocabularies can be compared. The standard error of the bound is over passes, that of
    the exact value over windows."""
    if model.config.causal:
        name, (nats, se) = "NLL", estimate_nll(model, data, batch_size, autocast)
    else:
        name, (nats, se) = "NELBO", estimate_nelbo(model, data, passes, batch_size,
                                                   autocast=autocast)
    L = model.config.block_size
    length = characters_per_token(data[:len(data) // L * L], chars)
    return name, nats / length, se / length


def characters_per_token(data, chars):
    """The mean over data (N,) ids: 1 for a vocabulary of characters."""
    lengths = np.array([len(token) for token in chars], dtype=np.uint16)
    return float(lengths[data].mean(dtype=np.float64))


def evaluate(run):
    """Measure both splits, save the model if it is the best so far, add a row to the loss curve."""
    config, loss = run.config, float(np.mean(run.losses))
    row = dict(iteration=run.iteration, minutes=run.minutes(), loss=loss)
    for split, data in (("train", run.train_data), ("val", run.val_data)):
        name, row[split], row[f"{split}_se"] = measure(
            run.ema, spread_windows(data, config.eval_chars, config.block_size), run.chars,
            config.eval_passes, config.batch_size, run.autocast)
        say(f"iteration {run.iteration:,}: {split} {name} {row[split]:.4f} +- "
            f"{row[f'{split}_se']:.4f} nats per character")
    run.losses.clear()
    run.history.append(row)
    if row is run.best():
        save_model(run)
    lines = [row.keys(), *(row.values() for row in run.history)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_atomically(f"{run.path}.csv", text.encode())


def evaluate_checkpoint(config, given):
    """--eval_only: the NELBO of --init_from, on all of both splits."""
    check(WORLD_SIZE == 1, "--eval_only is for one process: python in place of torchrun")
    check(config.init_from, "--eval_only needs --init_from=X, the checkpoint to evaluate")
    path = resolve_path(config.init_from)
    device, why_device = pick_device(config.device)
    dtype, why_dtype = pick_dtype(config.dtype, device)
    model, chars, info = load_checkpoint(path, device)
    adopt_sizes(config, given, model.config)
    train_data, val_data, _ = load_data(config, config.block_size, chars)
    say(f"device: {device} ({why_device})\ndtype: {name_of(dtype)} ({why_dtype})")
    say(f"{path}: iteration {info.get('iteration')}")
    for split, data in (("train", train_data), ("val", val_data)):
        name, nats, se = measure(model, data, chars, max(8, config.eval_passes),
                                 config.batch_size, autocast_to(dtype, device))
        say(f"{split} {name} {nats:.4f} +- {se:.4f} nats per character")


# -----------------------------------------------------------------------------
# data

def folder_of(config):
    if config.data_dir:
        return Path(config.data_dir).expanduser()
    return Path(__file__).resolve().parent / "data" / config.dataset


def read_meta(folder):
    """-> what prepare.py wrote to meta.json, or {} where there is nothing of it: "chars", "crc32"
    and, of some data, "record" (the data consist of records of so many tokens) and "training"
    (what TrainConfig takes for it instead of its defaults)."""
    try:
        return dict(json.loads((folder / "meta.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def load_data(config, block_size, chars=None, grow=False):
    """-> (train, val, chars): both splits as uint16 ids (N,), memory maps of the .bin files, and
    the vocabulary. With chars, a model's vocabulary, the text is encoded in it; new characters are
    added at its end if it may grow. ValueError for anything that can't be trained on."""
    folder = folder_of(config)
    bins = [folder / "train.bin", folder / "val.bin"]
    for path in (folder / "meta.json", *bins):
        check(path.is_file(), f"there is no {path.name} in {folder}; prepare.py writes it")
    meta = read_meta(folder)
    crc32 = {path.name: zlib.crc32(path.read_bytes()) for path in bins}
    data_chars = meta.get("chars")
    check(meta.get("crc32") == crc32 and isinstance(data_chars, list),
          f"meta.json, train.bin and val.bin in {folder} do not belong together, or one is "
          "damaged: run prepare.py again")
    record = meta.get("record", 1)
    check(block_size % record == 0, f"--block_size={block_size} is no whole number of records of "
                                    f"{record} characters, of which {folder} consists")
    chars = chars or data_chars
    unknown = sorted(set("".join(data_chars)) - set(chars))
    check(grow or not unknown, f"{folder} has characters that the model does not know: "
                               f"{''.join(unknown[:20])!r}")
    chars, splits = chars + unknown, []
    for path in bins:
        ids = np.memmap(path, dtype="<u2", mode="r")
        if data_chars != chars:
            ids = encode(decode(ids, data_chars), chars)
        check(len(ids) >= block_size,
              f"{path} has {len(ids)} tokens, fewer than one --block_size={block_size}")
        splits.append(ids)
    return *splits, chars


# -----------------------------------------------------------------------------
# the run and its files

@dataclass
class Run:
    """A training run. What parts() and PROGRESS name is saved in X.pt.state for --resume."""
    config: TrainConfig
    path: Path              # X.pt; beside it X.pt.csv and X.pt.state
    chars: list             # the vocabulary: chars[i] is the token of id i
    characters_per_token: float    # of train_data; 1 for a vocabulary of characters
    train_data: np.ndarray  # (N,) ids
    val_data: np.ndarray
    data_crc32: int         # of train_data: --resume must find the same data
    device: torch.device
    dtype: torch.dtype
    model: GPT
    ema: GPT                # the moving average of model's weights: what is evaluated and saved
    optimizers: list
    scaler: torch.amp.GradScaler   # of the loss; for float16 only
    autocast: object        # the context in which the model computes in dtype
    record: int = 1         # tokens of a record of the data
    iteration: int = 0
    losses: list = field(default_factory=list)     # of the iterations since the last evaluation
    history: list = field(default_factory=list)    # a row of X.pt.csv for each evaluation
    started: float = field(default_factory=time.perf_counter)
    clock: float = field(default_factory=time.perf_counter)    # at the last loss reading
    resumed: bool = False
    lock: object = None             # the state file, held open
    stop_requested: bool = False    # of this process
    interrupted: bool = False       # all processes agree

    def parts(self):
        optimizers = {f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return dict(model=self.model, ema=self.ema, scaler=self.scaler, **optimizers)

    def minutes(self):
        return (time.perf_counter() - self.started) / 60

    def best(self):
        return min(self.history, key=lambda row: row["val"])


PROGRESS = ("iteration", "losses", "history")
# what may differ between an interrupted run and its --resume
FREE_ON_RESUME = {"resume", "save_filename", "device", "compile", "dataset", "data_dir",
                  "eval_interval", "eval_chars", "eval_passes", "log_interval"}


def save_state(run):
    """X.pt.state: all that --resume needs."""
    state = {name: part.state_dict() for name, part in run.parts().items()}
    state |= {name: getattr(run, name) for name in PROGRESS}
    state |= dict(config=asdict(run.config), chars=run.chars, dtype=name_of(run.dtype),
                  minutes=run.minutes(), data_crc32=run.data_crc32)
    write_file(f"{run.path}.state", state)
    run.lock = lock(f"{run.path}.state")


def lock(path):
    """Open a file of this run and lock it as long as the process lives. ValueError if another
    process has it locked. (Windows has no fcntl: no check.)"""
    file = open(path, "rb")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise ValueError(f"another run is writing {path}: wait for its end, or take another "
                         "--save_filename") from e
    return file


def load_state(run, state):
    check(state["data_crc32"] == run.data_crc32,
          f"the data are not those of the interrupted run of {run.path}: give its --data_dir")
    try:
        for name, part in run.parts().items():
            part.load_state_dict(state[name])
        for name in PROGRESS:
            setattr(run, name, state[name])
        run.started -= 60 * state["minutes"]
    except (LookupError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{run.path}.state does not fit its run; remove it to start afresh") from e
    run.resumed = True


def save_model(run):
    launcher = "python" if WORLD_SIZE == 1 else f"torchrun --nproc_per_node={WORLD_SIZE}"
    row = run.history[-1] if run.history else {}
    save_checkpoint(run.path, run.ema, run.chars, iteration=run.iteration, minutes=run.minutes(),
                    nelbo={split: row.get(split) for split in ("train", "val")},
                    device=str(run.device), dtype=name_of(run.dtype), record=run.record,
                    hyperparameters=asdict(run.config),
                    command=" ".join([launcher, "train.py", *sys.argv[1:]]))


def save(run):
    """The first process writes what the run needs to go on; the others wait for it."""
    if RANK == 0:
        if not run.history:
            save_model(run)  # interrupted before the first evaluation
            Path(f"{run.path}.csv").unlink(missing_ok=True)  # of an earlier run
        save_state(run)
    if WORLD_SIZE > 1:
        dist.barrier()


def back_up(path):
    """Copy what an earlier run left at path to a free name. -> that name, or None."""
    def files_of(path):
        return [end for end in ("", ".csv", ".state") if Path(f"{path}{end}").exists()]
    if not files_of(path):
        return None
    names = (path.with_name(f"{path.stem}_backup{n}{path.suffix}") for n in itertools.count(1))
    backup = next(name for name in names if not files_of(name))
    for end in files_of(path):
        write_atomically(f"{backup}{end}", Path(f"{path}{end}").read_bytes())
    return backup


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def autocast_to(dtype, device):
    """The context in which the model computes in dtype. Its weights stay float32."""
    if device.type == "cpu":
        # In bfloat16, attention by plain matrix products trains faster on a CPU than the flash
        # kernel (tests/benchmarks/training.py). Despite their names, the switches apply to CPUs.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def connect(name):
    """pick_device; with several processes, give each its own GPU and connect them."""
    device, why = pick_device(name)
    if WORLD_SIZE > 1:
        check(device.index is None and device.type != "mps",
              f"--device={name} is one device for {WORLD_SIZE} processes; use cpu or cuda")
        if device.type == "cuda":
            gpus = torch.cuda.device_count()
            check(LOCAL_WORLD_SIZE <= gpus, f"{LOCAL_WORLD_SIZE} processes for {gpus} GPUs: give "
                  f"torchrun --nproc_per_node={gpus}, or train.py --device=cpu")
            device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))  # the others wait for evaluations
        why += f"; {WORLD_SIZE} processes"
    return device, why


def find_state(config, given, path):
    """-> the state and config of the interrupted run to resume, or (None, config) to start afresh.
    What is given on the command line must not contradict the interrupted run."""
    state_path = Path(f"{path}.state")
    if state_path.is_file() and RANK == 0:
        lock(state_path).close()  # ValueError if another process is writing it
    if not config.resume:
        if state_path.exists():
            say(f"found an interrupted run of {path} (--resume continues it); starting afresh")
        return None, config
    if not state_path.exists():
        if path.is_file():
            say(f"{path} is complete: nothing to resume. To train it further: --init_from={path}")
            sys.exit()
        say(f"no interrupted run of {path} to resume: starting afresh")
        return None, config
    state = read_file(state_path)
    try:
        config = TrainConfig(**state["config"])
        state["chars"], state["dtype"], state["data_crc32"]  # KeyError if one is missing
    except (TypeError, LookupError) as e:
        raise ValueError(f"{state_path} is not a training state of this version; remove it to "
                         "start afresh") from e
    for name, value in given.items():
        check(name in FREE_ON_RESUME or value == getattr(config, name),
              f"--{name}={value} is not what the interrupted run had ({getattr(config, name)}): "
              "leave it out to resume, or leave out --resume to start afresh")
        setattr(config, name, value)
    return state, config


def adopt_sizes(config, given, model_config, free=()):
    """Make config's model sizes those of the checkpoint, all but free ones that are given."""
    for name, value in asdict(model_config).items():
        if name not in ("vocab_size", "dropout") and not (name in free and name in given):
            check(given.get(name, value) == value,
                  f"--{name}={given.get(name)} is not what {config.init_from} has ({value})")
            setattr(config, name, value)


def set_up(config, given):
    """All that can go wrong before training starts. -> Run."""
    path = resolve_path(config.save_filename)
    state, config = find_state(config, given, path)
    if path.exists() and not state:
        read_file(path)  # ValueError for what is no checkpoint: it is not to be replaced by one
    check(config.batch_size % WORLD_SIZE == 0,
          f"--batch_size={config.batch_size} is not a multiple of the {WORLD_SIZE} processes")
    device, why_device = connect(config.device)
    dtype, why_dtype = pick_dtype(state["dtype"] if state else config.dtype, device)
    if WORLD_SIZE > 1:  # the first process's measurement decides for all
        choice = [dtype]
        dist.broadcast_object_list(choice)
        [dtype] = choice
    chars, base = state["chars"] if state else None, None
    if config.init_from and not state:
        base, chars, _ = load_checkpoint(resolve_path(config.init_from))
        adopt_sizes(config, given, base.config, free=("qk_norm", "causal"))  # they have no weights
    check(config.eval_chars >= config.block_size, f"--eval_chars must be at least the block_size, "
                                                  f"{config.block_size}, not {config.eval_chars}")
    train_data, val_data, chars = load_data(config, config.block_size, chars, grow=bool(base))
    torch.manual_seed(config.seed)
    sizes = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    model = GPT(GPTConfig(vocab_size=len(chars) + 1, **sizes))
    if base:
        weights, known = base.state_dict(), base.config.mask_id
        embeddings = model.wte.weight.detach().clone()       # of new characters: as initialized
        embeddings[:known], embeddings[-1] = base.wte.weight[:known], base.wte.weight[-1]
        model.load_state_dict({**weights, "wte.weight": embeddings})
    model.to(device)
    run = Run(config, path, chars, characters_per_token(train_data, chars), train_data, val_data,
              zlib.crc32(train_data), device, dtype, model,
              ema=copy.deepcopy(model).eval().requires_grad_(False),
              optimizers=make_optimizers(model, config), autocast=autocast_to(dtype, device),
              scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
              record=read_meta(folder_of(config)).get("record", 1))
    if state:
        load_state(run, state)
    say(f"device: {device} ({why_device})\ndtype: {name_of(dtype)} ({why_dtype})")
    say(f"sizes: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, dropout "
          f"{config.dropout}; {sum(p.numel() for p in model.parameters()):,} parameters")
    say(f"characters per iteration: {config.tokens * run.characters_per_token:,.0f}; "
        f"{config.max_iters:,} iterations are "
        f"{config.max_iters * config.tokens / len(train_data):.1f} epochs")
    return run


def begin(run):
    """Make room at run.path, and leave what --resume looks for."""
    if run.resumed:
        run.lock = lock(f"{run.path}.state") if RANK == 0 else None
        say(f"resuming {run.path} at iteration {run.iteration:,}")
    elif RANK == 0:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        backup = back_up(run.path)
        if backup:
            say(f"kept the existing {run.path} as {backup}")
        save_state(run)


def finish(run):
    """Say how the run ended. -> exit status."""
    if run.interrupted and run.iteration < run.config.max_iters:
        holds = "the best model so far" if run.history else "the model as it is now"
        say(f"interrupted at iteration {run.iteration:,}; {run.path} holds {holds}. The same "
              "command with --resume continues the run")
        return 130
    if RANK == 0:
        os.unlink(f"{run.path}.state")
        best = run.best()
        say(f"done in {run.minutes():.1f} minutes. {run.path} holds the best model: iteration "
              f"{best['iteration']:,}, {best['val']:.4f} nats per character on validation; "
              f"{run.path}.csv holds the loss curve. Now: python main.py --path={run.path}")
    return 0


# -----------------------------------------------------------------------------
# the command line

def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def parse_args(argv=None):
    """-> (TrainConfig, the flags that were given). Every field is a flag: --key=value, --key value,
    and --key alone for a switch."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    for f in fields(TrainConfig):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default = f.default if f.default != "" else "none"
        if f.name in CUDA_DEFAULTS:
            default = f"{default}; on CUDA {CUDA_DEFAULTS[f.name]}"
        kind = dict(nargs="?", const=True, type=boolean) if f.type is bool else dict(type=f.type)
        group.add_argument(f"--{f.name}", metavar=f.type.__name__, **kind,
                           help=f"{f.metadata['help']} (default: {default})")
    given = vars(parse(parser, argv))
    on_cuda = pick_device(given.get("device", "auto"))[0].type == "cuda"
    of_device = CUDA_DEFAULTS if on_cuda else {}
    of_data = read_meta(folder_of(TrainConfig(**given))).get("training", {})
    return TrainConfig(**{**of_device, **of_data, **given}), given


def main():
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    advice = "try a smaller --batch_size, with more --gradient_accumulation_steps"
    with one_line_errors(advice, RANK):
        config, given = parse_args()
        if config.eval_only:
            evaluate_checkpoint(config, given)
            return
        run = set_up(config, given)
        begin(run)
        try:
            train(run)
            status = finish(run)
        except FloatingPointError as e:
            if RANK == 0:
                print(f"error: {e}", file=sys.stderr)
            status = 1
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        sys.exit(status)


if __name__ == "__main__":
    open_streams()
    main()
