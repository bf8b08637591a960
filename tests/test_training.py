"""Training: batches, gradients, optimizers, learning rates, the averaged weights, and progress."""

import copy
import functools
import math
import sys
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import torch
from conftest import TINY, assert_distribution, assert_one_line_error
from helpers import PROGRESS, RUN, curve, seeded

import diffusion
import lib.muon
import lib.run
import train as train_script
from diffusion import diffusion_loss, forward_process
from lib.data import cut_windows, load_data
from lib.device import Processes
from lib.muon import Muon, make_optimizers, orthogonalize
from lib.run import Progress
from lib.twin import autoregressive_loss
from model import GPT, GPTConfig
from train import (
    TrainConfig,
    add_gradient,
    get_batch,
    seed_for,
    set_learning_rates,
    to_device,
    update_weights,
)

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)

# -----------------------------------------------------------------------------
# batches


def batch_of(data, config, iteration):
    return get_batch(data, config, seeded(seed_for(config.seed, iteration)))


def test_a_batch_depends_on_seed_and_iteration_and_on_nothing_else(data_dir):
    def config_of(**kwargs):
        return TrainConfig(block_size=16, **kwargs)
    config = config_of(batch_size=8)
    data = load_data(data_dir, 16).train
    assert isinstance(data, np.memmap) and data.dtype == np.uint16  # it need not fit the memory
    first = batch_of(data, config, 5)
    split = config_of(batch_size=2, gradient_accumulation_steps=4)
    for again in (batch_of(data, config, 5), batch_of(data, split, 5)):
        assert torch.equal(first, again)
    for other in (batch_of(data, config, 6), batch_of(data, config_of(batch_size=8, seed=1), 5)):
        assert not torch.equal(first, other)


def test_one_batch_in_a_hundred_is_cut_to_a_random_length():
    data, config = np.arange(1000, dtype="<u2"), TrainConfig(batch_size=8, block_size=16)
    shapes = [batch_of(data, config, i).shape for i in range(2000)]
    assert all(B == 8 and 1 <= T <= 16 for B, T in shapes)
    shorter = [T for _, T in shapes if T < 16]
    assert 8 <= len(shorter) <= 35 and len(set(shorter)) >= 6


def test_batches_are_windows_of_the_data_from_anywhere_in_it():
    data = np.arange(1000, dtype="<u2")
    config = TrainConfig(batch_size=8, block_size=16)
    starts = []
    for i in range(500):
        input_ids = batch_of(data, config, i)
        assert (input_ids.diff(dim=1) == 1).all()
        starts += input_ids[:, 0].tolist() if input_ids.shape[1] == 16 else []
    fifths = torch.histc(torch.tensor(starts).float(), 5, 0, 985)  # 985 starts: 0 to 984
    assert_distribution(fifths, torch.full((5,), 0.2))
    assert min(starts) <= 2 and max(starts) >= 982


def test_a_run_draws_its_batches_from_seed_and_iteration(train, tmp_path, monkeypatch):
    """So it does not matter how often it was interrupted."""
    seeds, real = [], train_script.get_batch

    def seen(data, config, generator, record):
        seeds.append(generator.initial_seed())
        return real(data, config, generator, record)
    monkeypatch.setattr(train_script, "get_batch", seen)
    assert train("--max_iters=3", "--seed=7", "--eval_tokens=160",
                 f"--save_filename={tmp_path}/x").code == 0
    assert seeds == [seed_for(7, i) for i in range(3)]
    assert len({seed_for(s, i) for s in range(30) for i in range(30)}) == 900


def test_token_ids_above_32767_stay_positive():
    data = np.array([0, 32_768, 65_534, 7], dtype="<u2")
    rows = cut_windows(data, np.array([0, 1]), 3)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 32_768, 65_534], [32_768, 65_534, 7]]


# -----------------------------------------------------------------------------
# the gradient

