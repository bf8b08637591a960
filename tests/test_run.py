"""What a run leaves behind: the best model, the loss curve, and an earlier model of its name."""

import math
import os
import re
import signal
import sys
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import torch
from conftest import TINY, assert_one_line_error
from helpers import (
    RUN,
    assert_same_weights,
    at_iteration,
    contents,
    crash,
    ctrl_c,
    curve,
    errors_of,
    names,
    seeded,
)

import lib.evaluate
import lib.run
import train as train_script
from diffusion import estimate_nelbo
from lib.checkpoint import load_checkpoint
from lib.data import load_data, write_dataset
from lib.evaluate import short_sample, spread_windows
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# the best model and the loss curve


def test_x_keeps_the_best_model_and_says_what_it_is(train, tmp_path, monkeypatch):
    """The best model on validation is that of the second of five evaluations."""
    X, weights = tmp_path / "deep" / "folder" / "model.pt", []
    measured = iter([2.5, 3.0, 2.0, 1.5, 1.0, 2.0, 1.2, 1.5, 0.8, 1.8])  # train, val, train, ...

    def measure(model, *_):
        weights.append({name: p.clone() for name, p in model.state_dict().items()})
        return next(measured), 0.125
    monkeypatch.setattr(lib.evaluate, "measure", measure)
    result = train("--max_iters=10", "--eval_interval=2", "--learning_rate=0.01",
                   "--warmup_iters=0", f"--save_filename={str(X).removesuffix('.pt')}")
    rows = curve(X)
    model, _, info = load_checkpoint(X)
    assert result.code == 0 and X.with_name("model.pt.csv").read_text().splitlines()[0] == (
        "iteration,minutes,loss,train,train_se,val,val_se")
    assert [row["iteration"] for row in rows] == [2, 4, 6, 8, 10]
    assert [row["val"] for row in rows] == [3.0, 1.5, 2.0, 1.5, 1.8] and rows[0]["val_se"] == 0.125
    assert info["iteration"] == 4 and info["nelbo"] == {"train": 2.0, "val": 1.5}
    assert info["hyperparameters"]["learning_rate"] == 0.01
    assert info["hyperparameters"]["dtype"] == "float32" and info["device"] == "cpu"
    assert info["command"].startswith("train.py --n_layer=1 ")
    assert all(p.equal(weights[3][name]) for name, p in model.state_dict().items())
    assert not weights[3]["wte.weight"].equal(weights[5]["wte.weight"])
    assert "iteration 4: val NELBO 1.5000 nats per character\n" in result.out
    last = result.out.splitlines()[-1]
    assert last.startswith("done in 0.") and last.endswith(
        " minutes: iteration 4 is the best, 1.5000 nats per character on validation. Now: python "
        f"main.py --path={X}")


@pytest.mark.parametrize("causal, passes, shown", [
    (False, 2, False), (False, 3, False), (False, 4, True), (True, 2, True)])
def test_the_standard_error_is_shown_from_four_passes_on_or_if_the_value_is_exact(
        train, tmp_path, causal, passes, shown):
    """The csv holds it in any case."""
    result = train("--max_iters=1", "--warmup_iters=0", f"--causal={causal}",
                   f"--eval_passes={passes}", "--eval_tokens=160", f"--save_filename={tmp_path}/x")
    row, = curve(tmp_path / "x.pt")
    name = "NLL" if causal else "NELBO"
    for split in ("train", "val"):
        error = f" +- {row[f'{split}_se']:.4f}" * shown
        assert (f"iteration 1: {split} {name} {row[split]:.4f}{error} nats per character\n"
                in result.out)


@pytest.mark.parametrize("n_tokens, starts", [
    (19, [0]), (30, [0, 40, 90]), (59, [0, 20, 40, 70, 90]), (100, range(0, 100, 10)),
    (10**6, range(0, 100, 10))])
