"""
The training loop: mask a batch, take the gradient of the loss, take a step, evaluate now and then.
diffusion.py has the algorithm, model.py the network.

    python data/shakespeare_char/prepare.py
    python train.py --save_filename=X                # CPU or CUDA; the defaults fit the device
    python train.py --save_filename=X --resume       # continue the interrupted run
    python train.py --eval_only --init_from=X        # the NELBO of any checkpoint on any data
    python train.py --save_filename=X --n_layer=2 --n_embd=64 --n_head=1 --max_iters=200   # a toy

At each evaluation, a run writes X.pt.csv (the loss curve), X.pt (if the model is the best so far)
and X.pt.state. --resume continues from X.pt.state, which is also written at the start and when the
run is stopped, and is removed at the end.

N processes, one for each GPU or CPU core, share the work of each iteration. On one machine, use the
first torchrun below (if it hangs, add --local-addr=127.0.0.1: the machine does not know its own
name). On several machines with a shared file system, use the second on each, with its own
--node_rank:

    torchrun --standalone --nproc_per_node=N train.py --save_filename=X
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 \\
        --master_port=29500 train.py --save_filename=X
"""

import lib  # isort: skip  # noqa: F401  # before torch: see lib/__init__.py

import copy
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from diffusion import diffusion_loss, forward_process
from lib.checkpoint import load_checkpoint, resolve_path
from lib.common import check, knob, one_line_errors, open_streams, parse_knobs, say
from lib.data import cut_windows, data_folder, load_data, read_meta
from lib.device import autocast, choose_attention, connect, pick_dtype, read_processes
from lib.evaluate import evaluate, short_sample
from lib.muon import make_optimizers
from lib.run import Files, Progress, best, stop_on_signals
from lib.twin import autoregressive_loss
from model import GPT, GPTConfig


@dataclass
class Run:
    """All that changes while a model is trained. --resume restores it."""
    model: GPT
    ema: GPT                        # the model's averaged weights (EMA), evaluated and saved
    optimizers: list
    scaler: torch.amp.GradScaler    # scales the loss; active for float16 only
    iteration: int = 0              # how many iterations are done
    minutes: float = 0.0            # how long they took, with evaluations
    losses: list = field(default_factory=list)     # since the last evaluation, nats per character
    history: list = field(default_factory=list)    # a row of X.pt.csv for each evaluation


# -----------------------------------------------------------------------------
# the loop

def train(run, config, data, files, processes):
    """Train until max_iters or until a signal. Every process runs this loop; the first one (rank 0)
    also evaluates, prints and writes files. config: TrainConfig; data: lib.data.Data; files:
    lib.run.Files; processes: lib.device.Processes. Returns True if a signal has ended it."""
    mask_id, alone = run.model.config.mask_id, processes.world_size == 1
    net = torch.compile(run.model) if config.compile else run.model
    net = net if alone else DistributedDataParallel(net)
    loss_function = autoregressive_loss if config.causal else diffusion_loss
    started = time.perf_counter() - 60 * run.minutes  # as if the run had never been interrupted
    interrupted, unread_losses = False, []
    with stop_on_signals() as signals, Progress(run, config, data, processes) as progress:
        while True:
            if interrupted or evaluation_is_due(run, config):
                run.minutes = (time.perf_counter() - started) / 60
                if processes.rank == 0:
                    row = None if interrupted else evaluate(run, config, data, alone and signals)
                    interrupted = row is None  # if alone, a signal ends the evaluation early
                    files.leave_name_to_others()
                    if row:
                        run.history.append(row)
                        run.losses.clear()
                        files.save_curve(run.history)
                    unsaved = not run.history or not files.path.exists()
                    if unsaved or row is best(run.history):
                        files.save_model(run, config, data)
                    files.save_state(run, config, data)
                    if row:
                        say(f"sample: {short_sample(run.ema, config, data)}")
                if not alone:
                    dist.barrier()
                progress.clock = time.perf_counter()  # the speed is that of training alone
            if interrupted or run.iteration == config.max_iters:
                return interrupted

            # batch and masks depend on seed and iteration alone, dropout also on the rank (NumPy
            # ignores a final 0, hence 1 + rank), so --resume draws the same
            generator = torch.Generator().manual_seed(seed_for(config.seed, run.iteration))
            torch.manual_seed(seed_for(config.seed, run.iteration, 1 + processes.rank))
            input_ids = get_batch(data.train, config, generator, data.record)     # (B, T)
            noisy_batch, masked_indices, p_mask = forward_process(
                input_ids, mask_id, config.eps, generator, config.p_max)          # each (B, T)
            if data.prompt_length:  # of pairs, only the answers are masked
                masked_indices[:, :data.prompt_length] = False
                noisy_batch = torch.where(masked_indices, mask_id, input_ids)
                p_mask = p_mask * (1 - data.prompt_length / data.record)  # loss per token of these
            batch = (input_ids, noisy_batch, masked_indices, p_mask)
            set_learning_rates(run, config)
            unread_losses.append(add_gradient(net, loss_function, batch, run, config, processes))
            update_weights(run, config)
            run.iteration += 1
            progress.update()

            # reading a loss stalls until the device is done, so several are read together
            if (run.iteration % config.log_interval == 0 or evaluation_is_due(run, config)
                    or alone and signals):
                interrupted = read_losses(run, unread_losses, signals, data, processes)
                progress.show(run.iteration, np.mean(run.losses[-config.log_interval:]))


