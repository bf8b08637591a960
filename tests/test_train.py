import csv
import itertools
import math
import signal

import numpy as np
import prepare
import pytest
import torch
from conftest import TINY, Table, assert_one_line_error

import train as train_script
from model import GPT, GPTConfig, load_checkpoint
from train import (
    TrainConfig,
    diffusion_loss,
    estimate_nelbo,
    forward_process,
    get_batch,
    load_data,
    lr_scale,
    make_optimizers,
)

RUN = ("--max_iters=12", "--eval_interval=4", "--dropout=0.1", "--gradient_accumulation_steps=2", "--log_interval=3")

# -----------------------------------------------------------------------------
# the maths


def test_forward_process_masks_with_p_mask_and_nothing_else():
    torch.manual_seed(0)
    input_ids = torch.randint(9, (400, 500))
    t = torch.linspace(0, 1, 400)
    noisy_batch, masked_indices, p_mask = forward_process(input_ids, mask_id=9, eps=0.01, t=t)
    torch.testing.assert_close(p_mask, (0.99 * t + 0.01)[:, None].expand(400, 500))
    assert (noisy_batch[masked_indices] == 9).all()
    assert torch.equal(noisy_batch[~masked_indices], input_ids[~masked_indices])
    z = (masked_indices.double().mean(1) - p_mask[:, 0]) / (p_mask[:, 0] * (1 - p_mask[:, 0]) / 500).sqrt()
    assert z[:-1].abs().max() < 4.5 and abs(z[:-1].mean()) < 0.2 and abs(z[:-1].std() - 1) < 0.15  # p = 1 at the end
    neighbours = (masked_indices[:, 1:] == masked_indices[:, :-1]).double().mean(1)                # independent tokens
    torch.testing.assert_close(neighbours.mean(), (p_mask**2 + (1 - p_mask)**2).double().mean(), atol=5e-3, rtol=0)


def test_forward_process_draws_t_uniformly():
    torch.manual_seed(0)
    _, _, p_mask = forward_process(torch.zeros(20_000, 1, dtype=torch.long), mask_id=1, eps=1e-3)
    t = (p_mask[:, 0] - 1e-3) / (1 - 1e-3)
    histogram = torch.histc(t, 10, 0, 1)
    assert histogram.sum() == 20_000 and ((histogram - 2000) ** 2 / 2000).sum() < 27.9  # chi-square, 9 df, p = 0.001


def test_loss_by_hand():
    """Two rows, p_mask 0.5 and 1; masked: one token of the first row, both of the second; [MASK]'s logit is cut off."""
    logits = torch.tensor([[1.0, 3.0, 99.0]]).log()  # p = 1/4, 3/4
    loss = diffusion_loss(lambda x: logits.expand(2, 2, 3), torch.tensor([[0, 1], [0, 1]]), mask_id=2, eps=0.0,
                          t=torch.tensor([0.5, 1.0]), u=torch.tensor([[0.9, 0.1], [0.2, 0.99]]))
    by_hand = (math.log(4 / 3) / 0.5 + (math.log(4) + math.log(4 / 3)) / 1) / 4
    assert abs(loss.item() - by_hand) < 1e-6


def enumerate_nelbo(model, windows, eps=None):
    """The NELBO per character of windows (W, L), exactly: all ways to mask, each with its probability. With eps: the
    expected training loss, an integral over t of a polynomial, which Gauss-Legendre quadrature does exactly."""
    W, L = windows.shape
    mask_id = model.config.mask_id
    total = 0.0
    nodes, quadrature = np.polynomial.legendre.leggauss(L + 1)
    for masked in itertools.product((False, True), repeat=L):
        n = sum(masked)
        if n == 0:
            continue
        mask = torch.tensor(masked)
        log_p = model(torch.where(mask, mask_id, windows))[..., :mask_id].double().log_softmax(-1)
        ce = -log_p.gather(-1, windows[..., None])[..., 0][:, mask].sum().item() / W
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
    torch.manual_seed(0)
    with torch.no_grad():
        exact = enumerate_nelbo(model, windows, eps)
        losses = [diffusion_loss(model, windows.repeat(2000, 1), 3, eps=eps).item() for _ in range(40)]
    assert abs(np.mean(losses) - exact) < 4 * np.std(losses) / 40**0.5 < 0.05 * exact


