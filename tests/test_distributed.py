"""Two processes on this machine, connected by gloo: the same gradient, the same weights, and no
survivor."""

import csv
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

import lib.muon
from diffusion import diffusion_loss, forward_process
from lib.checkpoint import load_checkpoint
from model import GPT, GPTConfig
from train import TrainConfig, get_batch

SHORT = ("--eval_tokens=160", "--warmup_iters=5")
DATA = "np.arange(999) % 65"
GRADIENT = f"""
import os, sys, torch, train
import numpy as np
from types import SimpleNamespace
from lib.device import connect, read_processes
from model import GPT, GPTConfig
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

processes = read_processes()
connect("cpu", processes)
for micro_steps in (1, 3):
    config = train.TrainConfig(block_size=16, batch_size=4, gradient_accumulation_steps=micro_steps,
                               dtype="float32")
    torch.manual_seed(processes.rank)  # the first process's weights count
    net = train.DistributedDataParallel(GPT(GPTConfig(16, 66, 1, 2, 16)))
    run = SimpleNamespace(model=net.module, scaler=torch.amp.GradScaler("cpu", enabled=False))
    calls = []
    net.register_comm_hook(None, lambda _, bucket: calls.append(0) or allreduce_hook(None, bucket))
    generator = torch.Generator().manual_seed(0)
    input_ids = train.get_batch({DATA}, config, generator)
    batch = (input_ids, *train.forward_process(input_ids, 65, config.eps, generator))
    train.add_gradient(net, train.diffusion_loss, batch, run, config, processes)
    torch.save([[p.grad for p in net.parameters()], len(calls)],
               f"{{sys.argv[1]}}/{{processes.rank}}{{micro_steps}}")
torch.distributed.barrier()
os._exit(0)  # all is saved; a hook in Python can make gloo's threads abort while Python shuts down
"""

RUN = """
import os, sys, torch, train, lib.muon

lib.muon.has_bfloat16 = lambda device: False  # rounding would enlarge small differences
_, dies, out, *sys.argv[1:] = sys.argv
rank = os.environ["RANK"]
set_learning_rates, loop = train.set_learning_rates, train.train
def dies_at_12(run, config):
    if (run.iteration, rank) == (12, dies):
        os.kill(os.getpid(), 9)
    set_learning_rates(run, config)
def keeps_weights(run, *args):
    interrupted = loop(run, *args)
    torch.save(run.model.state_dict(), f"{out}/{rank}")
    return interrupted
train.set_learning_rates, train.train = dies_at_12, keeps_weights
train.main()
"""


def finish(process):
    """Wait for the process and keep what it printed. One that hangs is killed; the timeout is for a
    slow machine, since gloo would wait for two hours."""
    try:
        process.out, process.err = process.communicate(timeout=180)
    finally:
        process.kill()
    return process


@pytest.fixture
def two():
    """two(code, *flags) -> two finished processes that run code as torchrun would start them."""
    def two(code, *flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = dict(os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=str(port), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", code, *map(str, flags)]
        both = [subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
        try:
            return [finish(process) for process in both]
        finally:
            for process in both:
                process.kill()
    return two


def test_two_processes_compute_the_gradient_of_the_global_batch(two, tmp_path):
    first, second = two(GRADIENT, tmp_path)
    assert first.returncode == second.returncode == 0, first.err + second.err
    for micro_steps in (1, 3):
        config = TrainConfig(block_size=16, batch_size=4, gradient_accumulation_steps=micro_steps)
        torch.manual_seed(0)
        model = GPT(GPTConfig(16, 66, 1, 2, 16))
        generator = torch.Generator().manual_seed(0)
        input_ids = get_batch(eval(DATA, {"np": np}), config, generator)
        noisy = forward_process(input_ids, 65, config.eps, generator)
        diffusion_loss(model, 65, input_ids, *noisy).backward()
        for rank in (0, 1):
            grads, syncs = torch.load(tmp_path / f"{rank}{micro_steps}")
            assert syncs == 1  # however many passes: only the last one waits for the other process
            for ours, p in zip(grads, model.parameters(), strict=True):
                torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-6)


def test_two_processes_end_with_the_same_weights_and_one_printout(two, train, tmp_path, data_dir,
                                                                  monkeypatch):
    run = ("--max_iters=10", "--gradient_accumulation_steps=2", *SHORT)
    flags = [*TINY, f"--data_dir={data_dir}", *run]
    first, second = two(RUN, -1, tmp_path, *flags, f"--save_filename={tmp_path / 'two.pt'}")
    assert first.returncode == second.returncode == 0, first.err + second.err
    assert "done in" in first.out and second.out == second.err == ""
    assert first.out.count("sample: ") == 1
    weights = [torch.load(tmp_path / rank) for rank in "01"]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    monkeypatch.setattr(lib.muon, "has_bfloat16", lambda device: False)
    assert train(*run, f"--save_filename={tmp_path / 'one.pt'}").code == 0
    one, two = (load_checkpoint(tmp_path / name) for name in ("one.pt", "two.pt"))
    torch.testing.assert_close(one[0].state_dict(), two[0].state_dict(), rtol=1e-3, atol=1e-4)
    assert one[2]["nelbo"]["val"] == pytest.approx(two[2]["nelbo"]["val"], abs=1e-4)
    one_loss, two_loss = (next(csv.DictReader(open(f"{tmp_path}/{name}.pt.csv")))["loss"]
                          for name in ("one", "two"))
    # the global batch's, not one process's
    assert float(one_loss) == pytest.approx(float(two_loss), rel=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes_alone(two, train, tmp_path, data_dir,
                                                                   dies):
    X = tmp_path / "X.pt"
    flags = ["--max_iters=20", "--eval_interval=5", "--muon=False", *SHORT]  # Muon rounds
    both = two(RUN, dies, tmp_path, *TINY, f"--data_dir={data_dir}", *flags, f"--save_filename={X}")
    assert both[dies].returncode == -signal.SIGKILL
    assert both[1 - dies].returncode not in (0, None)
    assert load_checkpoint(X)[2]["iteration"] in (5, 10)
    resumed = train(*flags, f"--save_filename={X}", "--resume")
    assert resumed.code == 0 and f"resuming {X} at iteration 10\n" in resumed.out, resumed
    assert train(*flags, f"--save_filename={tmp_path / 'whole.pt'}").code == 0
    whole, ours = (load_checkpoint(path)[0].state_dict() for path in (tmp_path / "whole.pt", X))
    torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_under_torchrun_saves_once_and_stops_all_processes(tmp_path, data_dir):
    X = tmp_path / "X.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--max_iters=100000",
               "--eval_interval=100000", f"--save_filename={X}"]
    process = subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    for line in process.stderr:  # progress
        if line.startswith("iteration 10 of 100,000: loss"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process = finish(process)
    assert process.returncode != 0, process.err
    assert process.out.count("interrupted at iteration") == 1, process.out + process.err
    iteration = load_checkpoint(X)[2]["iteration"]
    assert 0 < iteration < 100000 and torch.load(f"{X}.state")["iteration"] == iteration


def test_an_error_of_two_processes_is_printed_once(two, tmp_path, data_dir):
    """Rows that can't be divided among the processes."""
    first, second = two("import train; train.main()", *TINY, f"--data_dir={data_dir}",
                        "--batch_size=5", f"--save_filename={tmp_path}/x")
    assert first.returncode == second.returncode == 2
    assert first.err.count("\n") == 1 and "error: --batch_size must be a multiple" in first.err
    assert second.err == second.out == "" and list(tmp_path.iterdir()) == []
