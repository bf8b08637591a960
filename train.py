"""
The forward process: mask a random share of the text, learn to predict it back.

    python data/shakespeare_char/prepare.py
    python train.py --save_filename=X                # CPU or CUDA; the defaults fit the device
    python train.py --save_filename=X --resume       # go on with an interrupted run
    python train.py --eval_only --init_from=X        # the NELBO of any checkpoint on any prepared data
    python train.py --save_filename=X --device=cpu --n_layer=2 --n_embd=64 --n_head=1 --max_iters=200   # a toy

N processes (GPUs, or CPU cores) share the work of each iteration, on one machine or, each with the same line, on several
that see the same files:

    torchrun --standalone --nproc_per_node=N train.py --save_filename=X
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=10.0.0.1 --master_port=29500 train.py --save_filename=X

Beside X stand X.csv, the loss curve, and until the run is complete X.state, from which --resume continues.
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
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig, fail, load_checkpoint, pick_device, pick_dtype, read_file, resolve_path
from model import save_checkpoint, write_atomically

# torchrun says which of the run's processes this is, over all machines and on this one
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE, LOCAL_WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    # files
    save_filename: str = knob("unmask.pt", "X, the checkpoint to write, best validation NELBO; a bare name gets .pt")
    dataset: str = knob("shakespeare_char", "folder of data/ that prepare.py filled")
    data_dir: str = knob("", "any other folder that prepare.py filled; wins over --dataset")
    init_from: str = knob("", "checkpoint to start from (its sizes count) or, with --eval_only, to evaluate")
    eval_only: bool = knob(False, "print the NELBO of --init_from on both splits, whole, and stop")
    resume: bool = knob(False, "go on with the interrupted run of --save_filename")
    # device
    device: str = knob("auto", "auto, cpu, cuda, cuda:N or mps (untested)")
    dtype: str = knob("auto", "auto, float32, bfloat16 or float16: what autocast computes in; the weights stay float32")
    compile: bool = knob(False, "torch.compile the model")
    # model
    block_size: int = knob(256, "window length, in characters")
    n_layer: int = knob(4, "blocks")
    n_head: int = knob(4, "attention heads per block; 64 features each is a good width")
    n_embd: int = knob(256, "width of the residual stream")
    dropout: float = knob(0.0, "for runs of many epochs, say 0.1 or 0.2; slow on a CPU")
    bias: bool = knob(False, "biases in Linears and LayerNorms")
    causal: bool = knob(False, "the autoregressive twin: causal attention, next-character loss")
    rope: bool = knob(True, "rotary positions; False: GPT-2's learned positions, to watch the plateau")
    # optimisation
    max_iters: int = knob(3000, "iterations, of gradient_accumulation_steps * batch_size windows each")
    batch_size: int = knob(4, "windows per forward pass, of all processes together")
    gradient_accumulation_steps: int = knob(1, "forward passes per iteration")
    muon: bool = knob(True, "Muon for the blocks' matrices, AdamW for the rest; False: AdamW for all")
    muon_lr: float = knob(4e-3, "peak learning rate of Muon")
    learning_rate: float = knob(3e-3, "peak learning rate of AdamW; with --muon=False 1e-3 is a better one")
    min_lr_ratio: float = knob(0.05, "where the cosine decay ends, as a share of the peak")
    warmup_iters: int = knob(100, "iterations of linear warm-up")
    weight_decay: float = knob(0.1, "on matrices only")
    beta1: float = knob(0.9, "AdamW")
    beta2: float = knob(0.99, "AdamW")
    grad_clip: float = knob(1.0, "clip the gradient to this norm; 0: don't")
    ema_decay: float = knob(0.999, "moving average of the weights; shorter early in the run; 0: none")
    eps: float = knob(0.05, "least share of characters to mask: t in [0, 1] masks (1 - eps) * t + eps of them")
    seed: int = knob(1337, "weights, batches, masks, dropout")
    # evaluation
    eval_interval: int = knob(750, "iterations between evaluations; X and X.state are written then")
    eval_chars: int = knob(2**18, "characters of each split that an evaluation looks at, at most; --eval_only: all")
    eval_passes: int = knob(2, "masks per window and evaluation; --eval_only: at least 8")
    log_interval: int = knob(10, "iterations between looks at the loss")

    def __post_init__(self):
        least = dict(max_iters=1, batch_size=1, gradient_accumulation_steps=1, eval_interval=1, log_interval=1,
                     eval_passes=2, eval_chars=self.block_size, warmup_iters=0, learning_rate=0, muon_lr=0,
                     min_lr_ratio=0, weight_decay=0, grad_clip=0)
        for name, bound in least.items():
            if not getattr(self, name) >= bound:  # nan is not at least anything
                raise ValueError(f"--{name} must be at least {bound}, not {getattr(self, name)}")
        for name, end in (("beta1", 1), ("beta2", 1), ("ema_decay", 1), ("eps", 1), ("seed", 2**63)):
            if not 0 <= getattr(self, name) < end:
                raise ValueError(f"--{name} must be at least 0 and less than {end}, not {getattr(self, name)}")


# what else is the default on CUDA
CUDA_DEFAULTS = dict(n_layer=6, n_head=6, n_embd=384, dropout=0.2, batch_size=64, max_iters=5000)
WHY_SIZES = {"cuda": "nanoGPT's shakespeare_char sizes", "cpu": "small enough for 10 minutes on 2 cores"}
# what may differ between an interrupted run and its --resume
FREE_ON_RESUME = {"resume", "save_filename", "device", "compile"}


# -----------------------------------------------------------------------------
# the forward process, its loss, and its measurement

def forward_process(input_ids, mask_id, eps=1e-3, t=None, u=None):
    """Mask every token independently with probability p_mask = (1 - eps) * t + eps (LLaDA, arXiv 2502.09992, sec. 2.1;
    eps keeps 1/p_mask finite). input_ids (B, T) clean tokens x_0; t (B,) in [0, 1], drawn uniformly if not given;
    u (B, T) in [0, 1), the draws that p_mask is compared with.
    -> noisy_batch x_t, masked_indices, p_mask, each (B, T)."""
    B, T = input_ids.shape
    t = torch.rand(B, device=input_ids.device) if t is None else t
    u = torch.rand(B, T, device=input_ids.device) if u is None else u
    p_mask = ((1 - eps) * t + eps)[:, None].expand(B, T)
    masked_indices = u < p_mask
    noisy_batch = torch.where(masked_indices, mask_id, input_ids)
    return noisy_batch, masked_indices, p_mask


def token_losses(model, noisy_batch, input_ids, mask_id):
    """Cross-entropy of every token, (B, T). [MASK] is never an answer, so its logit is cut off."""
    logits = model(noisy_batch)[..., :mask_id].float()  # (B, T, mask_id)
    return F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none").view(input_ids.shape)


def diffusion_loss(model, input_ids, mask_id, eps=1e-3, t=None, u=None):
    """LLaDA's eq. 3 per token: sum over masked of cross-entropy / p_mask, over B * T. Its expectation bounds -log p,
    but for the sliver of t that eps cuts off. A scalar, in nats per character. Arguments as forward_process; model:
    (B, T) -> (B, T, vocab_size) logits."""
    noisy_batch, masked_indices, p_mask = forward_process(input_ids, mask_id, eps, t, u)
    losses = token_losses(model, noisy_batch, input_ids, mask_id)
    return (losses * masked_indices / p_mask).sum() / input_ids.numel()


def next_token_losses(model, input_ids, mask_id):
    """The twin reads [MASK] + x[:-1] and predicts x: every character is scored, the first one too. (B, T)."""
    return token_losses(model, F.pad(input_ids[:, :-1], (1, 0), value=mask_id), input_ids, mask_id)


def autoregressive_loss(model, input_ids, mask_id):
    """What a GPT (causal=True) learns instead: -log p of each character given those before it, exactly. A scalar, in
    nats per character."""
    return next_token_losses(model, input_ids, mask_id).mean()


@torch.no_grad()
def estimate_nelbo(model, data, passes=8, batch_size=64, seed=0, autocast=nullcontext()):
    """The bound, measured with little noise (LLaDA eq. 14; arXiv 2409.02908 eq. 7): mask exactly n of a window's L
    characters, n uniform on 1..L, and take the mean cross-entropy of those n. Its expectation is the NELBO per
    character. A pass covers all windows of model.config.block_size once, with n spread evenly over 1..L; the last,
    shorter window is left out. data (N,) ids; the same seed gives every model the same masks. model: a GPT in eval
    mode, or any module with a config. -> (mean over the passes, at least 2, and its standard error), in nats per character."""
    L, mask_id = model.config.block_size, model.config.mask_id
    device = next(model.parameters()).device
    W = len(data) // L
    g = torch.Generator().manual_seed(seed)
    means = []
    for _ in tqdm(range(passes), desc="evaluating", leave=False, disable=None):
        share = (torch.randperm(W, generator=g) + torch.rand(W, generator=g, dtype=torch.float64)) / W  # (W,) in [0, 1)
        n = (share * L).long() + 1                                                                    # (W,) in 1..L
        total = 0.0
        for w in torch.arange(W).split(batch_size):
            input_ids = gather(data, w * L, L, device)                                                # (B, L)
            rank = torch.rand(len(w), L, generator=g).argsort(dim=1).argsort(dim=1)                   # 0..L-1, shuffled
            mask = (rank < n[w, None]).to(device)                                                     # n in each row
            with autocast:
                losses = token_losses(model, torch.where(mask, mask_id, input_ids), input_ids, mask_id)
            total += ((losses * mask).sum(dim=1).cpu().double() / n[w]).sum().item()
        means.append(total / W)
    return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(passes))


@torch.no_grad()
def estimate_nll(model, data, batch_size=64, autocast=nullcontext()):
    """estimate_nelbo's counterpart for the causal twin, on the same windows, but exact: -> (mean over the windows, and its
    standard error), in nats per character."""
    L, device = model.config.block_size, next(model.parameters()).device
    windows = []
    for starts in torch.arange(0, len(data) - L + 1, L).split(batch_size):
        with autocast:
            windows.append(next_token_losses(model, gather(data, starts, L, device), model.config.mask_id).mean(dim=1))
    windows = torch.cat(windows).double()                                                             # (W,)
    return float(windows.mean()), float(windows.std() / math.sqrt(len(windows)))


# -----------------------------------------------------------------------------
# data

def load_data(cfg, chars=None):
    """-> (train, val, chars): both splits as (N,) tensors over the .bin files (uint16 bits in int16, see gather), and
    the vocabulary. With chars, a model's vocabulary, the ids are translated to it. ValueError or FileNotFoundError
    for anything that can't be trained on."""
    folder = Path(cfg.data_dir) if cfg.data_dir else Path(__file__).resolve().parent / "data" / cfg.dataset
    for name in ("meta.json", "train.bin", "val.bin"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {folder}; write it with data/shakespeare_char/prepare.py")
    try:
        data_chars = list(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["chars"])
        if len(set(data_chars)) < len(data_chars) or not all(len(c) == 1 for c in data_chars):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'meta.json'} does not list different characters; run prepare.py again") from None
    splits = []
    for path in (folder / "train.bin", folder / "val.bin"):
        size = path.stat().st_size
        if size % 2:
            raise ValueError(f"{path} has an odd number of bytes ({size}): not uint16 ids; run prepare.py again")
        if size // 2 < cfg.block_size:
            raise ValueError(f"{path} has {size // 2} characters, fewer than one --block_size={cfg.block_size}")
        ids = np.memmap(path, dtype="<u2", mode="c")  # "c": PyTorch warns of arrays that it could not write to
        if ids.max() >= len(data_chars):
            raise ValueError(f"{path} has id {ids.max()}, beyond the {len(data_chars)} characters of meta.json; run "
                             "prepare.py again")
        if chars is not None and data_chars != chars:
            unknown = sorted(set(data_chars) - set(chars))
            if unknown:
                raise ValueError(f"{folder} has characters that the model does not know: {''.join(unknown[:20])!r}")
            id_of = {c: i for i, c in enumerate(chars)}
            ids = np.array([id_of[c] for c in data_chars], dtype="<u2")[ids]
        splits.append(torch.from_numpy(ids.view(np.int16)))
    return *splits, chars or data_chars