def test_integral_and_exact_count_are_the_same_bound(small):
    model, data = small
    with torch.no_grad():
        windows = data[:20].view(5, 4)
        assert abs(enumerate_nelbo(model, windows, eps=0.0) - enumerate_nelbo(model, windows)) < 1e-9


def test_nelbo_of_the_true_conditionals_is_the_entropy():
    """The bound is tight where the predictor is right: an exact value from the maths, not from this code."""
    table = Table(T=3, V=2)
    sample = table.joint.detach()
    data = torch.cat([table.outcomes[i].repeat(round(float(p) * 2000), 1) for i, p in enumerate(sample)]).flatten()
    share = torch.tensor([round(float(p) * 2000) for p in sample]).double()
    entropy = -(share / share.sum() * sample.log()).sum() / 3
    mean, se = estimate_nelbo(table, data, passes=30)
    assert abs(mean - entropy) < 4 * se < 0.02


# -----------------------------------------------------------------------------
# batches, optimisers, schedule

def test_batches_belong_to_seed_and_iteration(data_dir):
    cfg = TrainConfig(data_dir=str(data_dir), batch_size=8, block_size=16)
    data, _, chars = load_data(cfg)
    assert len(chars) == len(set(chars)) and data.dtype == torch.int16
    first = get_batch(data, cfg, 5, "cpu")
    split = TrainConfig(data_dir=str(data_dir), batch_size=2, gradient_accumulation_steps=4, block_size=16)
    for again in (get_batch(data, cfg, 5, "cpu"), get_batch(data, split, 5, "cpu")):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (get_batch(data, cfg, 6, "cpu"), get_batch(data, TrainConfig(batch_size=8, block_size=16, seed=1), 5, "cpu")):
        assert not torch.equal(first[0], other[0])
    for input_ids, t, u in (get_batch(data, cfg, i, "cpu") for i in range(400)):
        B, T = input_ids.shape
        assert B == 8 and 1 <= T <= 16 and u.shape == (B, T) and 0 <= input_ids.min() and input_ids.max() < len(chars)
        assert torch.equal((t * 8).floor().sort().values, torch.arange(8.0))  # stratified: one t in every eighth
    assert 1 <= sum(get_batch(data, cfg, i, "cpu")[0].shape[1] < 16 for i in range(400)) <= 12  # about 1 %


def test_ids_above_32767_survive_the_int16_view():
    data = torch.from_numpy(np.array([0, 32_768, 65_534, 7], dtype="<u2").view(np.int16))
    assert train_script.gather(data, torch.tensor([0, 1]), 3, "cpu").tolist() == [[0, 32_768, 65_534], [32_768, 65_534, 7]]


