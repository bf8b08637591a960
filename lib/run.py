"""
A training run: what it consists of, how it starts, and the files that it writes. X.pt is the best
model, X.pt.csv the loss curve, and X.pt.state all that --resume needs.
"""

import copy
import itertools
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lib.checkpoint import load_checkpoint, load_object, resolve_path, save_checkpoint, save_object
from lib.common import check, say, write_atomically
from lib.data import characters_per_token, data_folder, load_data, read_meta
from lib.device import (
    Processes,
    autocast,
    choose_attention,
    connect,
    name_of,
    pick_device,
    pick_dtype,
)
from lib.evaluate import describe, measure
from model import GPT, GPTConfig


@dataclass
class Run:
    """A training run. What parts() and PROGRESS name is saved in X.pt.state."""
    config: object          # train.py's TrainConfig
    path: Path              # X.pt
    processes: Processes
    device: torch.device
    dtype: torch.dtype      # to compute in; the weights are float32
    vocab: list             # vocab[i] is the token of id i
    train_data: np.ndarray  # (N,) ids
    val_data: np.ndarray
    meta: dict              # of the data: checksums, and the length of its records
    model: GPT
    ema: GPT                # the moving average of model's weights: what is evaluated and saved
    optimizers: list
    scaler: torch.amp.GradScaler                   # of the loss; for float16 only
    iteration: int = 0
    losses: list = field(default_factory=list)     # of the iterations since the last evaluation
    history: list = field(default_factory=list)    # a row of X.pt.csv for each evaluation
    started: float = field(default_factory=time.perf_counter)
    clock: float = field(default_factory=time.perf_counter)    # when the loss was last read
    shown: float = -1e9             # when progress was last shown
    state_saved: int | None = None  # modification time of X.pt.state after this run's last save
    stop_requested: bool = False    # of this process
    interrupted: bool = False       # all processes agree

    def __post_init__(self):
        self.record = self.meta.get("record", 1)   # length of a record of the data, in tokens
        self.characters_per_token = characters_per_token(self.train_data, self.vocab)
        self.state_path = Path(f"{self.path}.state")

    def parts(self):
        optimizers = {f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return dict(model=self.model, ema=self.ema, scaler=self.scaler, **optimizers)

    def minutes(self):
        return (time.perf_counter() - self.started) / 60

    def best(self):
        return min(self.history, key=lambda row: row["val"])

    def autocast(self):
        return autocast(self.dtype, self.device)


PROGRESS = ("iteration", "losses", "history")
# flags that may differ between an interrupted run and its --resume
FREE_ON_RESUME = {"resume", "save_filename", "device", "compile", "dataset", "data_dir",
                  "eval_interval", "eval_tokens", "eval_passes", "log_interval"}


# -----------------------------------------------------------------------------
# how a run starts

def set_up(config, given, processes, make_optimizers):
    """Build the Run from the flags, the data and the checkpoint. ValueError or OSError for what a
    user can cause. given: the flags that were given on the command line, {name: value}."""
    path = resolve_path(config.save_filename)
    check(not path.is_dir(), f"{path} is a folder: give another --save_filename")
    state, config = find_state(config, given, path)
    check(config.batch_size % processes.world_size == 0,
          f"--batch_size={config.batch_size} is not a multiple of the {processes.world_size} "
          "processes")
    device, why_device = connect(config.device, processes)
    dtype, why_dtype = pick_dtype(state["dtype"] if state else config.dtype, device)
    base, vocab = None, state["vocab"] if state else None
    if config.init_from and not state:
        base, vocab, _ = load_checkpoint(resolve_path(config.init_from))
        adopt_sizes(config, given, base.config, free=("qk_norm", "causal"))  # they have no weights
    check(config.eval_tokens >= config.block_size,
          f"--eval_tokens must be at least the block_size, {config.block_size}, not "
          f"{config.eval_tokens}")
    folder = data_folder(config.dataset, config.data_dir)
    train_data, val_data, vocab = load_data(folder, config.block_size, vocab, grow=bool(base))
    choose_attention(device)
    torch.manual_seed(config.seed)
    model = build_model(config, vocab, base).to(device)
    run = Run(config=config, path=path, processes=processes, device=device, dtype=dtype,
              vocab=vocab, train_data=train_data, val_data=val_data, meta=read_meta(folder),
              model=model, ema=copy.deepcopy(model).eval().requires_grad_(False),
              optimizers=make_optimizers(model, config),
              scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))
    if state:
        load_state(run, state)
    say(f"device: {device} ({why_device})\ndtype: {name_of(dtype)} ({why_dtype})")
    say(f"sizes: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, dropout "
        f"{config.dropout}; {sum(p.numel() for p in model.parameters()):,} parameters")
    tokens = config.tokens_per_iteration
    say(f"characters per iteration: {tokens * run.characters_per_token:,.0f}; "
        f"{config.max_iters:,} iterations are {config.max_iters * tokens / len(train_data):.1f} "
        "epochs")
    return run