def test_the_forward_process_of_diffusion_py_is_what_trains(train, tmp_path, monkeypatch):
    """Nothing changes from run to run, but with t squared the training loss does, in every row of
    the loss curve. So to change that function is to change the training."""
    assert train_script.forward_process is diffusion.forward_process
    assert train_script.diffusion_loss is diffusion.diffusion_loss
    flags = ("--max_iters=6", "--eval_interval=3", "--eval_tokens=320", "--warmup_iters=0")

    def t_squared(input_ids, mask_id, eps, generator, p_max):
        B, T = input_ids.shape
        t = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
        p_mask = ((p_max - eps) * t**2 + eps)[:, None].expand(B, T)
        masked_indices = torch.rand(B, T, generator=generator) < p_mask
        return torch.where(masked_indices, mask_id, input_ids), masked_indices, p_mask

    curves = []
    for name in ("same", "again", "squared"):
        if name == "squared":
            monkeypatch.setattr(train_script, "forward_process", t_squared)
        assert train(*flags, f"--save_filename={tmp_path}/{name}").code == 0
        curves.append(curve(tmp_path / f"{name}.pt"))
    same, again, squared = curves
    assert same == again and len(same) == 2
    assert all(a["loss"] != b["loss"] for a, b in zip(same, squared, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_accumulation_gives_the_gradient_of_the_whole_batch(data_dir, causal):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 100, n_layer=1, n_head=1, n_embd=8, causal=causal))
    config = TrainConfig(batch_size=2, gradient_accumulation_steps=4, block_size=16,
                         dtype="float32")
    input_ids = batch_of(load_data(data_dir, 16).train, config, 0)
    batch = (input_ids, *forward_process(input_ids, 99, 0.1, seeded()))
    loss_function = autoregressive_loss if causal else diffusion_loss
    whole = loss_function(model, 99, *batch)
    run = SimpleNamespace(model=model, scaler=NO_SCALER)
    mean = add_gradient(model, loss_function, batch, run, config, Processes())
    torch.testing.assert_close(mean, whole.detach())
    parameters = list(model.parameters())
    torch.testing.assert_close(tuple(p.grad for p in parameters),
                               torch.autograd.grad(whole, parameters))


def test_every_tensor_of_a_batch_can_be_pinned_for_the_copy_to_a_gpu(monkeypatch):
    """pin_memory refuses a tensor of which two elements share their memory, as p_mask's do."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    batch = forward_process(torch.zeros(4, 8, dtype=torch.long), 9, generator=seeded())
    for tensor in batch:
        assert to_device(tensor, torch.device("cuda")).equal(tensor)
    assert [tensor.stride() for tensor in pinned] == [(8, 1)] * 3


def test_a_large_gradient_is_clipped_and_grad_clip_0_leaves_it(monkeypatch):
    norms = []
    for grad_clip in (0.5, 0.0):
        model = torch.nn.Linear(3, 3)
        model.weight.grad, model.bias.grad = torch.full((3, 3), 7.0), torch.full((3,), 7.0)
        seen = SimpleNamespace(step=lambda model=model: norms.append(
            torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()),
            param_groups=[])
        run = SimpleNamespace(model=model, ema=copy.deepcopy(model), optimizers=[seen],
                              scaler=NO_SCALER, iteration=0)
        update_weights(run, TrainConfig(grad_clip=grad_clip))
        assert model.weight.grad is None  # the next iteration begins with no gradient
    assert norms == pytest.approx([0.5, 7 * 12**0.5], rel=1e-4)


def test_a_float16_overflow_skips_the_step_of_both_optimizers(train, tmp_path, monkeypatch):
    """The gradient scaler's scale starts at 65536. An overflow halves it; the run ends well all the
    same."""
    real, seen = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, max_norm):
        parameters = list(parameters)
        if len(seen) == 1:
            parameters[-1].grad.fill_(math.inf)  # ln_f: AdamW's, so Muon must notice it too
        seen.append([p.detach().clone() for p in parameters])
        return real(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert train(*RUN, "--max_iters=4", "--warmup_iters=0", "--dtype=float16",
                 f"--save_filename={tmp_path}/x").code == 0
    skipped, not_skipped = zip(seen[1], seen[2], strict=True), zip(seen[2], seen[3], strict=True)
    assert all(torch.equal(a, b) for a, b in skipped)
    assert not any(torch.equal(a, b) for a, b in not_skipped)


# -----------------------------------------------------------------------------
# optimizers

@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(muon, rope):
    model = GPT(GPTConfig(n_layer=2, n_head=1, n_embd=8, rope=rope, bias=True))
    optimizers = make_optimizers(model, TrainConfig(muon=muon))
    assert [isinstance(optimizer, Muon) for optimizer in optimizers] == [False, True][:1 + muon]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = sorted(id(p) for group in groups for p in group["params"])
    assert trained == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim == 2) == (group["weight_decay"] > 0) for p in group["params"])


@pytest.mark.parametrize("has_bfloat16, tolerance", [(True, 1e-5), (False, 5e-3)])
def test_muon_computes_what_pytorch_s_muon_does(monkeypatch, has_bfloat16, tolerance):
    """PyTorch's takes the matrices one by one, in bfloat16; ours stacks those of one shape. Where
    the device has no units for bfloat16, ours computes in float32, without PyTorch's rounding."""
    monkeypatch.setattr(lib.muon, "has_bfloat16", lambda device: has_bfloat16)
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
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_values_near_one():
    u, v = (torch.linalg.qr(torch.randn(3, n, 30, generator=seeded()))[0] for n in (40, 30))
    x = u @ torch.diag(torch.linspace(0.2, 5, 30)) @ v.mT
    for matrices in (x, x.mT):  # tall, wide
        new = orthogonalize(matrices).float()
        s = torch.linalg.svdvals(new)
        assert ((s > 0.65) & (s < 1.2)).all()
        product = new @ matrices.mT  # symmetric if the singular vectors are the same
        assert (product - product.mT).norm() < 0.02 * product.norm()