def test_accumulation_gives_the_gradient_of_the_whole_batch(data_dir):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=1, n_embd=8))
    cfg = TrainConfig(data_dir=str(data_dir), batch_size=2, gradient_accumulation_steps=4, block_size=16, eps=0.1)
    batch = get_batch(load_data(cfg)[0], cfg, 0, "cpu")
    whole = diffusion_loss(model, batch[0], 99, 0.1, *batch[1:])
    mean = train_script.accumulate_gradient(model, 99, cfg, batch)
    torch.testing.assert_close(mean, whole.detach())
    torch.testing.assert_close(tuple(p.grad for p in model.parameters()), torch.autograd.grad(whole, list(model.parameters())))


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(muon, rope):
    model = GPT(GPTConfig(n_layer=2, n_head=1, n_embd=8, rope=rope, bias=True))
    groups = [g for o in make_optimizers(model, TrainConfig(muon=muon)) for g in o.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    for g in groups:
        assert all((p.ndim == 2) == (g["weight_decay"] > 0) for p in g["params"])


def test_learning_rate_warms_up_and_decays():
    cfg = TrainConfig(max_iters=100, warmup_iters=10, min_lr_ratio=0.1)
    scale = [lr_scale(i, cfg) for i in range(101)]
    assert 0 < scale[0] < 0.1 and scale[10] == 1.0 and abs(scale[55] - 0.55) < 1e-12 and abs(scale[100] - 0.1) < 1e-12
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
        return [{k: float(v) for k, v in row.items() if k != "minutes"} for row in csv.DictReader(f)]


def at_iteration(monkeypatch, iteration, do):
    """Do something just before a training iteration starts."""
    real = train_script.get_batch

    def get_batch(data, cfg, i, device):
        if i == iteration:
            do()
        return real(data, cfg, i, device)
    monkeypatch.setattr(train_script, "get_batch", get_batch)


def crash():
    raise SystemExit(9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["ctrl-c", "ctrl-c before the first evaluation", "kill"])
def test_resume_is_bit_for_bit(how, dtype, train, tmp_path, monkeypatch):
    flags = (*RUN, f"--dtype={dtype}")
    assert train(*flags, f"--save_filename={tmp_path}/whole").code == 0
    X = tmp_path / "cut.pt"
    iteration, do = {"ctrl-c": (6, lambda: signal.raise_signal(signal.SIGINT)), "kill": (7, crash),
                     "ctrl-c before the first evaluation": (1, lambda: signal.raise_signal(signal.SIGINT))}[how]
    at_iteration(monkeypatch, iteration, do)
    cut = train(*flags, f"--save_filename={tmp_path}/cut")
    assert cut.code == (9 if how == "kill" else 130) and (how == "kill" or "--resume" in cut.out)
    assert load_checkpoint(X)[2].get("complete") is None
    monkeypatch.undo()
    resumed = train(*flags, f"--save_filename={tmp_path}/cut", "--resume")
    assert resumed.code == 0 and f"at iteration {4 if how == 'kill' else iteration + 1}" in resumed.out
    assert_same_weights(X, tmp_path / "whole.pt")
    assert curve(X) == curve(tmp_path / "whole.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.pt", "cut.pt.csv", "whole.pt", "whole.pt.csv"]


def test_x_keeps_the_best_and_says_what_it_is(train, tmp_path):
    """With a rate that wrecks the weights after a while, the last evaluation is not the best one."""
    X = tmp_path / "deep" / "folder" / "model"
    result = train("--max_iters=40", "--eval_interval=5", "--learning_rate=1", "--muon=False", "--warmup_iters=25",
                   "--min_lr_ratio=1", "--ema_decay=0", f"--save_filename={X}")
    rows = curve(f"{X}.pt")
    model, chars, info = load_checkpoint(f"{X}.pt")
    best = min(rows, key=lambda row: row["val"])
    assert result.code == 0 and [row["iteration"] for row in rows] == list(range(5, 41, 5)) and best != rows[-1]
    assert info["iteration"] == best["iteration"] and info["nelbo"]["val"] == best["val"] and info["complete"]
    assert info["hyperparameters"]["learning_rate"] == 1.0 and info["dtype"] == "float32"
    assert best["val_bits"] == pytest.approx(best["val"] / math.log(2))


def test_what_is_saved_is_what_was_evaluated(train, tmp_path, data_dir):
    X = tmp_path / "x.pt"
    train(*RUN, f"--save_filename={X}")
    model, chars, info = load_checkpoint(X)
    cfg = TrainConfig(data_dir=str(data_dir), block_size=16)
    assert estimate_nelbo(model, load_data(cfg, chars)[1], passes=2)[0] == pytest.approx(info["nelbo"]["val"], rel=1e-6)


@pytest.mark.parametrize("muon", [True, False])
def test_it_learns(call, tmp_path, muon):
    """abcdefghabcdefgh...: one look at any character tells all others, so of 16 characters only the first must cost ln 8,
    and a model that does not look pays ln 8 for each."""
    (tmp_path / "cycle.txt").write_text("abcdefgh" * 500)
    prepare.prepare(tmp_path / "cycle.txt", tmp_path)
    call(train_script, *TINY, f"--data_dir={tmp_path}", "--max_iters=300", "--eval_interval=150", "--n_embd=32", "--batch_size=16",
         f"--muon={muon}", f"--save_filename={tmp_path}/x")
    assert math.log(8) / 16 < curve(tmp_path / "x.pt")[-1]["val"] < 0.6 * math.log(8)


def test_the_same_command_twice_keeps_both_models(train, tmp_path):
    X = tmp_path / "x.pt"
    first = train(*RUN, f"--save_filename={X}")
    second = train(*RUN, f"--save_filename={X}", "--seed=2")
    assert first.code == second.code == 0 and "x_backup1.pt" in second.out and "backup" not in first.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt", "x.pt.csv", "x_backup1.pt", "x_backup1.pt.csv"]
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


def test_nothing_moves_before_the_first_new_file(train, tmp_path, monkeypatch):
    X = tmp_path / "x.pt"
    train(*RUN, f"--save_filename={X}")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    at_iteration(monkeypatch, 3, crash)
    train(*RUN, f"--save_filename={X}")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupted_run_is_pointed_out_and_kept(train, tmp_path, monkeypatch):
    X = tmp_path / "x.pt"
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={X}")
    monkeypatch.undo()
    old = (tmp_path / "x.pt.state").read_bytes()
    again = train(*RUN, f"--save_filename={X}")
    assert again.code == 0 and "--resume would continue it" in again.out
    assert (tmp_path / "x_backup1.pt.state").read_bytes() == old
    assert train(*RUN, f"--save_filename={tmp_path}/x_backup1", "--resume").code == 0
    assert_same_weights(X, tmp_path / "x_backup1.pt")


def test_resume_with_nothing_to_resume(train, tmp_path):
    fresh = train(*RUN, f"--save_filename={tmp_path}/x", "--resume")
    assert fresh.code == 0 and "starting afresh" in fresh.out
    before = (tmp_path / "x.pt").read_bytes()
    complete = train(*RUN, f"--save_filename={tmp_path}/x", "--resume")
    assert complete.code == 0 and "complete" in complete.out and (tmp_path / "x.pt").read_bytes() == before


def test_resume_refuses_other_knobs_and_a_damaged_state(train, tmp_path, monkeypatch):
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={tmp_path}/x")
    assert_one_line_error(train(*RUN, f"--save_filename={tmp_path}/x", "--resume", "--seed=3"), "--seed=3", "1337")
    (tmp_path / "x.pt.state").write_bytes(b"half")
    assert_one_line_error(train(*RUN, f"--save_filename={tmp_path}/x", "--resume"), "x.pt.state", "damaged")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_file(train, tmp_path, monkeypatch):
    real = train_script.diffusion_loss
    flags = ("--max_iters=12", "--eval_interval=4", f"--save_filename={tmp_path}/x")
    at_iteration(monkeypatch, 6, lambda: monkeypatch.setattr(
        train_script, "diffusion_loss", lambda *args, **kwargs: real(*args, **kwargs) * math.nan))
    result = train(*flags)
    assert result.code == 1 and "loss is nan" in result.err and result.err.count("error:") == 1 and "Traceback" not in result.err
    assert load_checkpoint(tmp_path / "x.pt")[2]["iteration"] == 4


def test_float16_with_its_gradient_scaler(train, tmp_path, monkeypatch):
    """The scale starts at 65536. An overflow halves it and skips both optimizers; the run ends well all the same."""
    real, seen = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, max_norm):
        parameters = list(parameters)
        if len(seen) == 1:
            parameters[-1].grad.fill_(math.inf)  # ln_f: AdamW's, so Muon must notice it too
        seen.append([p.detach().clone() for p in parameters])
        return real(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert train(*RUN, "--dtype=float16", f"--save_filename={tmp_path}/x").code == 0
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))       # skipped
    assert not any(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))   # not skipped


