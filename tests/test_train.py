import copy
import csv
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Table,
    assert_distribution,
    assert_not_distribution,
    assert_one_line_error,
    read_help,
)

import train as train_script
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from muon import Muon, orthogonalize
from train import (
    TrainConfig,
    diffusion_loss,
    estimate_nelbo,
    forward_process,
    get_batch,
    load_data,
    make_optimizers,
    seed_for,
    set_learning_rates,
)

RUN = ("--max_iters=12", "--eval_interval=4", "--dropout=0.1", "--gradient_accumulation_steps=2",
       "--log_interval=3")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# the maths


def test_forward_process_masks_with_p_mask_and_nothing_else():
    input_ids = torch.randint(9, (400, 500), generator=seeded())
    noisy_batch, masked_indices, p_mask = forward_process(input_ids, 9, 0.01, seeded())
    assert noisy_batch.shape == masked_indices.shape == p_mask.shape == (400, 500)
    assert torch.equal(p_mask, p_mask[:, :1].expand(400, 500))  # one t for a row
    assert (noisy_batch[masked_indices] == 9).all()
    assert torch.equal(noisy_batch[~masked_indices], input_ids[~masked_indices])
    p = p_mask[:, 0]
    z = (masked_indices.double().mean(1) - p) / (p * (1 - p) / 500).sqrt()
    z = z[p < 0.99]  # nearer to 1, z is far from normal
    assert z.abs().max() < 4.5 and abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.15
    # independent tokens
    neighbours = (masked_indices[:, 1:] == masked_indices[:, :-1]).double().mean()
    expected = (p_mask**2 + (1 - p_mask)**2).double().mean()
    torch.testing.assert_close(neighbours, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("eps, p_max", [(1e-3, 1.0), (0.3, 1.0), (0.3, 0.8)])
def test_t_is_uniform_and_stratified(eps, p_max):
    """t is read off p_mask = (p_max - eps) * t + eps."""
    g, B = seeded(), 8
    input_ids = torch.zeros(B, 1, dtype=torch.long)
    p_mask = torch.stack([forward_process(input_ids, 1, eps, g, p_max)[2][:, 0]
                          for _ in range(4000)])                                     # (4000, B)
    t = (p_mask.double() - eps) / (p_max - eps)
    assert t.min() > -1e-6 and t.max() < 1 + 1e-6
    part = (t * B).floor().long().clamp(0, B - 1)
    stratified = (part.sort(dim=1).values == torch.arange(B)).all(dim=1)
    assert stratified.double().mean() > 0.999      # one in each part, but for rounding
    tenths, eighths = torch.full((10,), 0.1), torch.full((B,), 1 / B)
    for row in (0, 3, B - 1):                      # every row's t is uniform by itself
        assert_distribution(torch.histc(t[:, row], 10, 0, 1), tenths)
        assert_distribution(torch.bincount(part[:, row], minlength=B), eighths)
    within = torch.histc((t[:, 5] * B) % 1, 10, 0, 1)   # and so is its place in its part
    assert_distribution(within, tenths)
    assert_not_distribution(torch.histc(t[:, 0] ** 2, 10, 0, 1), tenths)


def test_the_same_generator_masks_the_same():
    input_ids = torch.randint(9, (8, 50), generator=seeded())
    first, same, other = (forward_process(input_ids, 9, 0.01, seeded(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_loss_by_hand():
    """Two rows, p_mask 0.5 and 1; masked: one token of the first row, both of the second; [MASK]'s
    logit is cut off."""
    logits = torch.tensor([[1.0, 3.0, 99.0]]).log()  # p = 1/4, 3/4
    input_ids = torch.tensor([[0, 1], [0, 1]])
    noisy_batch = torch.tensor([[0, 2], [2, 2]])
    p_mask = torch.tensor([[0.5, 0.5], [1.0, 1.0]])

    def model(x):
        assert torch.equal(x, noisy_batch)
        return logits.expand(2, 2, 3)
    loss = diffusion_loss(model, 2, input_ids, noisy_batch, noisy_batch == 2, p_mask)
    by_hand = (math.log(4 / 3) / 0.5 + (math.log(4) + math.log(4 / 3)) / 1) / 4
    assert abs(loss.item() - by_hand) < 1e-6


def enumerate_nelbo(model, windows, eps=None):
    """The NELBO per character of windows (W, L), exactly: all ways to mask, each with its
    probability. With eps: the expected training loss, an integral over t of a polynomial, which
    Gauss-Legendre quadrature does exactly."""
    W, L = windows.shape
    mask_id = model.config.mask_id
    total = 0.0
    nodes, quadrature = np.polynomial.legendre.leggauss(L + 1)
    for masked in itertools.product((False, True), repeat=L):
        n = sum(masked)
        if n == 0:
            continue
        mask = torch.tensor(masked)
        logits = model(torch.where(mask, mask_id, windows))[..., :mask_id].double()
        log_p = logits.log_softmax(-1).gather(-1, windows[..., None])[..., 0]
        ce = -log_p[:, mask].sum().item() / W
        if eps is None:
            weight = 1 / (L * math.comb(L, n) * n)
        else:
            p = (1 - eps) * (nodes + 1) / 2 + eps
            weight = float((quadrature / 2 * p ** (n - 1) * (1 - p) ** (L - n)).sum()) / L
        total += weight * ce
    return total


@pytest.fixture
def small():
    """A random GPT with opinions, on windows of 4 of 3 characters, and 5 windows of data."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=8)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.7)
    return model, torch.randint(3, (22,))  # the last two are a shorter window: left out


def test_estimate_nelbo_converges_to_enumeration(small):
    model, data = small
    with torch.no_grad():
        exact = enumerate_nelbo(model, data[:20].view(5, 4))
    mean, se = estimate_nelbo(model, data, passes=3000)
    assert abs(mean - exact) < 4 * se < 0.05 * exact
    assert estimate_nelbo(model, data, passes=3) == estimate_nelbo(model, data, passes=3)
    assert estimate_nelbo(model, data, passes=3) != estimate_nelbo(model, data, passes=3, seed=1)


def test_standard_error_is_honest(small):
    model, data = small
    means = [estimate_nelbo(model, data, passes=10, seed=s) for s in range(150)]
    spread, claimed = np.std([m for m, _ in means]), np.mean([se for _, se in means])
    assert 0.8 < spread / claimed < 1.25


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_expected_loss_is_the_integral_cut_at_eps(small, eps):
    model, data = small
    windows = data[:20].view(5, 4)
    many, g = windows.repeat(2000, 1), seeded()
    with torch.no_grad():
        exact = enumerate_nelbo(model, windows, eps)
        losses = [diffusion_loss(model, 3, many, *forward_process(many, 3, eps, g)).item()
                  for _ in range(40)]
    assert abs(np.mean(losses) - exact) < 4 * np.std(losses) / 40**0.5 < 0.05 * exact


def test_integral_and_exact_count_are_the_same_bound(small):
    model, data = small
    with torch.no_grad():
        windows = data[:20].view(5, 4)
        integral = enumerate_nelbo(model, windows, eps=0.0)
        assert abs(integral - enumerate_nelbo(model, windows)) < 1e-9


def test_nelbo_of_the_true_conditionals_is_the_entropy():
    """The bound is tight where the predictor is right: an exact value from the maths, not from this
    code."""
    table = Table(T=3, V=2)
    p = table.joint.detach()
    counts = (p * 2000).round().long()
    data = table.outcomes.repeat_interleave(counts, dim=0).flatten()
    entropy = -(counts / counts.sum() * p.log()).sum() / 3
    mean, se = estimate_nelbo(table, data, passes=30)
    assert abs(mean - entropy) < 4 * se < 0.02


# -----------------------------------------------------------------------------
# batches, optimisers, schedule

def batch_of(data, config, iteration):
    return get_batch(data, config, seeded(seed_for(config.seed, iteration)))


def test_batches_belong_to_seed_and_iteration(data_dir):
    def config_of(**kwargs):
        return TrainConfig(data_dir=str(data_dir), block_size=16, **kwargs)
    config = config_of(batch_size=8)
    data, _, chars = load_data(config, 16)
    assert len(chars) == len(set(chars))
    assert isinstance(data, np.memmap) and data.dtype == np.uint16  # it need not fit the memory
    first = batch_of(data, config, 5)
    split = config_of(batch_size=2, gradient_accumulation_steps=4)
    for again in (batch_of(data, config, 5), batch_of(data, split, 5)):
        assert torch.equal(first, again)
    for other in (batch_of(data, config, 6), batch_of(data, config_of(batch_size=8, seed=1), 5)):
        assert not torch.equal(first, other)
    lengths = []
    for input_ids in (batch_of(data, config, i) for i in range(400)):
        B, T = input_ids.shape
        assert B == 8 and 1 <= T <= 16 and 0 <= input_ids.min() and input_ids.max() < len(chars)
        lengths.append(T)
    assert 1 <= sum(T < 16 for T in lengths) <= 12  # about 1 %


def test_batches_are_windows_of_the_data_from_anywhere_in_it():
    data = np.arange(1000, dtype="<u2")
    config = TrainConfig(batch_size=8, block_size=16)
    starts = []
    for i in range(500):
        input_ids = batch_of(data, config, i)
        assert (input_ids.diff(dim=1) == 1).all()
        starts += input_ids[:, 0].tolist() if input_ids.shape[1] == 16 else []
    tenths = torch.histc(torch.tensor(starts).float(), 5, 0, 985)  # 985 starts: 0 to 984
    assert_distribution(tenths, torch.full((5,), 0.2))
    assert min(starts) <= 2 and max(starts) >= 982


def test_a_run_draws_from_seed_and_iteration_alone(train, tmp_path, monkeypatch):
    """So it does not matter how often it was interrupted."""
    seeds, real = [], train_script.get_batch

    def seen(data, config, generator, record):
        seeds.append(generator.initial_seed())
        return real(data, config, generator, record)
    monkeypatch.setattr(train_script, "get_batch", seen)
    assert train("--max_iters=3", "--seed=7", f"--save_filename={tmp_path}/x").code == 0
    assert seeds == [seed_for(7, i) for i in range(3)]
    assert len({seed_for(s, i) for s in range(30) for i in range(30)}) == 900


def test_ids_above_32767_survive():
    data = np.array([0, 32_768, 65_534, 7], dtype="<u2")
    rows = train_script.windows(data, torch.tensor([0, 1]), 3)
    assert rows.dtype == torch.long
    assert rows.tolist() == [[0, 32_768, 65_534], [32_768, 65_534, 7]]


def stand_in(**attributes):
    """What a function needs of a Run."""
    return SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext(),
                           scaler=torch.amp.GradScaler("cpu", enabled=False), **attributes)


@pytest.mark.parametrize("causal", [False, True])
def test_accumulation_gives_the_gradient_of_the_whole_batch(data_dir, causal):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 100, n_layer=1, n_head=1, n_embd=8, causal=causal))
    config = TrainConfig(data_dir=str(data_dir), batch_size=2, gradient_accumulation_steps=4,
                         block_size=16)
    batch = [batch_of(load_data(config, 16)[0], config, 0)]
    loss_function = train_script.autoregressive_loss if causal else diffusion_loss
    if not causal:
        batch += forward_process(batch[0], 99, 0.1, seeded())
    whole = loss_function(model, 99, *batch)
    run = stand_in(model=model, config=config)
    mean = train_script.accumulate_gradient(model, loss_function, batch, run)
    torch.testing.assert_close(mean, whole.detach())
    parameters = list(model.parameters())
    torch.testing.assert_close(tuple(p.grad for p in parameters),
                               torch.autograd.grad(whole, parameters))


def test_what_goes_to_a_gpu_can_be_pinned(monkeypatch):
    """pin_memory refuses a tensor of which two elements share their memory, as p_mask's do."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    batch = forward_process(torch.zeros(4, 8, dtype=torch.long), 9, generator=seeded())
    for tensor in batch:
        assert train_script.to_device(tensor, torch.device("cuda")).equal(tensor)
    assert [tensor.stride() for tensor in pinned] == [(8, 1)] * 3


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(muon, rope):
    model = GPT(GPTConfig(n_layer=2, n_head=1, n_embd=8, rope=rope, bias=True))
    optimizers = make_optimizers(model, TrainConfig(muon=muon))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = sorted(id(p) for group in groups for p in group["params"])
    assert trained == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim == 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_computes_what_pytorch_s_does():
    """Which takes the matrices one by one."""
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128), (96, 32), (32, 32)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    how = dict(lr=0.1, weight_decay=0.2)
    optimizers = (Muon(ours, **how),
                  torch.optim.Muon(theirs, **how, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_orthogonalize_keeps_the_singular_vectors():
    u, v = (torch.linalg.qr(torch.randn(3, n, 30, generator=seeded()))[0] for n in (40, 30))
    x = u @ torch.diag(torch.linspace(0.2, 5, 30)) @ v.mT
    for matrices in (x, x.mT):  # tall, wide
        new = orthogonalize(matrices).float()
        s = torch.linalg.svdvals(new)
        assert ((s > 0.65) & (s < 1.2)).all()
        product = new @ matrices.mT  # symmetric if the singular vectors are the same
        assert (product - product.mT).norm() < 0.02 * product.norm()


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(max_iters=100, warmup_iters=10, final_lr_frac=0.1)
    optimizers = [SimpleNamespace(param_groups=[dict(lr=0.0, peak_lr=1.0), dict(lr=0.0, peak_lr=3)])
                  for _ in range(2)]
    scale = []
    for i in range(101):
        set_learning_rates(stand_in(config=config, iteration=i, optimizers=optimizers))
        scale.append(optimizers[0].param_groups[0]["lr"])
        for optimizer in optimizers:
            assert [group["lr"] for group in optimizer.param_groups] == [scale[i], 3 * scale[i]]
    assert 0 < scale[0] < 0.1 and scale[10] == 1.0
    assert abs(scale[55] - 0.55) < 1e-12 and abs(scale[100] - 0.1) < 1e-12
    assert scale[:11] == sorted(scale[:11]) and scale[10:] == sorted(scale[10:], reverse=True)


# -----------------------------------------------------------------------------
# runs

def weights(path):
    return load_checkpoint(path)[0].state_dict()


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert all(torch.equal(a[name], b[name]) for name in b)


def curve(path):
    with open(f"{path}.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if k != "minutes"}
                for row in csv.DictReader(f)]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how, iteration, do, resumed_at", [
    ("ctrl-c", 6, ctrl_c, 7),
    ("ctrl-c before the first evaluation", 1, ctrl_c, 2),
    ("crash", 7, crash, 4),
    ("crash before the first evaluation", 2, crash, 0),
])
def test_resume_is_bit_for_bit(how, iteration, do, resumed_at, dtype, train, tmp_path, monkeypatch):
    flags = (*RUN, f"--dtype={dtype}")
    assert train(*flags, f"--save_filename={tmp_path}/whole").code == 0
    X = tmp_path / "cut.pt"
    at_iteration(monkeypatch, iteration, do)
    cut = train(*flags, f"--save_filename={tmp_path}/cut")
    assert cut.code == (9 if do is crash else 130) and (do is crash or "--resume" in cut.out)
    assert torch.load(tmp_path / "cut.pt.state")["iteration"] == resumed_at
    assert X.exists() == (resumed_at > 0)
    if X.exists():  # the best model so far, evaluated at iteration 4, or the model as it is now
        assert load_checkpoint(X)[2]["iteration"] == min(resumed_at, 4)
    monkeypatch.undo()
    resumed = train(*flags, f"--save_filename={tmp_path}/cut", "--resume")
    assert resumed.code == 0 and "starting afresh" not in resumed.out
    assert resumed_at == 0 or f"resuming {X} at iteration {resumed_at}" in resumed.out
    assert_same_weights(X, tmp_path / "whole.pt")
    assert curve(X) == curve(tmp_path / "whole.pt")
    if resumed_at > 0:
        assert names(tmp_path) == ["cut.pt", "cut.pt.csv", "whole.pt", "whole.pt.csv"]


KILLED = """
import os, sys, signal, train
real = train.set_learning_rates
def dies_at_3(run):
    if run.iteration == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(run)
train.set_learning_rates = dies_at_3
train.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_resume_finds_a_run_that_was_killed_before_its_first_evaluation(train, tmp_path, data_dir):
    """Its own state, not that of an older run of the same name, which is kept."""
    X = tmp_path / "x.pt"
    flags = (*RUN, "--seed=2", f"--save_filename={X}")
    assert train(*RUN, f"--save_filename={X}").code == 0
    old, old_curve = X.read_bytes(), curve(X)
    killed = subprocess.run([sys.executable, "-c", KILLED, *TINY, f"--data_dir={data_dir}", *flags],
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert X.read_bytes() == (tmp_path / "x_backup1.pt").read_bytes() == old
    resumed = train(*RUN, f"--save_filename={X}", "--resume")  # --seed=2 is in the state
    assert resumed.code == 0 and "complete" not in resumed.out, resumed
    assert train(*RUN, "--seed=2", f"--save_filename={tmp_path}/whole").code == 0
    assert_same_weights(X, tmp_path / "whole.pt")
    assert curve(X) == curve(tmp_path / "whole.pt") != old_curve
    assert load_checkpoint(X)[2]["hyperparameters"]["seed"] == 2
    assert (tmp_path / "x_backup1.pt").read_bytes() == old
    assert curve(tmp_path / "x_backup1.pt") == old_curve


def test_a_run_resumed_at_its_start_makes_no_second_backup(train, tmp_path, monkeypatch):
    at_iteration(monkeypatch, 3, crash)
    train(*RUN, f"--save_filename={tmp_path}/x")
    monkeypatch.undo()
    resumed = train(*RUN, f"--save_filename={tmp_path}/x", "--resume")
    assert resumed.code == 0 and "resuming" in resumed.out and "backup" not in resumed.out
    assert names(tmp_path) == ["x.pt", "x.pt.csv"]


COPY = ("(torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B",
        "((torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B) ** 2")


def test_the_line_that_is_shown_is_the_one_that_trains(run, tmp_path, data_dir):
    """Copies of the scripts: t -> t squared in forward_process changes the training loss, nothing
    changes without it."""
    code = (ROOT / "train.py").read_text(encoding="utf-8")
    assert code.count(COPY[0]) == 1
    curves = []
    for name, changed in (("same", code), ("again", code), ("squared", code.replace(*COPY))):
        folder = tmp_path / name
        folder.mkdir()
        for script in ROOT.glob("*.py"):
            shutil.copy(script, folder)
        (folder / "train.py").write_text(changed, encoding="utf-8")
        result = run("train.py", *TINY, f"--data_dir={data_dir}", "--max_iters=6",
                     "--eval_interval=3", "--save_filename=x", cwd=folder)
        assert result.returncode == 0, result.stderr
        curves.append(curve(folder / "x.pt"))
    same, again, squared = curves
    assert same == again and len(same) == 2
    assert all(a["loss"] != b["loss"] for a, b in zip(same, squared, strict=True))


def test_x_keeps_the_best_and_says_what_it_is(train, tmp_path):
    """With a rate that wrecks the weights after a while, the last evaluation is not the best."""
    X = tmp_path / "deep" / "folder" / "model"
    result = train("--max_iters=40", "--eval_interval=5", "--learning_rate=1", "--muon=False",
                   "--warmup_iters=25", "--final_lr_frac=1", "--ema_decay=0",
                   f"--save_filename={X}")
    rows = curve(f"{X}.pt")
    model, chars, info = load_checkpoint(f"{X}.pt")
    best = min(rows, key=lambda row: row["val"])
    assert result.code == 0 and [row["iteration"] for row in rows] == list(range(5, 41, 5))
    assert best != rows[-1]
    assert info["iteration"] == best["iteration"]
    assert info["nelbo"] == {"train": best["train"], "val": best["val"]}
    assert info["hyperparameters"]["learning_rate"] == 1.0 and info["dtype"] == "float32"
    header = (tmp_path / "deep" / "folder" / "model.pt.csv").read_text().splitlines()[0]
    assert header == "iteration,minutes,loss,train,train_se,val,val_se"
    shown = f"iteration {best['iteration']:.0f}, {best['val']:.4f} nats per character on validation"
    assert shown in result.out
    for row in rows:
        assert (f"iteration {row['iteration']:.0f}: val NELBO {row['val']:.4f} +- "
                f"{row['val_se']:.4f} nats per character\n") in result.out


@pytest.mark.parametrize("n_tokens, starts", [
    (19, [0]), (30, [0, 40, 90]), (59, [0, 20, 40, 70, 90]), (100, range(0, 100, 10)),
    (10**6, range(0, 100, 10))])
def test_an_evaluation_is_spread_over_the_split(n_tokens, starts):
    """The beginning of a split may be easier than the rest, as in Tiny Shakespeare."""
    found = train_script.spread_windows(np.arange(107, dtype=np.uint16), n_tokens, 10)
    assert found.tolist() == [start + i for start in starts for i in range(10)]


def test_what_is_saved_is_what_was_evaluated(train, tmp_path, data_dir):
    X = tmp_path / "x.pt"
    train(*RUN, "--eval_chars=160", f"--save_filename={X}")
    model, chars, info = load_checkpoint(X)
    val = load_data(TrainConfig(data_dir=str(data_dir)), 16, chars)[1]
    for data, same in ((train_script.spread_windows(val, 160, 16), True), (val[:160], False)):
        mean, _ = estimate_nelbo(model, data, passes=2, batch_size=4)
        assert (mean == pytest.approx(info["nelbo"]["val"], rel=1e-6)) == same


@pytest.mark.parametrize("muon", [True, False])
def test_it_learns(call, tmp_path, muon):
    """abcdefghabcdefgh...: one look at any character tells all others, so of 16 characters only the
    first must cost ln 8, and a model that does not look pays ln 8 for each."""
    (tmp_path / "cycle.txt").write_text("abcdefgh" * 500)
    prepare.prepare(tmp_path / "cycle.txt", tmp_path)
    call(train_script, *TINY, f"--data_dir={tmp_path}", "--max_iters=300", "--eval_interval=150",
         "--n_embd=32", "--batch_size=16", f"--muon={muon}", f"--save_filename={tmp_path}/x")
    assert math.log(8) / 16 < curve(tmp_path / "x.pt")[-1]["val"] < 0.6 * math.log(8)


PROGRESS = re.compile(r"iteration ([\d,]+): loss (\d+\.\d\d), ([\d,]+) characters/s")


def test_progress_is_plain_lines_where_stderr_is_no_terminal(train, tmp_path):
    X = tmp_path / "x"
    result = train("--max_iters=110", "--eval_interval=5", "--log_interval=5", "--warmup_iters=0",
                   "--eval_chars=160", f"--save_filename={X}")
    lines = result.err.splitlines()
    assert result.code == 0 and "\r" not in result.err and "\x1b" not in result.err
    assert "characters/s" not in result.out
    matches = [PROGRESS.fullmatch(line) for line in lines]
    assert all(matches) and [match[1] for match in matches] == ["5", "50", "100"], lines
    rows = {row["iteration"]: row for row in curve(f"{X}.pt")}
    for match in matches:  # the loss since the last reading, and a speed
        assert match[2] == f"{rows[int(match[1])]['loss']:.2f}"
        assert int(match[3].replace(",", "")) > 0


def test_the_same_command_twice_keeps_both_models(train, tmp_path):
    X = tmp_path / "x.pt"
    first = train(*RUN, f"--save_filename={X}")
    second = train(*RUN, f"--save_filename={X}", "--seed=2")
    assert first.code == second.code == 0
    assert "x_backup1.pt" in second.out and "backup" not in first.out
    assert names(tmp_path) == ["x.pt", "x.pt.csv", "x_backup1.pt", "x_backup1.pt.csv"]
    assert load_checkpoint(X)[2]["hyperparameters"]["seed"] == 2
    assert load_checkpoint(tmp_path / "x_backup1.pt")[2]["hyperparameters"]["seed"] == 1337
    third = train(*RUN, f"--save_filename={X}")
    assert "x_backup2.pt" in third.out


def test_a_backup_never_takes_a_name_that_is_in_use(train, tmp_path):
    (tmp_path / "x_backup1.pt.csv").write_text("mine")
    (tmp_path / "x.pt.csv").write_text("old")
    result = train(*RUN, f"--save_filename={tmp_path}/x")
    assert result.code == 0 and (tmp_path / "x_backup1.pt.csv").read_text() == "mine"
    assert (tmp_path / "x_backup2.pt.csv").read_text() == "old"


def test_the_old_model_stays_until_the_first_new_one(train, tmp_path, monkeypatch):
    X = tmp_path / "x.pt"
    train(*RUN, f"--save_filename={X}")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    at_iteration(monkeypatch, 3, crash)
    train(*RUN, f"--save_filename={X}")
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.pop("x.pt.state") and before.items() <= after.items()
    backups = {name.replace("_backup1", ""): after.pop(name) for name in list(after)
               if "backup" in name}
    assert after == before == backups


def test_an_interrupted_run_is_pointed_out_and_kept(train, tmp_path, monkeypatch):
    X = tmp_path / "x.pt"
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={X}")
    monkeypatch.undo()
    old = (tmp_path / "x.pt.state").read_bytes()
    again = train(*RUN, f"--save_filename={X}")
    assert again.code == 0 and "--resume continues it" in again.out
    assert (tmp_path / "x_backup1.pt.state").read_bytes() == old
    assert train(*RUN, f"--save_filename={tmp_path}/x_backup1", "--resume").code == 0
    assert_same_weights(X, tmp_path / "x_backup1.pt")


def test_resume_with_nothing_to_resume(train, tmp_path):
    flags = (*RUN, f"--save_filename={tmp_path}/x", "--resume")
    fresh = train(*flags)
    assert fresh.code == 0 and "starting afresh" in fresh.out
    before = (tmp_path / "x.pt").read_bytes()
    complete = train(*flags)
    assert complete.code == 0 and "complete: nothing to resume" in complete.out
    assert (tmp_path / "x.pt").read_bytes() == before and names(tmp_path) == ["x.pt", "x.pt.csv"]


def test_resume_takes_the_same_data_from_another_folder_and_no_other(train, call, tmp_path,
                                                                     data_dir, monkeypatch):
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={tmp_path}/x")
    monkeypatch.undo()
    shutil.copytree(data_dir, tmp_path / "moved")
    text = (data_dir / "input.txt").read_text(encoding="utf-8")
    (tmp_path / "text").write_text(text[::-1], encoding="utf-8")
    prepare.prepare(tmp_path / "text", tmp_path / "other")
    resume = ("--device=cpu", f"--save_filename={tmp_path}/x", "--resume")
    assert_one_line_error(call(train_script, *resume, f"--data_dir={tmp_path}/other"), "data")
    moved = call(train_script, *resume, f"--data_dir={tmp_path}/moved", "--log_interval=1")
    assert moved.code == 0 and "resuming" in moved.out, moved


def test_a_file_that_is_no_checkpoint_is_not_replaced(train, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"mine")
    assert_one_line_error(train(*RUN, f"--save_filename={tmp_path}/train.bin"), "train.bin")
    assert (tmp_path / "train.bin").read_bytes() == b"mine" and names(tmp_path) == ["train.bin"]


def test_resume_refuses_other_knobs_and_a_damaged_state(train, tmp_path, monkeypatch):
    flags = (*RUN, f"--save_filename={tmp_path}/x")
    at_iteration(monkeypatch, 6, crash)
    train(*flags)
    assert_one_line_error(train(*flags, "--resume", "--seed=3"), "--seed=3", "1337")
    state = tmp_path / "x.pt.state"
    state.write_bytes(b"half")
    assert_one_line_error(train(*flags, "--resume"), "x.pt.state", "damaged")
    for foreign in ([1, 2], {"config": {"moe": 8}}, {"config": {}, "x": 1}):
        torch.save(foreign, state)
        assert_one_line_error(train(*flags, "--resume"), "x.pt.state", "not a training state")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_file(train, tmp_path, monkeypatch):
    real, factor = train_script.diffusion_loss, [1.0]
    monkeypatch.setattr(train_script, "diffusion_loss", lambda *args: real(*args) * factor[0])
    at_iteration(monkeypatch, 6, lambda: factor.append(factor.pop() * math.nan))
    result = train("--max_iters=12", "--eval_interval=4", f"--save_filename={tmp_path}/x")
    errors = [line for line in result.err.splitlines() if not PROGRESS.fullmatch(line)]
    assert result.code == 1 and len(errors) == 1
    assert errors[0].startswith("error: training diverged at iteration 8 (loss nan)")
    assert load_checkpoint(tmp_path / "x.pt")[2]["iteration"] == 4
    assert torch.load(tmp_path / "x.pt.state")["iteration"] == 4


def test_float16_with_its_gradient_scaler(train, tmp_path, monkeypatch):
    """The scale starts at 65536. An overflow halves it and skips both optimizers; the run ends well
    all the same."""
    real, seen = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, max_norm):
        parameters = list(parameters)
        if len(seen) == 1:
            parameters[-1].grad.fill_(math.inf)  # ln_f: AdamW's, so Muon must notice it too
        seen.append([p.detach().clone() for p in parameters])
        return real(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert train(*RUN, "--dtype=float16", f"--save_filename={tmp_path}/x").code == 0
    skipped, not_skipped = zip(seen[1], seen[2], strict=True), zip(seen[2], seen[3], strict=True)
    assert all(torch.equal(a, b) for a, b in skipped)
    assert not any(torch.equal(a, b) for a, b in not_skipped)


def test_the_average_builds_no_graph(train, tmp_path, monkeypatch):
    saved, save = [], train_script.save_checkpoint

    def seen(path, model, *args, **info):
        saved.append(model)
        return save(path, model, *args, **info)
    monkeypatch.setattr(train_script, "save_checkpoint", seen)
    train(*RUN, f"--save_filename={tmp_path}/x")
    assert len(saved) > 1 and not any(p.requires_grad for p in saved[0].parameters())


def test_init_from(train, tmp_path):
    train(*RUN, f"--save_filename={tmp_path}/x")
    onward = train("--max_iters=4", f"--init_from={tmp_path}/x", f"--save_filename={tmp_path}/y",
                   "--learning_rate=0", "--muon_lr=0")
    assert onward.code == 0
    assert_same_weights(tmp_path / "x.pt", tmp_path / "y.pt")
    assert_one_line_error(train(f"--init_from={tmp_path}/x", "--n_layer=3"), "--n_layer=3")


def test_the_vocabulary_grows_by_the_characters_of_another_text(call, train, tmp_path, text):
    train("--max_iters=1", f"--save_filename={tmp_path}/x")
    (tmp_path / "new.txt").write_text("\N{SNOWMAN}an \N{SNOWMAN}ld man" * 20, encoding="utf-8")
    prepare.prepare(tmp_path / "new.txt", tmp_path / "new")
    result = call(train_script, f"--data_dir={tmp_path}/new", f"--init_from={tmp_path}/x",
                  "--device=cpu", "--dtype=float32", "--max_iters=1", "--learning_rate=0",
                  "--muon_lr=0", "--batch_size=2", f"--save_filename={tmp_path}/y")
    assert result.code == 0, result
    (old, chars, _), (new, grown, _) = (load_checkpoint(tmp_path / f"{x}.pt") for x in "xy")
    assert grown == [*chars, "\N{SNOWMAN}"] and new.config.vocab_size == old.config.vocab_size + 1
    idx = torch.randint(len(chars), (2, 16), generator=seeded())
    idx[:, ::3] = old.config.mask_id
    moved = idx.where(idx != old.config.mask_id, new.config.mask_id)
    assert torch.equal(old(idx)[..., :-1], new(moved)[..., :-2])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl")
def test_a_second_run_of_one_name_is_refused(train, tmp_path, data_dir, run):
    path = tmp_path / "x"
    flags = (ROOT / "train.py", *TINY, f"--data_dir={data_dir}", f"--save_filename={path}",
             "--max_iters=1000000", "--eval_interval=5")
    first = subprocess.Popen([sys.executable, *flags], stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if "iteration 5" in line:
            break
    for resume in ((), ("--resume",)):
        second = run(*flags, *resume)
        assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
        assert "another run is writing" in second.stderr and str(path) in second.stderr
    assert first.poll() is None
    first.kill()
    first.wait()
    train_script.lock(tmp_path / "x.pt.state").close()  # no stale lock


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("how", ["> /dev/full", ">&-", "2>&-", "| head -1",
                                 "> /dev/null; test -f 模型.pt"])
def test_standard_output_may_go_away(tmp_path, data_dir, how):
    """A run does not end with it, nor with an encoding that lacks the characters of a name."""
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(TINY)} --data_dir={data_dir} " \
              "--save_filename=模型 --max_iters=4 --eval_interval=2"
    result = subprocess.run(["bash", "-c", f"{command} {how}"], cwd=tmp_path, capture_output=True,
                            env=dict(os.environ, PYTHONIOENCODING="cp1252"))
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr
    assert b"xception" not in result.stderr
    assert names(tmp_path) == ["模型.pt", "模型.pt.csv"]


@pytest.mark.parametrize("env", [dict(RANK="abc"), dict(RANK="1"), dict(WORLD_SIZE="0"),
                                 dict(RANK="2", WORLD_SIZE="2"), dict(WORLD_SIZE="")])
def test_variables_of_torchrun_that_make_no_sense(tmp_path, env):
    result = subprocess.run([sys.executable, ROOT / "train.py", "--data_dir=/nowhere"], text=True,
                            env={**os.environ, **env}, capture_output=True)
    word = "nowhere" if env == {"WORLD_SIZE": ""} else "RANK"
    assert_one_line_error(SimpleNamespace(code=result.returncode, err=result.stderr), word)


def test_compile_compiles_once(train, tmp_path, monkeypatch):
    """Whatever the lengths of the windows: each compilation takes long."""
    lengths, compiled, get_batch = iter([3, 16, 5, 16, 7, 1]), [], train_script.get_batch

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(train_script, "get_batch",
                        lambda *args: get_batch(*args)[:, :next(lengths)])
    assert train("--compile", "--max_iters=6", f"--save_filename={tmp_path}/x").code == 0
    assert len(compiled) == 1


def test_compile_that_does_not_work_here(train, tmp_path, monkeypatch):
    class NoCompiler(RuntimeError):
        """No working C++ compiler found"""
    NoCompiler.__module__ = "torch._inductor.exc"

    def broken(*_):
        raise NoCompiler("no C++ compiler\nand a hundred lines more")
    monkeypatch.setattr(train_script, "diffusion_loss", broken)
    result = train("--max_iters=1", f"--save_filename={tmp_path}/x")
    assert_one_line_error(result, "--compile", "no C++ compiler")


def test_eval_only(train, tmp_path, data_dir):
    """All of both splits, in 8 passes."""
    train(*RUN, f"--save_filename={tmp_path}/x")
    before = names(tmp_path)
    result = train("--eval_only", f"--init_from={tmp_path}/x")
    assert result.code == 0 and result.out.count("NELBO") == 2 and names(tmp_path) == before
    model, chars, _ = load_checkpoint(tmp_path / "x.pt")
    splits = load_data(TrainConfig(data_dir=str(data_dir)), 16, chars)[:2]
    for name, data in zip(("train", "val"), splits, strict=True):
        mean, se = estimate_nelbo(model, data, passes=8, batch_size=4)
        assert f"{name} NELBO {mean:.4f} +- {se:.4f} nats per character" in result.out
    assert_one_line_error(train("--eval_only"), "--init_from")


def test_ids_are_translated_to_the_checkpoint_s_vocabulary(call, train, tmp_path, text):
    """Other prepared data may use fewer characters: the same text must get the same NELBO; an
    unknown one is an error."""
    train(*RUN, f"--save_filename={tmp_path}/x")
    lines = [line for line in text.splitlines() if "e" not in line] * 20
    few = "\n".join(lines)
    for name, content in (("few", few), ("alien", few + "\N{SNOWMAN}")):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
        prepare.prepare(tmp_path / f"{name}.txt", tmp_path / name)
    chars = load_checkpoint(tmp_path / "x.pt")[1]
    data, _, kept = load_data(TrainConfig(data_dir=str(tmp_path / "few")), 16, chars)
    assert kept == chars and "".join(chars[i] for i in data) == few[:len(data)]
    flags = ("--eval_only", f"--init_from={tmp_path}/x", "--device=cpu", "--dtype=float32")
    assert call(train_script, *flags, f"--data_dir={tmp_path}/few").code == 0
    alien = call(train_script, *flags, f"--data_dir={tmp_path}/alien")
    assert_one_line_error(alien, "alien", "\N{SNOWMAN}")


@pytest.mark.parametrize("flags, words", [
    (["--lerning_rate=1"], ["--lerning_rate"]),
    (["--learn=1"], ["--learn"]),
    (["--max_iters=many"], ["--max_iters", "many"]),
    (["--max_iters=0"], ["--max_iters"]),
    (["--compile=perhaps"], ["--compile"]),
    (["--learning_rate=nan"], ["--learning_rate"]),
    (["--final_lr_frac=-1"], ["--final_lr_frac"]),
    (["--ema_decay=1"], ["--ema_decay"]),
    (["--p_max=1.5"], ["--p_max", "1.5"]),
    (["--p_max=0.05"], ["--p_max", "--eps=0.1"]),
    (["--seed=-1"], ["--seed"]),
    (["--n_head=3"], ["n_head=3", "n_embd=16"]),
    (["--device=gpu"], ["--device=gpu"]),
    (["--device=cuda:99"], ["cuda:99"]),
    (["--dtype=int4"], ["--dtype=int4"]),
    (["--data_dir=/nowhere"], ["meta.json", "/nowhere", "prepare.py"]),
    (["--data_dir=", "--dataset=nothing"], ["nothing"]),
    (["--block_size=5000"], ["val.bin", "--block_size=5000"]),
    (["--init_from=/nowhere/x"], ["/nowhere/x.pt"]),
])
def test_bad_input_is_one_line_and_leaves_nothing(train, tmp_path, flags, words):
    assert_one_line_error(train(f"--save_filename={tmp_path}/x", *flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_save_filename_must_be_writable(train, tmp_path):
    (tmp_path / "x.pt").mkdir()
    assert_one_line_error(train(f"--save_filename={tmp_path}/x"), "folder")
    (tmp_path / "file").write_text("mine")
    assert_one_line_error(train(f"--save_filename={tmp_path}/file/x"), "file")


@pytest.mark.parametrize("name, content, words", [
    ("train.bin", b"\0\0\0", ["train.bin", "damaged"]),
    ("val.bin", b"", ["val.bin", "damaged"]),
    ("train.bin", b"\1\0" * 100, ["train.bin", "do not belong together"]),  # of another text
    ("meta.json", b"{", ["meta.json", "damaged"]),
    ("meta.json", b"[]", ["meta.json", "damaged"]),
    ("meta.json", b'{"chars": "ab"}', ["meta.json", "damaged"]),
    ("meta.json", b'{"chars": "ab", "crc32": {}}', ["meta.json", "damaged"]),
    ("val.bin", None, ["val.bin"]),
])
def test_damaged_data_is_one_line(call, data_dir, tmp_path, name, content, words):
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = call(train_script, f"--data_dir={tmp_path}", "--block_size=16", "--max_iters=1",
                  f"--save_filename={tmp_path}/x")
    assert_one_line_error(result, *words)


def test_data_without_a_vocabulary_are_one_line(call, data_dir, tmp_path):
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    del meta["chars"]
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    result = call(train_script, f"--data_dir={tmp_path}", f"--save_filename={tmp_path}/x")
    assert_one_line_error(result, "meta.json", "damaged")


def test_help_groups_and_explains_every_knob(train):
    result = train("--help")
    groups = read_help(result.out)
    assert result.code == 0
    assert set(groups) >= {"files", "device", "model", "optimization", "evaluation"}
    entries = {flag: text for group in groups.values() for flag, text in group.items()}
    fields = train_script.fields(TrainConfig)
    assert set(entries) == {f.name for f in fields} | {"help"}
    for f in fields:
        default = str(f.default) if f.default != "" else "none"
        assert "".join(f.metadata["help"].split()) in "".join(entries[f.name].split())
        assert re.search(rf"\(default: {re.escape(default)}[;)]", entries[f.name]), f.name
    assert set(groups["model"]) == {f.name for f in train_script.fields(GPTConfig)} - {"vocab_size"}


def test_flags_with_a_space_and_switches(monkeypatch):
    config, given = train_script.parse_args(["--device", "cpu", "--seed", "5", "--compile",
                                             "--rope=False"])
    assert (config.seed, config.compile, config.rope, config.muon) == (5, True, False, True)
    assert given == {"device": "cpu", "seed": 5, "compile": True, "rope": False}


def test_at_least_one_window_is_evaluated(call, data_dir, tmp_path):
    """Of the block_size that --init_from brings."""
    _, _, chars = load_data(TrainConfig(data_dir=str(data_dir)), 16)
    config = GPTConfig(block_size=512, vocab_size=len(chars) + 1, n_layer=1, n_head=2, n_embd=16)
    save_checkpoint(tmp_path / "base.pt", GPT(config), chars)
    result = call(train_script, f"--init_from={tmp_path}/base", f"--save_filename={tmp_path}/x",
                  f"--data_dir={data_dir}", "--eval_chars=300", "--max_iters=1", "--batch_size=2",
                  "--device=cpu", "--dtype=float32")
    assert_one_line_error(result, "--eval_chars", "512", "300")
