"""Interrupted runs: --resume continues them bit for bit, and X.pt.state is theirs alone."""

import os
import shutil
import signal
import subprocess
import sys

import prepare
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error
from helpers import (
    RUN,
    assert_same_weights,
    at_iteration,
    contents,
    crash,
    ctrl_c,
    curve,
    names,
)

import lib.evaluate
import train as train_script
from lib.checkpoint import load_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how, iteration, do, resumed_at, model", [
    ("ctrl-c", 6, ctrl_c, 7, 4),  # the best model so far is that of iteration 4
    ("ctrl-c before the first evaluation", 1, ctrl_c, 2, 2),
    ("ctrl-c when the first evaluation is due", 3, ctrl_c, 4, 4),
    ("ctrl-c when another evaluation is due", 7, ctrl_c, 8, 4),
    ("ctrl-c when the last evaluation is due", 11, ctrl_c, 12, 8),
    ("crash", 7, crash, 4, 4),
    ("crash before the first evaluation", 2, crash, 0, None),
])
def test_a_resumed_run_is_bit_for_bit_the_run_without_the_interruption(
        how, iteration, do, resumed_at, model, dtype, train, tmp_path, monkeypatch):
    flags = (*RUN, f"--dtype={dtype}")
    assert train(*flags, f"--save_filename={tmp_path}/whole").code == 0
    X = tmp_path / "cut.pt"
    at_iteration(monkeypatch, iteration, do)
    cut = train(*flags, f"--save_filename={tmp_path}/cut")
    assert cut.code == (9 if do is crash else 130) and (do is crash or "--resume" in cut.out)
    assert torch.load(tmp_path / "cut.pt.state")["iteration"] == resumed_at
    assert X.exists() == (model is not None)
    if X.exists():
        assert load_checkpoint(X)[2]["iteration"] == model
    monkeypatch.undo()
    resumed = train(*flags, f"--save_filename={tmp_path}/cut", "--resume")
    assert resumed.code == 0 and f"resuming {X} at iteration {resumed_at}\n" in resumed.out
    assert_same_weights(X, tmp_path / "whole.pt")
    assert curve(X) == curve(tmp_path / "whole.pt")
    assert names(tmp_path) == ["cut.pt", "cut.pt.csv", "whole.pt", "whole.pt.csv"]


@pytest.mark.parametrize("measurement, resumed_at, model", [(1, 4, 4), (3, 8, 4), (6, 12, 8)])
def test_a_signal_ends_an_evaluation_and_resume_repeats_it(train, tmp_path, monkeypatch,
                                                           measurement, resumed_at, model):
    """Each of the three evaluations measures both splits. On a CPU, one may take long."""
    assert train(*RUN, f"--save_filename={tmp_path}/whole").code == 0
    X, calls, real = tmp_path / "cut.pt", [], lib.evaluate.estimate_nelbo

    def estimate_nelbo(*args, **kwargs):
        calls.append(args)
        if len(calls) == measurement:
            ctrl_c()
        return real(*args, **kwargs)
    monkeypatch.setattr(lib.evaluate, "estimate_nelbo", estimate_nelbo)
    cut = train(*RUN, f"--save_filename={X}")
    assert cut.code == 130 and len(calls) == measurement
    assert torch.load(f"{X}.state")["iteration"] == resumed_at
    assert load_checkpoint(X)[2]["iteration"] == model
    monkeypatch.undo()
    assert train(*RUN, f"--save_filename={X}", "--resume").code == 0
    assert_same_weights(X, tmp_path / "whole.pt")
    assert curve(X) == curve(tmp_path / "whole.pt")


def test_until_the_first_evaluation_each_interruption_saves_the_model_as_it_is(train, tmp_path,
                                                                               monkeypatch):
    flags = (*RUN, f"--save_filename={tmp_path}/x")
    for iteration in (0, 2):
        with monkeypatch.context() as m:
            at_iteration(m, iteration, ctrl_c)
            cut = train(*flags, *["--resume"] * (iteration > 0))
        assert cut.code == 130 and f"{tmp_path / 'x.pt'} holds the model as it is now" in cut.out
        assert load_checkpoint(tmp_path / "x.pt")[2]["iteration"] == iteration + 1