def test_the_average_builds_no_graph(train, tmp_path, monkeypatch):
    saved, save = [], train_script.save_checkpoint
    monkeypatch.setattr(train_script, "save_checkpoint",
                        lambda path, model, *args, **info: saved.append(model) or save(path, model, *args, **info))
    train(*RUN, f"--save_filename={tmp_path}/x")
    assert len(saved) > 1 and not any(p.requires_grad for p in saved[0].parameters())


def test_init_from_and_eval_only(train, tmp_path):
    train(*RUN, f"--save_filename={tmp_path}/x")
    onward = train("--max_iters=4", f"--init_from={tmp_path}/x", f"--save_filename={tmp_path}/y", "--learning_rate=0",
                   "--muon_lr=0")
    assert onward.code == 0
    assert_same_weights(tmp_path / "x.pt", tmp_path / "y.pt")
    before = sorted(tmp_path.iterdir())
    result = train("--eval_only", f"--init_from={tmp_path}/x")
    assert result.code == 0 and result.out.count("NELBO") == 2 and "8 passes" in result.out and sorted(tmp_path.iterdir()) == before
    assert "windows of 8 characters" in train("--eval_only", f"--init_from={tmp_path}/x", "--block_size=8").out
    assert_one_line_error(train("--eval_only"), "--init_from")
    assert_one_line_error(train("--eval_only", f"--init_from={tmp_path}/x", "--block_size=32"), "--block_size=32", "16")
    assert_one_line_error(train(f"--init_from={tmp_path}/x", "--n_layer=3"), "--n_layer=3")