def test_the_windows_of_an_evaluation_are_spread_over_the_split(n_tokens, starts):
    """The beginning of a split may be easier than the rest, as in Tiny Shakespeare."""
    found = spread_windows(np.arange(107, dtype=np.uint16), n_tokens, 10)
    assert found.tolist() == [list(range(start, start + 10)) for start in starts]


def test_the_saved_model_has_the_nelbo_that_is_saved_with_it(train, tmp_path, data_dir):
    X = tmp_path / "x.pt"
    train(*RUN, "--eval_tokens=160", f"--save_filename={X}")
    model, vocab, info = load_checkpoint(X)
    val = load_data(data_dir, 16, vocab).val
    for n_tokens, same in ((160, True), (len(val), False)):
        mean, _ = estimate_nelbo(model, spread_windows(val, n_tokens, 16), model.config.mask_id,
                                 passes=2, batch_size=4)
        assert (mean == pytest.approx(info["nelbo"]["val"], rel=1e-6)) == same


def test_a_csv_that_can_t_be_replaced_is_a_warning_and_the_next_evaluation_writes_all_of_it(
        train, tmp_path, monkeypatch):
    """On Windows, a spreadsheet locks the file that it shows."""
    assert train(*RUN, f"--save_filename={tmp_path}/whole").code == 0
    real, csv_tries = lib.run.write_atomically, []

    def write(path, data):
        if str(path).endswith(".csv"):
            csv_tries.append(path)
            if len(csv_tries) < 3:
                raise OSError(f"{path} can't be written: Permission denied")
        return real(path, data)
    monkeypatch.setattr(lib.run, "write_atomically", write)
    result = train(*RUN, f"--save_filename={tmp_path}/x")
    warning = f"warning: {tmp_path / 'x.pt.csv'} can't be written: Permission denied. " \
              "The next evaluation, if there is one, tries again"
    assert result.code == 0 and errors_of(result) == [warning] * 2
    assert len(csv_tries) == 3 and curve(tmp_path / "x.pt") == curve(tmp_path / "whole.pt")
    assert_same_weights(tmp_path / "x.pt", tmp_path / "whole.pt")


def test_a_state_that_can_t_be_removed_is_a_warning(train, tmp_path, monkeypatch):
    unlink = os.unlink

    def fails(path, *args, **kwargs):
        if str(path).endswith(".state"):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *args, **kwargs)
    monkeypatch.setattr(os, "unlink", fails)
    result = train(*RUN, f"--save_filename={tmp_path}/x")
    warning, = errors_of(result)
    assert result.code == 0 and "done in" in result.out
    assert warning.startswith("warning: ") and str(tmp_path / "x.pt.state") in warning


@pytest.mark.parametrize("what", ["the loss", "the averaged weights"])
def test_a_training_that_diverges_stops_and_keeps_the_last_good_files(train, tmp_path, monkeypatch,
                                                                      what):
    """The loss of the last iteration before an evaluation may be finite, the weights not."""
    name = "diffusion_loss" if what == "the loss" else "update_weights"
    real, diverged = getattr(train_script, name), []

    def diverges(*args):
        if what == "the loss":
            return real(*args) * (math.nan if diverged else 1.0)
        real(*args)
        if diverged:
            next(args[0].ema.parameters())[0, 0] = math.inf
    monkeypatch.setattr(train_script, name, diverges)
    at_iteration(monkeypatch, 7, lambda: diverged.append(True))
    result = train("--max_iters=12", "--eval_interval=4", "--warmup_iters=0", "--eval_tokens=160",
                   f"--save_filename={tmp_path}/x")
    error, = errors_of(result)
    assert result.code == 2
    assert error.startswith("error: training diverged at iteration 8 (loss ")
    assert ("(loss nan)" in error) == (what == "the loss")
    assert load_checkpoint(tmp_path / "x.pt")[2]["iteration"] == 4
    assert torch.load(tmp_path / "x.pt.state")["iteration"] == 4