KILLED = """
import os, signal, train
real = train.set_learning_rates
def dies_at_3(run, config):
    if run.iteration == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(run, config)
train.set_learning_rates = dies_at_3
train.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_resume_finds_a_run_that_was_killed_before_its_first_evaluation(train, tmp_path, data_dir):
    """Its own state, not that of an older run of the same name, which is kept."""
    X = tmp_path / "x.pt"
    assert train(*RUN, f"--save_filename={X}").code == 0
    old, old_curve = X.read_bytes(), curve(X)
    command = [sys.executable, "-c", KILLED, *TINY, f"--data_dir={data_dir}", *RUN, "--seed=2",
               f"--save_filename={X}"]
    killed = subprocess.run(command, capture_output=True, env={
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path) == ["x.pt.state", "x_backup1.pt", "x_backup1.pt.csv"]
    resumed = train(*RUN, f"--save_filename={X}", "--resume")  # --seed=2 is in the state
    assert resumed.code == 0 and f"resuming {X} at iteration 0\n" in resumed.out, resumed
    assert train(*RUN, "--seed=2", f"--save_filename={tmp_path}/whole").code == 0
    assert_same_weights(X, tmp_path / "whole.pt")
    assert curve(X) == curve(tmp_path / "whole.pt") != old_curve
    assert load_checkpoint(X)[2]["hyperparameters"]["seed"] == 2
    assert (tmp_path / "x_backup1.pt").read_bytes() == old
    assert curve(tmp_path / "x_backup1.pt") == old_curve


def test_resume_with_nothing_to_resume_trains_once_and_then_says_complete(train, tmp_path):
    flags = (*RUN, f"--save_filename={tmp_path}/x", "--resume")
    fresh = train(*flags)
    assert fresh.code == 0 and "starting afresh" in fresh.out
    before = contents(tmp_path)
    complete = train(*flags)
    assert complete.code == 0 and f"{tmp_path / 'x.pt'} is complete" in complete.out
    assert contents(tmp_path) == before and names(tmp_path) == ["x.pt", "x.pt.csv"]


def test_resume_takes_the_same_data_from_another_folder_and_no_other_data(
        train, call, tmp_path, data_dir, monkeypatch):
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={tmp_path}/x")
    monkeypatch.undo()
    shutil.copytree(data_dir, tmp_path / "moved")
    text = (data_dir / "input.txt").read_text(encoding="utf-8")
    (tmp_path / "text").write_text(text[::-1], encoding="utf-8")
    prepare.prepare(tmp_path / "text", tmp_path / "other")
    resume = ("--device=cpu", f"--save_filename={tmp_path}/x", "--resume")
    other = call(train_script, *resume, f"--data_dir={tmp_path}/other")
    assert_one_line_error(other, "the data are not those of the interrupted run")
    moved = call(train_script, *resume, f"--data_dir={tmp_path}/moved", "--log_interval=1")
    assert moved.code == 0 and "resuming" in moved.out, moved


def test_resume_refuses_flags_that_the_interrupted_run_did_not_have(train, tmp_path, monkeypatch):
    at_iteration(monkeypatch, 6, crash)
    train(*RUN, f"--save_filename={tmp_path}/x")
    monkeypatch.undo()
    before = contents(tmp_path)
    refused = train(*RUN, f"--save_filename={tmp_path}/x", "--resume", "--seed=3")
    assert_one_line_error(refused, "--seed=3", "1337")
    assert contents(tmp_path) == before
    free = train(*RUN, f"--save_filename={tmp_path}/x", "--resume", "--eval_interval=5",
                 "--eval_passes=3", "--eval_tokens=320", "--log_interval=1")
    assert free.code == 0 and "resuming" in free.out
    assert [row["iteration"] for row in curve(tmp_path / "x.pt")] == [4, 5, 10, 12]


@pytest.mark.parametrize("flags", [["--dtype=auto"], ["--device=auto"], ["--init_from=start"]])
def test_the_same_command_with_resume_continues_the_run(train, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    assert train(*RUN, "--save_filename=start").code == 0
    at_iteration(monkeypatch, 6, ctrl_c)
    assert train(*RUN, "--save_filename=x", *flags).code == 130
    resumed = train(*RUN, "--save_filename=x", *flags, "--resume")
    assert resumed.code == 0 and "resuming x.pt at iteration 7\n" in resumed.out, resumed


def of_an_old_version(state):
    """In which --eval_tokens was --eval_chars."""
    state["config"]["eval_chars"] = state["config"].pop("eval_tokens")


@pytest.mark.parametrize("damage, words", [
    (lambda state: b"half", "damaged"),
    (lambda state: [1, 2], "of another version"),
    (lambda state: {"config": {}, "x": 1}, "of another version"),
    (of_an_old_version, "of another version"),
    (lambda state: state.pop("vocab") and None, "of another version"),
    (lambda state: state.pop("ema") and None, "damaged"),
    (lambda state: state["model"].popitem() and None, "damaged"),
    (lambda state: state["optimizer 0"].clear(), "damaged"),
    (lambda state: state.pop("minutes") and None, "damaged"),
])
def test_a_state_file_that_can_t_be_resumed_is_reported_in_one_line_and_left(
        interrupted, train, tmp_path, damage, words):
    state = tmp_path / "x.pt.state"
    content = torch.load(interrupted)
    damaged = damage(content)
    if isinstance(damaged, bytes):
        state.write_bytes(damaged)
    else:
        torch.save(content if damaged is None else damaged, state)
    before = contents(tmp_path)
    result = train(*RUN, f"--save_filename={tmp_path}/x", "--resume")
    assert_one_line_error(result, "x.pt.state", words)
    assert contents(tmp_path) == before


@pytest.fixture
def interrupted(train, tmp_path_factory, monkeypatch):
    """The state file of an interrupted run."""
    folder = tmp_path_factory.mktemp("interrupted")
    with monkeypatch.context() as m:
        at_iteration(m, 1, ctrl_c)
        assert train(*RUN, f"--save_filename={folder}/x").code == 130
    return folder / "x.pt.state"