def build_model(config, vocab, base=None):
    """Return the GPT to train, with the weights of base if there is one. The vocabulary may have
    grown since: the embeddings of new characters stay as they were initialized."""
    sizes = {f.name: getattr(config, f.name) for f in fields(GPTConfig) if f.name != "vocab_size"}
    model = GPT(GPTConfig(vocab_size=len(vocab) + 1, **sizes))
    if base:
        known, embeddings = base.config.mask_id, model.wte.weight.detach().clone()
        embeddings[:known], embeddings[-1] = base.wte.weight[:known], base.wte.weight[-1]
        model.load_state_dict({**base.state_dict(), "wte.weight": embeddings})
    return model


def adopt_sizes(config, given, model_config, free=()):
    """Make config's model sizes those of the checkpoint, except free ones that are given."""
    for name, value in asdict(model_config).items():
        if name not in ("vocab_size", "dropout") and not (name in free and name in given):
            check(given.get(name, value) == value,
                  f"--{name}={given.get(name)} is not what {config.init_from} has ({value})")
            setattr(config, name, value)


def begin(run):
    """Move an earlier model aside and write the first state file."""
    if run.state_saved:
        say(f"resuming {run.path} at iteration {run.iteration:,}")
    elif run.processes.rank == 0:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        move_aside(run.path)
        save_state(run)


def move_aside(path):
    """Rename what an earlier run left at path (model, loss curve, state) to a free name."""
    def files_of(path):
        return [end for end in ("", ".csv", ".state") if Path(f"{path}{end}").exists()]
    if not files_of(path):
        return
    names = (path.with_name(f"{path.stem}_backup{n}.pt") for n in itertools.count(1))
    backup = next(name for name in names if not files_of(name))
    interrupted = Path(f"{path}.state").exists()
    for end in files_of(path):
        os.rename(f"{path}{end}", f"{backup}{end}")
    say(f"kept the existing {path} as {backup}"
        + f" (an interrupted run: --save_filename={backup} --resume continues it)" * interrupted)


# -----------------------------------------------------------------------------
# the state file

def find_state(config, given, path):
    """Return the state of the interrupted run to resume, or None to start afresh, and the config.
    Flags on the command line must not contradict those of the interrupted run."""
    state_path = Path(f"{path}.state")
    if not config.resume:
        return None, config
    if not state_path.exists():
        if path.is_file():
            say(f"{path} is complete: nothing to resume. To train it further: --init_from={path}")
            sys.exit()
        say(f"no interrupted run of {path} to resume: starting afresh")
        return None, config
    state = load_object(state_path)
    try:
        config = type(config)(**state["config"])
        state["vocab"], state["dtype"]  # KeyError if one is missing
    except (TypeError, LookupError) as e:
        raise ValueError(f"{state_path} is not a training state of this version; remove it to "
                         "start afresh") from e
    for name, value in given.items():
        check(name in FREE_ON_RESUME or value == getattr(config, name),
              f"--{name}={value} is not what the interrupted run had ({getattr(config, name)}): "
              "leave it out to resume, or leave out --resume to start afresh")
        setattr(config, name, value)
    return state, config