def test_ids_are_translated_to_the_checkpoint_s_vocabulary(call, train, tmp_path, text):
    """Other prepared data may use fewer characters: the same text must get the same NELBO; an unknown one is an error."""
    train(*RUN, f"--save_filename={tmp_path}/x")
    lines = [line for line in text.splitlines() if "e" not in line] * 20
    for name, content in (("few", "\n".join(lines)), ("alien", "\n".join(lines) + "\N{SNOWMAN}")):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
        prepare.prepare(tmp_path / f"{name}.txt", tmp_path / name)
    chars = load_checkpoint(tmp_path / "x.pt")[1]
    data, _, kept = load_data(TrainConfig(data_dir=str(tmp_path / "few"), block_size=16), chars)
    assert kept == chars and "".join(chars[i] for i in data) == "\n".join(lines)[:len(data)]
    eval_few = ("--eval_only", f"--init_from={tmp_path}/x", "--device=cpu", "--dtype=float32")
    assert call(train_script, *eval_few, f"--data_dir={tmp_path}/few").code == 0
    assert_one_line_error(call(train_script, *eval_few, f"--data_dir={tmp_path}/alien"), "alien", "\N{SNOWMAN}")


@pytest.mark.parametrize("flags, words", [
    (["--lerning_rate=1"], ["--lerning_rate"]),
    (["--learn=1"], ["--learn"]),
    (["--max_iters=many"], ["--max_iters", "many"]),
    (["--max_iters=0"], ["--max_iters"]),
    (["--compile=perhaps"], ["--compile"]),
    (["--learning_rate=nan"], ["--learning_rate"]),
    (["--ema_decay=1"], ["--ema_decay"]),
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
    ("train.bin", b"\0\0\0", ["train.bin", "odd"]),
    ("val.bin", b"", ["val.bin", "fewer"]),
    ("train.bin", b"\xff\xff" * 100, ["train.bin", "65535"]),
    ("meta.json", b"{", ["meta.json", "characters"]),
    ("meta.json", b"[]", ["meta.json", "characters"]),
    ("meta.json", b'{"chars": ["word", "piece"]}', ["meta.json", "characters"]),
    ("meta.json", b'{"chars": "aab"}', ["meta.json", "characters"]),
    ("val.bin", None, ["val.bin"]),
])
def test_damaged_data_is_one_line(call, data_dir, tmp_path, name, content, words):
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = call(train_script, f"--data_dir={tmp_path}", "--block_size=16", f"--save_filename={tmp_path}/x", "--max_iters=1")
    assert_one_line_error(result, *words)


def test_help_explains_every_knob(train):
    result = train("--help")
    assert result.code == 0
    for f in train_script.fields(TrainConfig):
        assert f"--{f.name} " in result.out


def test_flags_with_a_space_and_switches(monkeypatch):
    cfg, given = train_script.parse_args(["--device", "cpu", "--seed", "5", "--compile", "--rope=False"])
    assert (cfg.seed, cfg.compile, cfg.rope, cfg.muon) == (5, True, False, True)
    assert given == {"device": "cpu", "seed": 5, "compile": True, "rope": False}
