"""What several test files need of training runs: their files, what they print, and accidents."""

import csv
import re
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import torch

import train as train_script
from lib.checkpoint import load_checkpoint
from lib.device import Processes

# twelve iterations with three evaluations
RUN = ("--max_iters=12", "--eval_interval=4", "--eval_tokens=320", "--warmup_iters=5",
       "--dropout=0.1", "--gradient_accumulation_steps=2", "--log_interval=3")
PROGRESS = re.compile(r"iteration ([\d,]+) of ([\d,]+): loss (\d+\.\d\d), ([\d,]+) characters/s, "
                      r"(\d+\.\d) minutes left")


def stand_in(**attributes):
    """An object with those attributes of a Run that the functions of train.py need."""
    return SimpleNamespace(**{
        "device": torch.device("cpu"), "autocast": nullcontext, "processes": Processes(),
        "scaler": torch.amp.GradScaler("cpu", enabled=False), "characters_per_token": 1.0,
        "iteration": 0, **attributes})


def assert_same_weights(a, b):
    a, b = (load_checkpoint(path)[0].state_dict() for path in (a, b))
    assert all(torch.equal(a[name], b[name]) for name in b)


def curve(path):
    """Return the rows of the loss curve of the checkpoint at path, without the time they took."""
    with open(f"{path}.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if k != "minutes"}
                for row in csv.DictReader(f)]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def errors_of(result):
    """Return the lines on stderr that are not progress."""
    return [line for line in result.err.splitlines() if not PROGRESS.fullmatch(line)]


def at_iteration(monkeypatch, iteration, do):
    """Do something while a training iteration begins."""
    real = train_script.set_learning_rates

    def set_learning_rates(run):
        if run.iteration == iteration:
            do()
        real(run)
    monkeypatch.setattr(train_script, "set_learning_rates", set_learning_rates)


def crash():
    raise SystemExit(9)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)
