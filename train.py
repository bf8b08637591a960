"""
The training loop: masked batches, the gradient, the optimizers. diffusion.py has the algorithm.

    python data/shakespeare_char/prepare.py
    python train.py --save_filename=X                # CPU or CUDA; the defaults fit the device
    python train.py --save_filename=X --resume       # continue the interrupted run
    python train.py --eval_only --init_from=X        # the NELBO of any checkpoint on any data
    python train.py --save_filename=X --n_layer=2 --n_embd=64 --n_head=1 --max_iters=200   # a toy

N processes, one for each GPU or CPU core, share the work of each iteration. On one machine, run the
first command. On several machines with a shared file system, run the second on each, with a
--node_rank of its own:

    torchrun --standalone --nproc_per_node=N train.py --save_filename=X
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 \\
        --master_port=29500 train.py --save_filename=X

Also writes X.pt.csv, the loss curve, and, until the run is complete, X.pt.state for --resume.
"""

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from diffusion import autoregressive_loss, diffusion_loss, forward_process
from lib.common import check, knob, one_line_errors, open_streams, parse_knobs, say
from lib.data import data_folder, read_meta
from lib.device import pick_device, read_processes
from lib.muon import Muon
from lib.run import begin, evaluate, evaluate_checkpoint, finish, save, set_up, stop_on_signals
from lib.windows import cut_windows


@dataclass
class TrainConfig:
    save_filename: str = knob("unmask", "checkpoint to write, X or X.pt: the best model", "files")
    dataset: str = knob("shakespeare_char", "folder of data/ that prepare.py filled")
    data_dir: str = knob("", "any other folder that prepare.py filled, instead of --dataset")
    init_from: str = knob("", "checkpoint to start from (its model sizes apply) or to evaluate")
    eval_only: bool = knob(False, "print the NELBO of --init_from on both splits, and stop")
    resume: bool = knob(False, "continue the interrupted run of --save_filename")

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
    eval_tokens: int = knob(2**16, "tokens of each split, spread over it; --eval_only: all")
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
    def tokens_per_iteration(self):
        return self.batch_size * self.gradient_accumulation_steps * self.block_size


CUDA_DEFAULTS = dict(n_layer=6, n_head=6, n_embd=384, dropout=0.2, batch_size=64, max_iters=5000)


# -----------------------------------------------------------------------------
# the loop

def train(run):
    """Train until max_iters. Every process runs this loop; only the first one evaluates and writes
    files. run: a lib.run.Run, which holds config, train_data, model, ema (the averaged model),
    optimizers, device, iteration, losses and more."""
    config, processes, mask_id = run.config, run.processes, run.model.config.mask_id
    net = torch.compile(run.model) if config.compile else run.model
    net = DistributedDataParallel(net) if processes.world_size > 1 else net
    loss_function = autoregressive_loss if config.causal else diffusion_loss
    new_losses = []                                          # since the last reading, on the device
    bar = tqdm(total=config.max_iters, initial=run.iteration, unit="it",
               disable=None if processes.rank == 0 else True)  # None: unless stderr is a terminal
    with stop_on_signals(run), bar:
        while run.iteration < config.max_iters and not run.interrupted:
            # draws depend on seed and iteration alone, so an interrupted run can be resumed exactly
            generator = torch.Generator().manual_seed(seed_for(config.seed, run.iteration))
            torch.manual_seed(seed_for(config.seed, run.iteration, 1 + processes.rank))  # dropout
            batch = [get_batch(run.train_data, config, generator, run.record)]      # (B, T)
            if not config.causal:
                batch += forward_process(batch[0], mask_id, config.eps, generator, config.p_max)
            set_learning_rates(run)
            new_losses.append(accumulate_gradient(net, loss_function, batch, run))
            update_weights(run)
            run.iteration += 1
            bar.update()

            last = run.iteration == config.max_iters
            evaluating = last or run.iteration % config.eval_interval == 0
            if (evaluating or run.iteration % config.log_interval == 0
                    or run.stop_requested and processes.world_size == 1):
                speed = read_losses(run, new_losses, evaluating)
                show_progress(run, bar, speed)
                if processes.rank == 0 and evaluating:
                    evaluate(run)
                if evaluating or run.interrupted:
                    save(run)
                run.clock = time.perf_counter()              # evaluating does not count as training


