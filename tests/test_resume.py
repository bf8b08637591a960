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
from runs import (
    RUN,
    assert_same_weights,
    at_iteration,
    contents,
    crash,
    ctrl_c,
    curve,
    errors_of,
    names,
)

import train as train_script
from lib.checkpoint import load_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how, iteration, do, resumed_at", [
    ("ctrl-c", 6, ctrl_c, 7),
    ("ctrl-c before the first evaluation", 1, ctrl_c, 2),
    ("crash", 7, crash, 4),
    ("crash before the first evaluation", 2, crash, 0),
])
def test_a_resumed_run_is_bit_for_bit_the_run_without_the_interruption(
        how, iteration, do, resumed_at, dtype, train, tmp_path, monkeypatch):
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
    assert resumed.code == 0 and f"resuming {X} at iteration {resumed_at}\n" in resumed.out
    assert_same_weights(X, tmp_path / "whole.pt")
    assert curve(X) == curve(tmp_path / "whole.pt")
    assert names(tmp_path) == ["cut.pt", "cut.pt.csv", "whole.pt", "whole.pt.csv"]


KILLED = """
import os, signal, train
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
    assert complete.code == 0 and "complete: nothing to resume" in complete.out
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


def of_an_old_version(state):
    """In which --eval_tokens was --eval_chars."""
    state["config"]["eval_chars"] = state["config"].pop("eval_tokens")


@pytest.mark.parametrize("damage, words", [
    (lambda state: b"half", "damaged"),
    (lambda state: [1, 2], "not a training state"),
    (lambda state: {"config": {}, "x": 1}, "not a training state"),
    (of_an_old_version, "not a training state of this version"),
    (lambda state: state.pop("vocab") and None, "not a training state"),
    (lambda state: state.pop("ema") and None, "does not fit its run"),
    (lambda state: state["model"].popitem() and None, "does not fit its run"),
    (lambda state: state["optimizer 0"].clear(), "does not fit its run"),
    (lambda state: state.pop("minutes") and None, "does not fit its run"),
    (lambda state: state.update(minutes="many"), "does not fit its run"),
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


# -----------------------------------------------------------------------------
# a second run of the same name

@pytest.mark.parametrize("second_is", ["complete", "going on"])
def test_a_run_stops_when_a_second_run_of_its_name_has_taken_its_place(
        train, tmp_path, monkeypatch, second_is):
    """The first run finds, when it would save, that X.pt.state is not as it left it."""
    flags, second = (*RUN, f"--save_filename={tmp_path}/x"), []

    def run_second():
        monkeypatch.undo()
        with monkeypatch.context() as m:
            if second_is == "going on":
                at_iteration(m, 6, crash)
            second.append(train(*flags, "--seed=2"))
    at_iteration(monkeypatch, 6, run_second)
    first = train(*flags)
    assert second[0].code == (0 if second_is == "complete" else 9)
    error, = errors_of(first)
    assert first.code == 2 and "done in" not in first.out
    assert error.startswith(f"error: another run has changed {tmp_path / 'x.pt.state'}: stopping")
    if second_is == "going on":  # the state is the second run's
        assert torch.load(tmp_path / "x.pt.state")["config"]["seed"] == 2
    assert load_checkpoint(tmp_path / "x_backup1.pt")[2]["hyperparameters"]["seed"] == 1337
    assert torch.load(tmp_path / "x_backup1.pt.state")["iteration"] == 4


def test_a_run_that_stops_for_a_second_one_leaves_the_second_one_s_files(train, tmp_path,
                                                                         monkeypatch):
    flags, files = (*RUN, f"--save_filename={tmp_path}/x"), {}

    def run_second():
        monkeypatch.undo()
        assert train(*flags, "--seed=2").code == 0
        files.update(contents(tmp_path))
    at_iteration(monkeypatch, 6, run_second)
    assert train(*flags).code == 2
    assert contents(tmp_path) == files


def test_a_run_stops_when_another_process_resumes_it(train, tmp_path, monkeypatch):
    """Both would write the same files."""
    flags, second = (*RUN, f"--save_filename={tmp_path}/x"), []

    def resume():
        monkeypatch.undo()
        second.append(train(*flags, "--resume"))
    at_iteration(monkeypatch, 6, resume)
    first = train(*flags)
    assert second[0].code == 0 and "resuming" in second[0].out
    error, = errors_of(first)
    assert first.code == 2 and "another run has changed" in error