# -----------------------------------------------------------------------------
# the sample at each evaluation

def samples_of(result):
    return re.findall(r"^sample: (.*)$", result.out, re.MULTILINE)


@pytest.mark.parametrize("causal", [False, True])
def test_the_sample_of_an_evaluation_changes_no_bit_of_the_training(train, tmp_path, monkeypatch,
                                                                    text, causal):
    runs, results, loop = [], [], train_script.train
    monkeypatch.setattr(train_script, "train",
                        lambda run, *args: runs.append(run) or loop(run, *args))
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(train_script, "short_sample", lambda *_: "nothing")
        results.append(train(*RUN, f"--causal={causal}", f"--save_filename={tmp_path}/{name}"))
    found, nothing = map(samples_of, results)
    assert len(found) == 3 and nothing == ["nothing"] * 3
    for line in found:  # a line's start, which is not shown, and 15 characters
        assert set(line.replace(" / ", "")) <= set(text) and 5 <= len(line) <= 45
    for part in ("model", "ema"):
        ours, theirs = (getattr(run, part).state_dict() for run in runs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert curve(tmp_path / "with.pt") == curve(tmp_path / "without.pt")
    assert_same_weights(tmp_path / "with.pt", tmp_path / "without.pt")


@pytest.mark.parametrize("causal", [False, True])
def test_the_sample_is_a_record_if_the_data_are_records(call, tmp_path, causal):
    ids = np.arange(600) % 3
    for record, length in ((1, 16), (8, 8)):
        write_dataset(tmp_path / "data", ids, ids, list("abc"), record=record)
        result = call(train_script, *TINY, f"--data_dir={tmp_path}/data", f"--causal={causal}",
                      "--max_iters=1", "--eval_tokens=160", f"--save_filename={tmp_path}/x")
        line, = samples_of(result)
        assert len(line) == length and set(line) <= set("abc")


@pytest.mark.parametrize("vocab, length", [("abc", 96), ("abc\n", 95)])
def test_the_sample_of_a_large_model_is_short_and_begins_a_line(vocab, length):
    torch.manual_seed(0)
    model = GPT(GPTConfig(200, len(vocab) + 1, n_layer=1, n_head=1, n_embd=8)).eval()
    seen, forward = [], model.forward
    model.forward = lambda idx: seen.append(idx) or forward(idx)
    data = SimpleNamespace(vocab=list(vocab), record=1, prompt_length=0, val=np.arange(1))
    line = short_sample(model, SimpleNamespace(dtype="float32"), data)
    assert len(seen) == 32 and seen[0].shape == (1, 96)
    assert (seen[0] == model.config.mask_id).sum() == length
    assert all(idx[0, 0] == vocab.find("\n") for idx in seen if "\n" in vocab)
    assert "\n" not in line and set(line) <= set("abc /")


# -----------------------------------------------------------------------------
# the state

def test_the_state_holds_all_fields_of_a_run_and_what_tells_runs_apart(train, tmp_path,
                                                                       monkeypatch):
    """So what is added to a Run can't be forgotten by --resume."""
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={tmp_path}/x")
    state = torch.load(tmp_path / "x.pt.state")
    saved = {re.sub(r"optimizer \d", "optimizers", name) for name in state}
    assert saved - {"config", "vocab", "crc32", "id"} == {f.name for f in fields(train_script.Run)}
    assert set(state["config"]) == {f.name for f in fields(train_script.TrainConfig)}


# -----------------------------------------------------------------------------
# files and other runs of the same name

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


def test_an_earlier_model_is_renamed_when_the_training_begins(train, tmp_path, monkeypatch):
    """Renamed, not copied: there is no moment without a complete copy, and no second copy."""
    X = tmp_path / "x.pt"
    train(*RUN, f"--save_filename={X}")
    before = contents(tmp_path)
    inodes = {p.name: p.stat().st_ino for p in tmp_path.iterdir()}
    at_iteration(monkeypatch, 0, crash)
    assert train(*RUN, f"--save_filename={X}").code == 9
    assert names(tmp_path) == ["x.pt.state", "x_backup1.pt", "x_backup1.pt.csv"]
    for end in ("", ".csv"):
        assert contents(tmp_path)[f"x_backup1.pt{end}"] == before[f"x.pt{end}"]
        assert (tmp_path / f"x_backup1.pt{end}").stat().st_ino == inodes[f"x.pt{end}"]


def test_a_backup_never_takes_a_name_that_is_in_use(train, tmp_path):
    (tmp_path / "x_backup1.pt.csv").write_text("mine")
    (tmp_path / "x.pt.csv").write_text("old")
    result = train(*RUN, f"--save_filename={tmp_path}/x")
    assert result.code == 0 and (tmp_path / "x_backup1.pt.csv").read_text() == "mine"
    assert (tmp_path / "x_backup2.pt.csv").read_text() == "old"


def test_an_interrupted_run_that_is_not_resumed_is_kept_and_can_be_resumed_later(train, tmp_path,
                                                                                 monkeypatch):
    X = tmp_path / "x.pt"
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={X}")
    monkeypatch.undo()
    old = (tmp_path / "x.pt.state").read_bytes()
    again = train(*RUN, f"--save_filename={X}")
    backup = tmp_path / "x_backup1.pt"
    assert again.code == 0 and f"to go on with it: --save_filename={backup} --resume\n" in again.out
    assert (tmp_path / "x_backup1.pt.state").read_bytes() == old
    assert train(*RUN, f"--save_filename={backup}", "--resume").code == 0
    assert_same_weights(X, backup)
    assert curve(X) == curve(backup)


def open_files():
    """Return the paths of the files that this process has open or mapped into its memory."""
    paths = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            paths.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # that of the listing itself
            pass
    with open("/proc/self/maps") as f:
        return paths | {line.split(maxsplit=5)[5].strip() for line in f if line.count("/")}


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_no_file_is_open_while_it_is_replaced_renamed_or_removed(train, tmp_path, monkeypatch):
    """Windows refuses to do it to an open file. Two evaluations; then a second run, which moves the
    first one's model aside, starts from it and is interrupted; and its --resume."""
    refused = []

    def as_on_windows(real):
        def replaces(*paths, **kwargs):
            held = {os.path.realpath(path) for path in paths} & open_files()
            if held:
                refused.append(held)
                raise PermissionError(13, "it is used by another process", str(paths[0]))
            return real(*paths, **kwargs)
        return replaces
    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, as_on_windows(getattr(os, name)))
    with open(tmp_path / "held", "w"), pytest.raises(PermissionError):
        os.replace(tmp_path / "held", tmp_path / "other")
    refused.clear()
    flags = ("--max_iters=4", "--eval_interval=2", "--warmup_iters=0", "--eval_tokens=160",
             f"--save_filename={tmp_path}/x")
    first = train(*flags)
    with monkeypatch.context() as m:
        at_iteration(m, 2, ctrl_c)
        second = train(*flags, f"--init_from={tmp_path}/x")
    third = train(*flags, "--resume")
    assert refused == [] and (first.code, second.code, third.code) == (0, 130, 0)
    for result in (first, second, third):
        assert errors_of(result) == []
    assert names(tmp_path) == ["held", "x.pt", "x.pt.csv", "x_backup1.pt", "x_backup1.pt.csv"]