def seed_for(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def get_batch(data, config, generator, record=1):
    """Return input_ids (B, T): the windows of one iteration, of all processes and forward passes.
    Each window begins where a record of the data begins (a Sudoku grid is a record of 91 tokens, a
    text has records of 1). As in LLaDA, 1 % of the batches are cut to a random length, so that the
    model learns to write shorter texts, too."""
    B, T = config.batch_size * config.gradient_accumulation_steps, config.block_size
    if torch.rand((), generator=generator) < 0.01:
        T = int(torch.randint(1, T + 1, (), generator=generator))
    n_starts = (len(data) - T) // record + 1
    return cut_windows(data, record * torch.randint(n_starts, (B,), generator=generator), T)


def accumulate_gradient(net, loss_function, batch, run):
    """Add the gradient of the batch's loss, in gradient_accumulation_steps passes. Of world_size
    processes, each takes every world_size-th row; the last pass averages the gradients of all.
    Returns this process's mean loss, on the device."""
    micro_steps, loss = run.config.gradient_accumulation_steps, 0.0
    rank, world_size = run.processes.rank, run.processes.world_size
    # a window of a rare length is not worth a compilation of its own
    eager = run.config.compile and batch[0].shape[1] < run.config.block_size
    with torch.compiler.set_stance("force_eager") if eager else nullcontext():
        for i in range(micro_steps):
            rows = slice(rank + i * world_size, None, micro_steps * world_size)
            part = [to_device(tensor[rows], run.device) for tensor in batch]
            wait = world_size > 1 and i < micro_steps - 1
            with net.no_sync() if wait else nullcontext(), run.autocast():
                part_loss = loss_function(net, run.model.config.mask_id, *part) / micro_steps
                run.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
    return loss


def to_device(tensor, device):
    if device.type == "cuda":  # from pinned memory, a copy does not wait for the GPU
        tensor = tensor.contiguous().pin_memory()  # p_mask is one column, expanded
    return tensor.to(device, non_blocking=True)


def update_weights(run):
    """Take a step of the optimizers along the gradient, and update the moving average (EMA)."""
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


def make_optimizers(model, config):
    """Return the optimizers: Muon for the blocks' matrices, AdamW for the rest."""
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


# -----------------------------------------------------------------------------
# watching

def read_losses(run, new_losses, evaluating):
    """Move new_losses from the device to run.losses, as means over the processes, and agree on
    whether to stop. FloatingPointError if training has diverged: judged by the loss and, before
    anything is saved, by the weights. Returns the characters per second since the last reading."""
    stop = torch.tensor(float(run.stop_requested), device=run.device)
    readings = torch.stack([*new_losses, stop])
    if run.processes.world_size > 1:
        dist.all_reduce(readings)
    *losses, stop = (readings / run.processes.world_size).tolist()       # waits for the device
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
    return len(losses) * run.config.tokens_per_iteration * run.characters_per_token / seconds


def show_progress(run, bar, speed, seconds=15):
    """Show the loss and the speed in the bar or, where stderr is no terminal, in a line every so
    many seconds, with the time that is left."""
    config = run.config
    loss = np.mean(run.losses[-config.log_interval:])
    text = f"loss {loss:.2f}, {speed:,.0f} characters/s"
    bar.set_postfix_str(text, refresh=False)
    if run.processes.rank == 0 and bar.disable and time.perf_counter() - run.shown > seconds:
        run.shown = time.perf_counter()
        characters = config.tokens_per_iteration * run.characters_per_token
        left = (config.max_iters - run.iteration) * characters / speed / 60
        say(f"iteration {run.iteration:,} of {config.max_iters:,}: {text}, {left:.1f} minutes left",
            sys.stderr)


# -----------------------------------------------------------------------------
# the command line

def parse_args(processes):
    """Return the TrainConfig and the flags that were given, {name: value}. Defaults of the data
    override those of the device."""
    given = parse_knobs(TrainConfig, __doc__, [("on CUDA", CUDA_DEFAULTS)])
    config = TrainConfig(**given)
    meta = read_meta(data_folder(config.dataset, config.data_dir))
    # of several processes, each takes its GPU later, in connect
    alone = processes.world_size == 1
    on_cuda = pick_device(config.device)[0].type == "cuda" if alone else torch.cuda.is_available()
    of_device = CUDA_DEFAULTS if on_cuda else {}
    return TrainConfig(**{**of_device, **meta.get("training", {}), **given}), given


def main():
    advice = "try a smaller --batch_size, with more --gradient_accumulation_steps"
    with one_line_errors(advice):
        processes = read_processes()
    if processes.rank > 0:
        sys.stdout = open(os.devnull, "w")
    with one_line_errors(advice, processes.rank):
        config, given = parse_args(processes)
        if config.eval_only:
            evaluate_checkpoint(config, given, processes)
            return
        run = set_up(config, given, processes, make_optimizers)
        if run.config.warmup_iters >= run.config.max_iters and processes.rank == 0:
            say(f"warning: --warmup_iters={run.config.warmup_iters} is not less than --max_iters="
                f"{run.config.max_iters}: the learning rate will not reach its peak", sys.stderr)
        begin(run)
        try:
            train(run)
            status = finish(run)
        except FloatingPointError as e:
            if processes.rank == 0:
                print(f"error: {e}", file=sys.stderr)
            status = 1
        if processes.world_size > 1:
            dist.destroy_process_group()
        sys.exit(status)


if __name__ == "__main__":
    open_streams()
    main()