def load_state(run, state):
    try:
        check(state["meta"] == run.meta, f"the data are not those of the interrupted run of "
                                         f"{run.path}: give its --data_dir")
        for name, part in run.parts().items():
            part.load_state_dict(state[name])
        for name in PROGRESS:
            setattr(run, name, state[name])
        run.started -= 60 * state["minutes"]
    except (LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{run.state_path} does not fit its run; remove it to start afresh") from e
    run.state_saved = run.state_path.stat().st_mtime_ns


def check_state(run):
    """ValueError if X.pt.state is not as this run left it: another run has the same name."""
    saved = run.state_path.stat().st_mtime_ns if run.state_path.exists() else None
    check(saved == run.state_saved, f"another run has changed {run.state_path}: stopping. Give "
                                    "each run a --save_filename of its own")


def save_state(run):
    check_state(run)
    state = {name: part.state_dict() for name, part in run.parts().items()}
    state |= {name: getattr(run, name) for name in PROGRESS}
    state |= dict(config=asdict(run.config), vocab=run.vocab, dtype=name_of(run.dtype),
                  minutes=run.minutes(), meta=run.meta)
    save_object(run.state_path, state)
    run.state_saved = run.state_path.stat().st_mtime_ns


# -----------------------------------------------------------------------------
# what a run writes while it goes on, and at its end

def evaluate(run):
    """Measure both splits, save the model if it is the best so far, and write the loss curve."""
    config, loss = run.config, float(np.mean(run.losses))
    row = dict(iteration=run.iteration, minutes=run.minutes(), loss=loss)
    for split, data in (("train", run.train_data), ("val", run.val_data)):
        name, row[split], row[f"{split}_se"] = measure(
            run.ema, data, run.vocab, config.eval_passes, config.batch_size, run.autocast(),
            config.eval_tokens)
        measured = describe(name, row[split], row[f"{split}_se"], config.eval_passes)
        say(f"iteration {run.iteration:,}: {split} {measured}")
    check_state(run)
    run.losses.clear()
    run.history.append(row)
    if row is run.best():
        save_model(run)
    lines = [row.keys(), *(row.values() for row in run.history)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    try:
        write_atomically(f"{run.path}.csv", text.encode())
    except OSError as e:  # it may be open in a spreadsheet, which locks it on Windows
        say(f"warning: {e}. The next evaluation, if there is one, tries again", sys.stderr)


@contextmanager
def stop_on_signals(run):
    """Ctrl-C and SIGTERM, which schedulers send, ask the run to stop after the iteration. A second
    signal ends it at once."""
    def stop(*_):
        if run.stop_requested:
            raise KeyboardInterrupt
        run.stop_requested = True
        say("stopping soon")
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save_model(run):
    world_size = run.processes.world_size
    launcher = "python" if world_size == 1 else f"torchrun --nproc_per_node={world_size}"
    row = run.history[-1] if run.history else {}
    save_checkpoint(run.path, run.ema, run.vocab, iteration=run.iteration, minutes=run.minutes(),
                    nelbo={split: row.get(split) for split in ("train", "val")},
                    device=str(run.device), dtype=name_of(run.dtype), record=run.record,
                    hyperparameters=asdict(run.config),
                    command=" ".join([launcher, "train.py", *sys.argv[1:]]))


def save(run):
    """The first process writes what the run needs to go on; the others wait for it."""
    if run.processes.rank == 0:
        check_state(run)
        if not run.history:
            save_model(run)  # interrupted before the first evaluation
        save_state(run)
    if run.processes.world_size > 1:
        dist.barrier()


def finish(run):
    """Say how the run ended, and return the exit status."""
    if run.interrupted and run.iteration < run.config.max_iters:
        holds = "the best model so far" if run.history else "the model as it is now"
        say(f"interrupted at iteration {run.iteration:,}; {run.path} holds {holds}. The same "
            "command with --resume continues the run")
        return 130
    if run.processes.rank == 0:
        os.unlink(run.state_path)
        best = run.best()
        say(f"done in {run.minutes():.1f} minutes. {run.path} holds the best model: iteration "
            f"{best['iteration']:,}, {best['val']:.4f} nats per character on validation; "
            f"{run.path}.csv holds the loss curve. Now: python main.py --path={run.path}"
            + " --infill=assets/puzzle.txt" * (run.record > 1 and not run.config.causal))
    return 0


def evaluate_checkpoint(config, given, processes):
    """--eval_only: print the NELBO of --init_from on all of both splits."""
    check(processes.world_size == 1, "--eval_only is for one process: python in place of torchrun")
    check(config.init_from, "--eval_only needs --init_from=X, the checkpoint to evaluate")
    path = resolve_path(config.init_from)
    device, why_device = pick_device(config.device)
    dtype, why_dtype = pick_dtype(config.dtype, device)
    choose_attention(device)
    model, vocab, info = load_checkpoint(path, device)
    adopt_sizes(config, given, model.config)
    folder = data_folder(config.dataset, config.data_dir)
    train_data, val_data, _ = load_data(folder, config.block_size, vocab)
    say(f"device: {device} ({why_device})\ndtype: {name_of(dtype)} ({why_dtype})")
    say(f"{path}: iteration {info.get('iteration')}")
    passes = max(8, config.eval_passes)
    for split, data in (("train", train_data), ("val", val_data)):
        measured = measure(model, data, vocab, passes, config.batch_size, autocast(dtype, device))
        say(f"{split} {describe(*measured, passes)}")