# -----------------------------------------------------------------------------
# signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_the_iteration_and_handlers_are_put_back(
        train, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    at_iteration(monkeypatch, 6, lambda: signal.raise_signal(number))
    result = train(*RUN, f"--save_filename={tmp_path}/x")
    assert result.code == 130 and signal.getsignal(number) is before
    assert result.out.count("stopping soon\n") == 1 and errors_of(result) == []
    X = tmp_path / "x.pt"
    assert f"interrupted at iteration 7; {X} holds the best model so far" in result.out
    assert torch.load(f"{X}.state")["iteration"] == 7
    assert load_checkpoint(X)[2]["iteration"] == 4


@pytest.mark.parametrize("first, second", [
    (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT),
    (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_the_run_at_once(train, tmp_path, monkeypatch, first, second):
    """The iteration is not finished, and nothing is saved: the last evaluation's files stay."""
    before, steps = signal.getsignal(signal.SIGINT), []
    update = train_script.update_weights
    monkeypatch.setattr(train_script, "update_weights",
                        lambda run, *args: steps.append(run.iteration) or update(run, *args))
    at_iteration(monkeypatch, 6, lambda: [signal.raise_signal(n) for n in (first, second)])
    result = train(*RUN, f"--save_filename={tmp_path}/x")
    assert result.code == 130 and steps[-1] == 5 and "interrupted" not in result.out
    assert errors_of(result) == [] and signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "x.pt.state")["iteration"] == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_a_run_leaves_sighup_as_it_is(train, tmp_path, monkeypatch):
    """So a closed terminal ends it, and under nohup nothing does."""
    seen = []
    at_iteration(monkeypatch, 1, lambda: seen.extend(
        signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)))
    before = [signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)]
    assert train(*RUN, f"--save_filename={tmp_path}/x").code == 0
    assert seen[0] is before[0] and seen[1] is not before[1]