def test_the_learning_rate_warms_up_and_decays_to_its_final_fraction():
    config = TrainConfig(max_iters=100, warmup_iters=10, final_lr_frac=0.1)
    optimizers = [SimpleNamespace(param_groups=[dict(lr=0.0, peak_lr=1.0), dict(lr=0.0, peak_lr=3)])
                  for _ in range(2)]
    scale = []
    for i in range(101):
        set_learning_rates(SimpleNamespace(iteration=i, optimizers=optimizers), config)
        scale.append(optimizers[0].param_groups[0]["lr"])
        for optimizer in optimizers:
            assert [group["lr"] for group in optimizer.param_groups] == [scale[i], 3 * scale[i]]
    assert 0 < scale[0] < 0.1 and scale[10] == 1.0
    assert abs(scale[55] - 0.55) < 1e-12 and abs(scale[100] - 0.1) < 1e-12
    assert scale[:11] == sorted(scale[:11]) and scale[10:] == sorted(scale[10:], reverse=True)


# -----------------------------------------------------------------------------
# the averaged weights

@pytest.mark.parametrize("iteration, ema_decay, decay", [
    (0, 0.999, 0.1), (8, 0.999, 0.5), (10**6, 0.999, 0.999), (10**6, 0.0, 0.0)])
def test_the_average_forgets_fast_at_first_and_then_with_ema_decay(iteration, ema_decay, decay):
    model, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = {name: decay * average.state_dict()[name] + (1 - decay) * p
                for name, p in model.state_dict().items()}
    run = SimpleNamespace(model=model, ema=average, optimizers=[], scaler=NO_SCALER,
                          iteration=iteration)
    update_weights(run, TrainConfig(ema_decay=ema_decay))
    torch.testing.assert_close(dict(average.state_dict()), expected)


def test_what_is_saved_is_the_average_and_it_builds_no_graph(train, tmp_path, monkeypatch):
    runs, saved, save, loop = [], [], lib.run.save_checkpoint, train_script.train
    monkeypatch.setattr(train_script, "train",
                        lambda run, *args: runs.append(run) or loop(run, *args))

    def seen(path, model, *args, **info):
        saved.append(model)
        return save(path, model, *args, **info)
    monkeypatch.setattr(lib.run, "save_checkpoint", seen)
    train(*RUN, f"--save_filename={tmp_path}/x")
    assert len(saved) > 1 and all(model is runs[0].ema for model in saved)
    assert not any(p.requires_grad for p in saved[0].parameters())
    assert not all(map(torch.equal, runs[0].model.parameters(), runs[0].ema.parameters()))


# -----------------------------------------------------------------------------
# whole trainings

@pytest.mark.parametrize("muon", [True, False])
def test_it_learns_to_look_at_the_visible_characters(call, tmp_path, muon):
    """abcdefghabcdefgh...: one look at any character tells all others, so of 16 characters only the
    first must cost ln 8, and a model that does not look pays ln 8 for each."""
    (tmp_path / "cycle.txt").write_text("abcdefgh" * 500)
    prepare.prepare(tmp_path / "cycle.txt", tmp_path)
    call(train_script, *TINY, f"--data_dir={tmp_path}", "--max_iters=150", "--eval_interval=150",
         "--warmup_iters=20", "--eval_tokens=400", "--n_embd=32", "--batch_size=16",
         f"--muon={muon}", f"--save_filename={tmp_path}/x")
    assert math.log(8) / 16 < curve(tmp_path / "x.pt")[-1]["val"] < 0.6 * math.log(8)