def gather(data, starts, length, device):
    """The windows of data that begin at starts (B,) -> (B, length) long ids on device."""
    idx = starts[:, None] + torch.arange(length)                             # (B, length)
    ids = data[idx.to(data.device, non_blocking=True)].long() & 0xFFFF       # undo the sign of the int16
    return ids.to(device, non_blocking=True)


def seed_for(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def get_batch(data, cfg, iteration, device):
    """The global batch of an iteration: input_ids (B, T), and the draws t (B,) and u (B, T) that mask it. All of it
    comes from (seed, iteration) alone, so that it does not matter how often the run was interrupted."""
    g = torch.Generator().manual_seed(seed_for(cfg.seed, iteration))
    B, T = cfg.batch_size * cfg.gradient_accumulation_steps, cfg.block_size
    if torch.rand((), generator=g) < 0.01:                                   # LLaDA: some batches of a random length
        T = int(torch.randint(1, T + 1, (), generator=g))
    starts = torch.randint(len(data) - T + 1, (B,), generator=g)
    t = (torch.randperm(B, generator=g) + torch.rand(B, generator=g)) / B    # stratified (MDLM): covers [0, 1] evenly
    u = torch.rand(B, T, generator=g)
    return gather(data, starts, T, device), t.to(device, non_blocking=True), u.to(device, non_blocking=True)


# -----------------------------------------------------------------------------
# optimisation

def make_optimizers(model, cfg):
    """Muon (a momentum step with its singular values set to one) for the blocks' matrices, AdamW for the rest."""
    device = next(model.parameters()).device
    blocks = [p for p in model.h.parameters() if p.ndim == 2]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("h.")]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=embeddings + ([] if cfg.muon else blocks), weight_decay=cfg.weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                    fused=device.type != "mps")]
    if cfg.muon:
        optimizers.append(torch.optim.Muon(blocks, lr=cfg.muon_lr, weight_decay=cfg.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def lr_scale(iteration, cfg):
    """Linear warm-up to 1, then half a cosine down to min_lr_ratio at max_iters."""
    if iteration < cfg.warmup_iters:
        return (iteration + 1) / (cfg.warmup_iters + 1)
    progress = (iteration - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def accumulate_gradient(net, mask_id, cfg, batch, autocast=nullcontext(), scaler=None):
    """Add the gradient of the global batch's loss to net's parameters, in gradient_accumulation_steps passes. Each
    process takes the rows RANK, RANK + WORLD_SIZE, ..., and the last pass averages the gradients of all. -> this
    process's mean loss."""
    input_ids, t, u = batch
    micro_steps, loss = cfg.gradient_accumulation_steps, 0.0
    for i in range(micro_steps):
        rows = slice(RANK + i * WORLD_SIZE, None, micro_steps * WORLD_SIZE)
        wait = WORLD_SIZE > 1 and i < micro_steps - 1
        with net.no_sync() if wait else nullcontext():
            with autocast:
                if cfg.causal:
                    part_loss = autoregressive_loss(net, input_ids[rows], mask_id) / micro_steps
                else:
                    part_loss = diffusion_loss(net, input_ids[rows], mask_id, cfg.eps, t[rows], u[rows]) / micro_steps
            (scaler.scale(part_loss) if scaler else part_loss).backward()
        loss += part_loss.detach()
    return loss


# -----------------------------------------------------------------------------
# the run

def join(name):
    """pick_device; with several processes, give each its own GPU and connect them."""
    device, why = pick_device(name)
    if WORLD_SIZE > 1:
        if device.index is not None:
            raise ValueError(f"--device={name} is one device for {WORLD_SIZE} processes; use --device={device.type}")
        if device.type == "cuda":
            if LOCAL_WORLD_SIZE > torch.cuda.device_count():
                raise ValueError(f"{LOCAL_WORLD_SIZE} processes for {torch.cuda.device_count()} GPUs; give torchrun "
                                 "--nproc_per_node that number, or train.py --device=cpu")
            device = torch.device("cuda", LOCAL_RANK)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        why += f"; {WORLD_SIZE} processes"
    return device, why


def autocast_to(dtype, device):
    """The context in which the model computes in dtype. Its weights stay float32."""
    if device.type == "cpu":  # in bfloat16, plain matrix products train faster there than PyTorch's flash attention, as
        torch.backends.cuda.enable_flash_sdp(False)  # tests/benchmarks/training.py shows; both switches hold for the
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # CPU too, whatever their name
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def back_up(X):
    """Give what an earlier run left at X a free backup name; -> that name, or None if X is free. X itself is copied:
    the first new file will replace it in one step."""
    ends = ("", ".csv", ".state")

    def taken(path):
        return [end for end in ends if Path(f"{path}{end}").exists()]
    if not taken(X):
        return None
    backup = next(name for n in itertools.count(1) if not taken(name := X.with_name(f"{X.stem}_backup{n}{X.suffix}")))
    for end in taken(X):
        if end:
            os.replace(f"{X}{end}", f"{backup}{end}")
        else:
            write_atomically(backup, lambda f: f.write(X.read_bytes()))
    return backup


def load_state(path, given):
    """-> the training state at path, and its config. What was given on the command line must not contradict it."""
    state = read_file(path)
    try:
        cfg = TrainConfig(**state["cfg"])
    except (TypeError, LookupError) as e:
        raise ValueError(f"{path} is not a training state of this version; remove it to start afresh") from e
    for name, value in given.items():
        if name in FREE_ON_RESUME:
            setattr(cfg, name, value)
        elif value != getattr(cfg, name):
            raise ValueError(f"--{name}={value} is not what the interrupted run had ({getattr(cfg, name)}): leave it "
                             "out to go on, or leave out --resume to start afresh")
    return state, cfg


def measure(model, data, passes, autocast):
    """-> (its name, nats per character, standard error): the bound or, of the causal twin, the exact value."""
    if model.config.causal:
        return "NLL", *estimate_nll(model, data, autocast=autocast)
    return "NELBO", *estimate_nelbo(model, data, passes, autocast=autocast)


def show(split, name, nats, se):
    ln2 = math.log(2)
    return f"{split} {name} {nats:.4f} +- {se:.4f} nats/char ({nats / ln2:.4f} +- {se / ln2:.4f} bits)"


def evaluate_checkpoint(cfg, given):
    if WORLD_SIZE > 1:
        raise ValueError("--eval_only is for one process: python in place of torchrun")
    if not cfg.init_from:
        raise ValueError("--eval_only needs --init_from=X, the checkpoint to evaluate")
    path = resolve_path(cfg.init_from)
    device, why = pick_device(cfg.device)
    model, chars, info = load_checkpoint(path, device)
    cfg.block_size = given.get("block_size", model.config.block_size)
    if cfg.block_size > model.config.block_size:
        raise ValueError(f"--block_size={cfg.block_size} is longer than the {model.config.block_size} of {path}")
    model.config.block_size = cfg.block_size
    train_data, val_data, _ = load_data(cfg, chars)
    dtype, why_dtype = pick_dtype(cfg.dtype, device)
    autocast = autocast_to(dtype, device)
    passes = max(8, cfg.eval_passes)
    print(f"device: {device} ({why})\ndtype: {str(dtype).removeprefix('torch.')} ({why_dtype})")
    print(f"{path}: iteration {info.get('iteration')}; {passes} passes over all whole windows of {cfg.block_size} "
          "characters")
    for split, data in (("val", val_data), ("train", train_data)):
        print(show(f"{split:5}", *measure(model, data, passes, autocast)), flush=True)


def set_up(cfg, given):
    """All that can go wrong before training starts: files, device, data, model. -> what train() needs, or None if
    --resume finds a complete run."""
    X = resolve_path(cfg.save_filename)
    if X.is_dir():
        raise IsADirectoryError(f"--save_filename={X} is a folder")
    state, state_path = None, Path(f"{X}.state")
    if cfg.resume and state_path.exists():
        state, cfg = load_state(state_path, given)
    elif cfg.resume and X.exists() and load_checkpoint(X)[2].get("complete"):
        print(f"{X} is complete: nothing to resume. Train on from it with --init_from={X}")
        return None
    elif cfg.resume:
        print(f"no interrupted run of {X} to resume: starting afresh")
    elif state_path.exists():
        print(f"found an interrupted run of {X}: --resume would continue it. This run starts afresh")

    if cfg.batch_size % WORLD_SIZE:
        raise ValueError(f"--batch_size={cfg.batch_size} is not a multiple of the {WORLD_SIZE} processes")
    device, why_device = join(cfg.device)
    if state:
        dtype, why_dtype, why_sizes = getattr(torch, state["dtype"]), "as the interrupted run", "as the interrupted run"
        chars, weights = state["chars"], state["model"]
    else:
        dtype, why_dtype = pick_dtype(cfg.dtype, device)
        if WORLD_SIZE > 1:  # the first process's measurement decides for all
            choice = [dtype]
            dist.broadcast_object_list(choice)
            [dtype] = choice
        why_sizes = f"where no flag says otherwise: {WHY_SIZES.get(device.type, 'as on cpu')}"
        chars, weights = None, None
    if cfg.init_from and not state:
        base, chars, _ = load_checkpoint(resolve_path(cfg.init_from))
        weights, why_sizes = base.state_dict(), f"those of {cfg.init_from}"
        for name in ("block_size", "n_layer", "n_head", "n_embd", "bias", "rope", "causal"):
            size = getattr(base.config, name)
            if given.get(name, size) != size:
                raise ValueError(f"--{name}={given[name]} is not what {cfg.init_from} has ({size})")
            setattr(cfg, name, size)
    train_data, val_data, chars = load_data(cfg, chars)
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(block_size=cfg.block_size, vocab_size=len(chars) + 1, n_layer=cfg.n_layer, n_head=cfg.n_head,
                          n_embd=cfg.n_embd, dropout=cfg.dropout, bias=cfg.bias, rope=cfg.rope, causal=cfg.causal))
    if weights:
        model.load_state_dict(weights)
    model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)  # what is evaluated, saved and sampled
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state:
        ema.load_state_dict(state["ema"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(optimizer_state)
        scaler.load_state_dict(state["scaler"])
    try:  # an unwritable folder must show now, not at the first evaluation
        X.parent.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            write_atomically(f"{X}.probe", lambda f: None)
            os.unlink(f"{X}.probe")
    except OSError as e:
        raise OSError(f"--save_filename={X} can't be written: {e.strerror}") from e
    if device.type != "cpu" and train_data.nbytes < 2**30:  # else each batch is read from the memory map
        train_data, val_data = train_data.to(device), val_data.to(device)

    windows = cfg.gradient_accumulation_steps * cfg.batch_size
    print(f"device: {device} ({why_device})")
    print(f"dtype: {str(dtype).removeprefix('torch.')} ({why_dtype})")
    print(f"sizes: {cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide, dropout {cfg.dropout} ({why_sizes})")
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print(f"characters per iteration: {windows} windows x {cfg.block_size} = {windows * cfg.block_size:,}; "
          f"{cfg.max_iters:,} iterations are {cfg.max_iters * windows * cfg.block_size / len(train_data):.1f} epochs")
    return cfg, X, device, dtype, train_data, val_data, chars, model, ema, optimizers, scaler, state


def train(cfg, X, device, dtype, train_data, val_data, chars, model, ema, optimizers, scaler, state):
    """The loop. Every process runs it; the first alone evaluates and writes. -> exit status."""
    curve_path, state_path = Path(f"{X}.csv"), Path(f"{X}.state")
    iteration, minutes_before, rows, losses = 0, 0.0, [], []
    new_losses = []  # since the last look, on the device
    if state:
        iteration, minutes_before, rows, losses = (state[key] for key in ("iteration", "minutes", "rows", "losses"))
        print(f"resuming {X} at iteration {iteration:,}")
    started = time.perf_counter()
    files_are_ours = state is not None
    chars_per_iter = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    autocast = autocast_to(dtype, device)
    net = torch.compile(model) if cfg.compile else model
    if WORLD_SIZE > 1:
        net = DistributedDataParallel(net)
    dtype_name = str(dtype).removeprefix("torch.")
    launcher = "python" if WORLD_SIZE == 1 else f"torchrun --nproc_per_node={WORLD_SIZE}"

    def minutes():
        return minutes_before + (time.perf_counter() - started) / 60

    def make_room():
        nonlocal files_are_ours
        if not files_are_ours and (backup := back_up(X)):
            bar.write(f"what stood at {X} is now {backup}")
        files_are_ours = True

    def save_model(**info):
        save_checkpoint(X, ema, chars, iteration=iteration, minutes=minutes(), device=str(device), dtype=dtype_name,
                        hyperparameters=asdict(cfg), command=" ".join([launcher, "train.py", *sys.argv[1:]]), **info)

    def save_state():
        make_room()
        everything = dict(cfg=asdict(cfg), dtype=dtype_name, chars=chars,
                          model=model.state_dict(), ema=ema.state_dict(),
                          optimizers=[optimizer.state_dict() for optimizer in optimizers], scaler=scaler.state_dict(),
                          iteration=iteration, minutes=minutes(), rows=rows, losses=losses)
        write_atomically(state_path, lambda f: torch.save(everything, f))

    def evaluate():
        n, nelbo = min(len(val_data), cfg.eval_chars), {}
        for split, data in (("train", train_data[:n]), ("val", val_data[:n])):
            name, nelbo[split], nelbo[split + "_se"] = measure(ema, data, cfg.eval_passes, autocast)
            bar.write(f"iteration {iteration}: " + show(split, name, nelbo[split], nelbo[split + "_se"]))
        make_room()
        if not rows or not X.exists() or nelbo["val"] < min(row["val"] for row in rows):
            save_model(nelbo=nelbo)
        rows.append(dict(iteration=iteration, minutes=minutes(), loss=float(np.mean(losses)), **nelbo,
                         train_bits=nelbo["train"] / math.log(2), val_bits=nelbo["val"] / math.log(2)))
        losses.clear()
        table = "".join(",".join(map(str, row)) + "\n" for row in [rows[0], *(row.values() for row in rows)])
        write_atomically(curve_path, lambda f: f.write(table.encode()))

    interrupted = False

    def on_sigint(*_):
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, default_sigint)  # a second Ctrl-C does not wait
        bar.write("Ctrl-C: stopping soon")

    bar = tqdm(total=cfg.max_iters * chars_per_iter, initial=iteration * chars_per_iter, unit="char", unit_scale=True,
               mininterval=1 if sys.stderr.isatty() else 30, disable=RANK > 0)
    default_sigint = signal.signal(signal.SIGINT, on_sigint)
    try:
        while iteration < cfg.max_iters:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * lr_scale(iteration, cfg)
            torch.manual_seed(seed_for(cfg.seed, iteration, 1 + RANK))  # dropout's
            batch = get_batch(train_data, cfg, iteration, device)
            cut = batch[0].shape[1] < cfg.block_size  # a rare length is not worth a compilation
            with torch.compiler.set_stance("force_eager") if cfg.compile and cut else nullcontext():
                loss = accumulate_gradient(net, model.config.mask_id, cfg, batch, autocast, scaler)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            if not scaler.is_enabled() or norm.isfinite():  # in float16 an overflow must skip both optimizers, not one
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                decay = min(cfg.ema_decay, (1 + iteration) / (10 + iteration))  # a short horizon early in the run
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            new_losses.append(loss)
            iteration += 1
            bar.update(chars_per_iter)

            due = iteration % cfg.eval_interval == 0 or iteration == cfg.max_iters
            if not (due or iteration % cfg.log_interval == 0 or (interrupted and WORLD_SIZE == 1)):
                continue
            # a look: waits for the device and, if there are more processes, for them, to agree on the losses and on a Ctrl-C
            look = torch.stack([*new_losses, torch.tensor(float(interrupted), device=device)])
            if WORLD_SIZE > 1:
                dist.all_reduce(look)
            *new_losses, stop = (look / WORLD_SIZE).tolist()
            losses += new_losses
            new_losses = []
            # before anything is saved, the weights are looked at as well
            if not math.isfinite(losses[-1]) or (due or stop) and not all(p.isfinite().all() for p in ema.parameters()):
                bar.close()
                if RANK == 0:
                    print(f"error: at iteration {iteration:,} the loss is {losses[-1]} and the weights are lost; what was "
                          "saved before stays. Try a lower learning rate", file=sys.stderr)
                return 1
            bar.set_postfix(loss=f"{np.mean(losses[-cfg.log_interval:]):.3f}", refresh=False)
            if RANK == 0 and due:
                evaluate()
                save_state()
            elif RANK == 0 and stop:
                save_state()
                if not rows:
                    save_model()
            if WORLD_SIZE > 1 and (due or stop):
                dist.barrier()  # for the first process to be done with that
            if stop and iteration < cfg.max_iters:
                bar.close()
                print(f"interrupted at iteration {iteration:,}. The same command with --resume goes on; {X} holds the "
                      "best model so far")
                return 130
    finally:
        signal.signal(signal.SIGINT, default_sigint)
        bar.close()
    if RANK > 0:
        return 0
    best, _, info = load_checkpoint(X)
    save_checkpoint(X, best, chars, **{**info, "complete": True})
    state_path.unlink()
    print(f"done in {minutes():.1f} minutes. {X} holds iteration {info['iteration']:,}, {info['nelbo']['val']:.4f} "
          f"nats/char on validation; {curve_path} the curve. Now: python main.py --path={X}")
    return 0


# -----------------------------------------------------------------------------
# the command line

def boolean(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def parse_args(argv=None):
    """-> (TrainConfig, the knobs that were given). Every field is a flag: --key=value, --key value, and --key alone
    for a switch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail  # one line, without the usage
    for f in fields(TrainConfig):
        default = f"{f.default}" + (f"; on CUDA {CUDA_DEFAULTS[f.name]}" if f.name in CUDA_DEFAULTS else "")
        switch = dict(nargs="?", const=True, type=boolean) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", **switch, metavar=f.type.__name__,
                            help=f"{f.metadata['help']} (default: {default})")
    given = vars(parser.parse_args(argv))
    cuda = pick_device(given.get("device", "auto"))[0].type == "cuda"
    return TrainConfig(**{**(CUDA_DEFAULTS if cuda else {}), **given}), given


def main():
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        cfg, given = parse_args()
        if cfg.eval_only:
            sys.exit(evaluate_checkpoint(cfg, given))
        run = set_up(cfg, given)
    except (OSError, ValueError) as e:
        fail(e)
    try:
        status = train(*run) if run else 0
        if run and WORLD_SIZE > 1:
            dist.destroy_process_group()
        sys.exit(status)
    except torch.OutOfMemoryError:
        fail("the device is out of memory: try a smaller --batch_size, with more --gradient_accumulation_steps")
    except OSError as e:
        fail(e)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