# -----------------------------------------------------------------------------
# --init_from

def test_init_from_begins_with_the_weights_of_the_checkpoint(train, tmp_path):
    train(*RUN, f"--save_filename={tmp_path}/x")
    onward = train("--max_iters=4", f"--init_from={tmp_path}/x", f"--save_filename={tmp_path}/y",
                   "--learning_rate=0", "--muon_lr=0", "--eval_tokens=160")
    assert onward.code == 0
    assert_same_weights(tmp_path / "x.pt", tmp_path / "y.pt")
    assert_one_line_error(train(f"--init_from={tmp_path}/x", "--n_layer=3"), "--n_layer=3")


def test_init_from_may_name_the_model_that_is_moved_aside(train, tmp_path):
    train(*RUN, f"--save_filename={tmp_path}/x")
    onward = train("--max_iters=1", f"--init_from={tmp_path}/x", f"--save_filename={tmp_path}/x",
                   "--learning_rate=0", "--muon_lr=0", "--eval_tokens=160")
    assert onward.code == 0
    assert_same_weights(tmp_path / "x.pt", tmp_path / "x_backup1.pt")
    assert load_checkpoint(tmp_path / "x.pt")[2]["iteration"] == 1


def test_the_vocabulary_grows_by_the_characters_of_another_text(call, train, tmp_path):
    train("--max_iters=1", "--eval_tokens=160", f"--save_filename={tmp_path}/x")
    (tmp_path / "new.txt").write_text("\N{SNOWMAN}an \N{SNOWMAN}ld man" * 20, encoding="utf-8")
    prepare.prepare(tmp_path / "new.txt", tmp_path / "new")
    result = call(train_script, *TINY, f"--data_dir={tmp_path}/new", f"--init_from={tmp_path}/x",
                  "--max_iters=1", "--learning_rate=0", "--muon_lr=0",
                  f"--save_filename={tmp_path}/y")
    assert result.code == 0, result
    (old, vocab, _), (new, grown, _) = (load_checkpoint(tmp_path / f"{x}.pt") for x in "xy")
    assert grown == [*vocab, "\N{SNOWMAN}"] and new.config.vocab_size == old.config.vocab_size + 1
    idx = torch.randint(len(vocab), (2, 16), generator=seeded())
    idx[:, ::3] = old.config.mask_id
    moved = idx.where(idx != old.config.mask_id, new.config.mask_id)
    assert torch.equal(old(idx)[..., :-1], new(moved)[..., :-2])