def test_compile_compiles_once_whatever_the_lengths_of_the_windows(train, tmp_path, monkeypatch):
    """Each compilation takes long."""
    lengths, compiled, get_batch = iter([3, 16, 5, 16, 7, 1]), [], train_script.get_batch

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(train_script, "get_batch",
                        lambda *args: get_batch(*args)[:, :next(lengths)])
    assert train("--compile", "--max_iters=6", "--eval_tokens=160",
                 f"--save_filename={tmp_path}/x").code == 0
    assert len(compiled) == 1


def test_a_compiler_that_does_not_work_here_is_reported_in_one_line(train, tmp_path, monkeypatch):
    class NoCompiler(RuntimeError):
        """No working C++ compiler found"""
    NoCompiler.__module__ = "torch._inductor.exc"

    def broken(*_):
        raise NoCompiler("no C++ compiler\nand a hundred lines more")
    monkeypatch.setattr(train_script, "diffusion_loss", broken)
    result = train("--max_iters=1", "--warmup_iters=0", f"--save_filename={tmp_path}/x")
    assert_one_line_error(result, "--compile", "no C++ compiler")


# -----------------------------------------------------------------------------
# progress where stderr is no terminal

HALF_AGAIN = SimpleNamespace(characters_per_token=1.5)


@pytest.fixture
def clock(monkeypatch):
    """A list whose one number is what a run takes for the time, in seconds."""
    clock = [1000.0]
    for module in (train_script, lib.run):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return clock


def test_a_line_of_progress_at_the_first_reading_and_then_at_most_every_15_seconds(clock, capsys):
    """Of the first process alone. 100 iterations of 150 characters take 6 seconds."""
    config, data = TrainConfig(max_iters=2000, batch_size=4, block_size=25), HALF_AGAIN
    for rank in (0, 1):
        with Progress(SimpleNamespace(iteration=0), config, data, Processes(rank, 2)) as progress:
            for iteration in range(100, 1100, 100):
                clock[0] += 6
                progress.show(iteration, 2.5)
        assert progress.postfix == "loss 2.50, 2,500 characters/s"
        assert capsys.readouterr().err.splitlines() == [
            f"iteration {iteration} of 2,000: loss 2.50, 2,500 characters/s, {left} minutes left"
            for iteration, left in [("100", 1.9), ("400", 1.6), ("700", 1.3), ("1,000", 1.0)]
            if rank == 0]


def test_progress_is_shown_in_the_bar_alone_where_there_is_one(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    config = TrainConfig(batch_size=4, block_size=25)
    with Progress(SimpleNamespace(iteration=0), config, HALF_AGAIN, Processes()) as progress:
        clock[0] += 6
        progress.show(100, 2.5)
    err = capsys.readouterr().err
    assert "loss 2.50, 2,500 characters/s" in err and not PROGRESS.search(err)


def test_the_progress_of_a_run_has_its_loss_its_speed_and_the_time_that_is_left(
        train, tmp_path, monkeypatch, clock):
    """An iteration takes four seconds, and its loss is its number. The loss that is shown is the
    mean of the last five; an evaluation, which takes long, does not count as training."""
    evaluate = train_script.evaluate

    def four_seconds(net, loss_function, batch, run, config, processes):
        clock[0] += 4
        return torch.tensor(float(run.iteration))

    def long_evaluation(*args):
        clock[0] += 100
        return evaluate(*args)
    monkeypatch.setattr(train_script, "add_gradient", four_seconds)
    monkeypatch.setattr(train_script, "evaluate", long_evaluation)
    result = train("--max_iters=30", "--eval_interval=10", "--log_interval=5", "--muon=False",
                   "--eval_tokens=160", f"--save_filename={tmp_path}/x")
    assert result.code == 0 and "characters/s" not in result.out
    assert [row["loss"] for row in curve(tmp_path / "x.pt")] == [4.5, 14.5, 24.5]
    assert result.err.splitlines() == [  # 4 windows of 16 characters in 4 seconds
        f"iteration {i} of 30: loss {loss}.00, 16 characters/s, {left} minutes left"
        for i, loss, left in ((5, 2, 1.7), (10, 7, 1.3), (15, 12, 1.0), (20, 17, 0.7),
                              (25, 22, 0.3), (30, 27, 0.0))]
    assert all(PROGRESS.fullmatch(line) for line in result.err.splitlines())