# -----------------------------------------------------------------------------
# what the loop calls: batches and gradients

def seed_for(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def get_batch(data, config, generator, record=1):
    """Return all windows of one iteration, for all processes and forward passes: input_ids (B, T),
    cut from the token ids data. Each window begins where a record of the data begins (a Sudoku grid
    is a record of 91 tokens; in a text, each token is a record). As in LLaDA, 1 % of the batches
    are cut to a random length, so that the model learns to write shorter texts too."""
    B, T = config.batch_size * config.gradient_accumulation_steps, config.block_size
    if torch.rand((), generator=generator) < 0.01:
        T = int(torch.randint(1, T + 1, (), generator=generator))
    n_starts = (len(data) - T) // record + 1
    starts = record * torch.randint(n_starts, (B,), generator=generator)
    return torch.from_numpy(cut_windows(data, starts.numpy(), T))


def add_gradient(net, loss_function, batch, run, config, processes):
    """Add the gradient of the loss to that of the weights, in gradient_accumulation_steps passes.
    batch: the arguments of loss_function after mask_id, each (B, T). Each process takes every
    world_size-th row; in the last pass, DistributedDataParallel averages the gradients over the
    processes. Returns this process's mean loss, on the device."""
    micro_steps, loss, device = config.gradient_accumulation_steps, 0.0, run.model.wte.weight.device
    rank, world_size = processes.rank, processes.world_size
    # a window of a rare length is not worth a compilation of its own
    eager = config.compile and batch[0].shape[1] < config.block_size
    with torch.compiler.set_stance("force_eager") if eager else nullcontext():
        for i in range(micro_steps):
            rows = slice(rank + i * world_size, None, micro_steps * world_size)
            part = [to_device(tensor[rows], device) for tensor in batch]
            not_last = world_size > 1 and i < micro_steps - 1
            with net.no_sync() if not_last else nullcontext(), autocast(config.dtype, device):
                part_loss = loss_function(net, run.model.config.mask_id, *part) / micro_steps
                run.scaler.scale(part_loss).backward()
            loss += part_loss.detach()
    return loss


def to_device(tensor, device):
    if device.type == "cuda":  # from pinned memory, a copy does not wait for the GPU
        tensor = tensor.contiguous().pin_memory()  # contiguous: p_mask is one column, expanded
    return tensor.to(device, non_blocking=True)


def update_weights(run, config):
    """Take a step of the optimizers along the gradient, and update the moving average (EMA)."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    if not run.scaler.is_enabled() or norm.isfinite():  # float16: an overflow skips the step
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad(set_to_none=True)
    decay = min(config.ema_decay, (1 + run.iteration) / (10 + run.iteration))  # smaller at first
    with torch.no_grad():
        for average, p in zip(run.ema.parameters(), run.model.parameters()):
            average.lerp_(p, 1 - decay)


def set_learning_rates(run, config):
    """Linear warm-up to the peak, then half a cosine down to final_lr_frac of it at max_iters."""
    if run.iteration < config.warmup_iters:
        fraction = (run.iteration + 1) / (config.warmup_iters + 1)
    else:
        decay_iters = config.max_iters - config.warmup_iters
        cosine = math.cos(math.pi * (run.iteration - config.warmup_iters) / decay_iters)
        fraction = config.final_lr_frac + (1 - config.final_lr_frac) * 0.5 * (1 + cosine)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction


# -----------------------------------------------------------------------------
# what the loop calls: watching and saving

def read_losses(run, unread_losses, signals, data, processes):
    """Move unread_losses to run.losses: copied from the device, averaged over the processes, and
    converted from nats per token to nats per character. Returns whether any process got a signal,
    so that all stop together. FloatingPointError if training has diverged."""
    stop = torch.tensor(float(len(signals)), device=unread_losses[0].device)
    readings = torch.stack([*unread_losses, stop])
    if processes.world_size > 1:
        dist.all_reduce(readings)
    *losses, stop = (readings / processes.world_size).tolist()           # waits for the device
    unread_losses.clear()
    run.losses += [loss / data.characters_per_token for loss in losses]
    if not (math.isfinite(losses[-1]) and all(p.isfinite().all() for p in run.ema.parameters())):
        raise FloatingPointError(f"training diverged at iteration {run.iteration:,} (loss "
                                 f"{losses[-1]}): try a lower learning rate")
    return stop > 0


def evaluation_is_due(run, config):
    """Whether to evaluate now: every eval_interval iterations and at max_iters, but only once."""
    evaluated = run.history[-1]["iteration"] if run.history else 0
    at_end = run.iteration == config.max_iters
    return run.iteration > evaluated and (at_end or run.iteration % config.eval_interval == 0)


# -----------------------------------------------------------------------------
# set-up

def resolve(given, files, processes):
    """Give every flag its value. The command line (given, {name: value}) takes precedence; then
    come the interrupted run (--resume) or the model of --init_from, whose sizes can't be changed,
    the defaults of the data, those of the device, and those of TrainConfig.

    Returns (config, device, state, base). state is that of the interrupted run, or None. base is
    [model, vocab] of --init_from, or None. ValueError for flags that contradict these."""
    config, fixed, state, base = TrainConfig(**given), {}, None, None
    if config.resume and (state := files.find_state({f.name for f in fields(TrainConfig)})):
        fixed, source = state["config"], f"the interrupted run of {files.path}"
        config = TrainConfig(**{**fixed, **given})
    device = connect(config.device, processes)
    if not state:
        defaults = CUDA_DEFAULTS if device.type == "cuda" else {}
        of_data = read_meta(data_folder(config.dataset, config.data_dir)).get("training", {})
        if config.init_from:
            *base, _ = load_checkpoint(resolve_path(config.init_from))
            source, free = config.init_from, {"vocab_size", "dropout"}
            if not config.eval_only:  # neither qk_norm nor causal has weights
                free |= {"qk_norm", "causal"} & set(given)
            fixed = {name: v for name, v in asdict(base[0].config).items() if name not in free}
        config = TrainConfig(**{**defaults, **of_data, **fixed, **given})
    for name, value in fixed.items():
        check(name in FREE_ON_RESUME or getattr(config, name) in (value, "auto"),  # of --dtype
              f"--{name}={getattr(config, name)} is not what {source} has ({value}): leave it out")
    config.dtype = pick_dtype(config.dtype, device)
    check(config.eps < config.p_max,
          f"--p_max must be more than --eps={config.eps}, not {config.p_max}")
    check(config.eval_tokens >= config.block_size,
          f"--eval_tokens must be at least {config.block_size}, a block, not {config.eval_tokens}")
    check(config.batch_size % processes.world_size == 0,
          f"--batch_size must be a multiple of {processes.world_size}, the number of processes")
    return config, device, state, base


def set_up(config, device, data, base=None):
    """Return a new Run, starting from the weights of base, [model, vocab], if there is one."""
    torch.manual_seed(config.seed)
    sizes = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    model = GPT(GPTConfig(vocab_size=len(data.vocab) + 1, **sizes))
    if base:  # the vocabulary may have grown: embeddings of new characters stay as initialized
        old, embeddings = base[0], model.wte.weight.detach().clone()
        embeddings[:old.config.mask_id] = old.wte.weight[:-1]
        embeddings[-1] = old.wte.weight[-1]
        model.load_state_dict({**old.state_dict(), "wte.weight": embeddings})
    model.to(device)
    say(f"device: {device}, dtype: {config.dtype}\n"
        f"sizes: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, dropout "
        f"{config.dropout}; {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{config.tokens_per_iteration * data.characters_per_token:,.0f} characters per iteration; "
        f"{config.max_iters:,} iterations are "
        f"{config.max_iters * config.tokens_per_iteration / len(data.train):.1f} epochs")
    return Run(model=model, ema=copy.deepcopy(model).eval().requires_grad_(False),
               optimizers=make_optimizers(model, config),
               scaler=torch.amp.GradScaler(device.type, enabled=config.dtype == "float16"))


def main():
    advice = "try a smaller --batch_size, with more --gradient_accumulation_steps"
    with one_line_errors(advice):  # the rank is not known yet
        processes = read_processes()
    if processes.rank > 0:
        sys.stdout = open(os.devnull, "w")
    with one_line_errors(advice, processes.rank):
        given = parse_knobs(TrainConfig, __doc__, [("on CUDA", CUDA_DEFAULTS)])
        files = Files(resolve_path(given.get("save_filename", TrainConfig.save_filename)))
        config, device, state, base = resolve(given, files, processes)
        choose_attention(device)
        vocab = state["vocab"] if state else base[1] if base else None
        data = load_data(data_folder(config.dataset, config.data_dir), config.block_size, vocab,
                         grow=base and not config.eval_only)
        if config.eval_only:
            check(base, "--eval_only needs --init_from=X, the checkpoint to evaluate")
            config.eval_tokens, config.eval_passes = None, max(8, config.eval_passes)
            evaluate(Run(None, base[0].to(device), optimizers=[], scaler=None), config, data)
            return
        run = set_up(config, device, data, base)
        if state:
            files.restore_state(run, state, data)
        elif processes.rank == 0:
            files.move_old_files_aside()
            files.save_state(run, config, data)
        interrupted = train(run, config, data, files, processes)
        if processes.rank == 0:
            files.finish(run, data, interrupted)
        if processes.world_size > 1:
            dist.destroy_process_group()
        sys.exit(130 if interrupted else 0)


# -----------------------------------------------------------------------------
# the flags

@dataclass
class TrainConfig:
    save_filename: str = knob("unmask", "checkpoint to write, X or X.pt: the best model", "files")
    dataset: str = knob("shakespeare_char", "folder of data/ that prepare.py filled")
    data_dir: str = knob("", "any other folder that prepare.py filled, instead of --dataset")
    init_from: str = knob("", "checkpoint to start from (its model sizes apply) or to evaluate")
    eval_only: bool = knob(False, "print the NELBO of --init_from on both splits, and stop")
    resume: bool = knob(False, "continue the interrupted run of --save_filename")

    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps (untested)", "device")
    dtype: str = knob("auto", "precision: auto, float32, bfloat16 or float16")
    compile: bool = knob(False, "torch.compile the model")

    block_size: int = knob(256, "window length, in tokens: characters or word pieces", "model")
    n_layer: int = knob(4, "blocks")
    n_head: int = knob(4, "attention heads per block; n_embd / n_head = 64 is fast")
    n_embd: int = knob(256, "width of the residual stream")
    dropout: float = knob(0.0, "for runs of many epochs, say 0.2; slow on a CPU")
    bias: bool = knob(False, "biases in Linears and LayerNorms")
    rope: bool = knob(True, "rotary positions; False: GPT-2's learned positions")
    qk_norm: bool = knob(True, "normalize queries and keys; learns in fewer iterations")
    causal: bool = knob(False, "the autoregressive twin: causal attention, next-token loss")

    max_iters: int = knob(2500, "iterations", "optimization", low=1)
    batch_size: int = knob(16, "windows per forward pass, summed over processes", low=1)
    gradient_accumulation_steps: int = knob(1, "forward passes per iteration", low=1)
    muon: bool = knob(True, "Muon for the blocks' matrices; False: AdamW for everything")
    muon_lr: float = knob(4e-3, "peak learning rate of Muon", low=0)
    learning_rate: float = knob(3e-3, "peak learning rate of AdamW; use 1e-3 without Muon", low=0)
    final_lr_frac: float = knob(0.05, "final learning rate, as a fraction of the peak", low=0)
    warmup_iters: int = knob(100, "iterations of linear warm-up", low=0)
    weight_decay: float = knob(0.1, "for matrices", low=0)
    beta1: float = knob(0.9, "AdamW's", low=0, high=1 - 1e-6)
    beta2: float = knob(0.99, "AdamW's", low=0, high=1 - 1e-6)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 disables it", low=0)
    ema_decay: float = knob(0.999, "of the averaged weights; 0 disables it", low=0, high=1 - 1e-6)
    eps: float = knob(0.1, "smallest probability of masking, at t = 0", low=0, high=1)
    p_max: float = knob(1.0, "largest one, at t = 1; below 1 for puzzles", low=0, high=1)
    seed: int = knob(1337, "of weights, batches, masks and dropout", low=0, high=2**63 - 1)

    eval_interval: int = knob(500, "iterations between evaluations", "evaluation", low=1)
    eval_tokens: int = knob(2**16, "tokens per split, evenly spread; --eval_only: all")
    eval_passes: int = knob(2, "passes, each with other masks; --eval_only: at least 8", low=2)
    log_interval: int = knob(10, "iterations between loss readings", low=1)

    @property
    def tokens_per_iteration(self):
        return self.batch_size * self.gradient_accumulation_steps * self.block_size


CUDA_DEFAULTS = dict(n_layer=6, n_head=6, n_embd=384, dropout=0.2, batch_size=64, max_iters=5000)
# flags that may differ between an interrupted run and its --resume
FREE_ON_RESUME = {"resume", "save_filename", "device", "compile", "dataset", "data_dir",
                  "eval_interval", "eval_tokens", "eval_passes", "log_interval"}

if __name__ == "__main__":
    open_streams()
    main()
