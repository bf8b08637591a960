"""What surrounds the scripts: other programs, file systems that are no local disk, terminals, names
as people type them, and texts as other programs save them."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import prepare
import pytest
import torch
from conftest import ROOT, assert_one_line_error
from helpers import (
    LETTERS,
    RUN,
    assert_same_weights,
    at_iteration,
    crash,
    curve,
    errors_of,
    names,
    plain,
    save_gpt,
)

import lib.likelihood
import train as train_script
from lib.checkpoint import load_checkpoint
from lib.common import explain, printable, text_of, write_atomically
from lib.data import load_data
from lib.show import frame
from lib.tokenizer import decode, encode


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})


# -----------------------------------------------------------------------------
# other programs that keep the cores busy

SPIN = "import os, sys, lib; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"


def test_threads_spin_for_a_short_time_unless_the_user_says_how_they_wait():
    """It is set before PyTorch is imported, which reads it then."""
    env = {name: "" for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    unset = f"import os; [os.environ.pop(name) for name in {list(env)!r}]; "
    assert python(unset + SPIN, **env).stdout == "False 10000\n"
    assert python(SPIN, GOMP_SPINCOUNT="7").stdout == "False 7\n"
    del env["OMP_WAIT_POLICY"]
    unset = f"import os; [os.environ.pop(name) for name in {list(env)!r}]; "
    assert python(unset + SPIN, **env, OMP_WAIT_POLICY="active").stdout == "False None\n"


@pytest.mark.parametrize("script", ["train.py", "main.py"])
def test_the_scripts_import_lib_before_anything_else(script):
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if "import" in line and line[0] in "if").startswith(
        "import lib ")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_while_pytorch_is_imported_prints_no_traceback():
    code = "import lib, os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)"
    result = python(code)
    assert result.returncode == -signal.SIGINT and result.stderr == ""


# -----------------------------------------------------------------------------
# file systems

def fails(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))
    return fail


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_where_fsync_is_not_supported_files_are_written_without(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", fails(code))
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and names(tmp_path) == ["x"]
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))
    with pytest.raises(OSError, match="x can't be written"):
        write_atomically(tmp_path / "x", b"newer")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_where_files_can_t_be_mapped_the_data_are_read(data_dir, monkeypatch):
    mapped = load_data(data_dir, 16)
    monkeypatch.setattr(np, "memmap", fails(errno.ENODEV))
    read = load_data(data_dir, 16)
    assert np.array_equal(mapped.train, read.train) and np.array_equal(mapped.val, read.val)


def test_a_program_that_changes_the_times_of_files_does_not_matter(train, tmp_path, monkeypatch):
    """As sync clients do. The run goes on, and an interrupted one is resumed."""
    def touch():
        for path in tmp_path.glob("x.pt*"):
            os.utime(path, (1, 1))
    at_iteration(monkeypatch, 6, touch)
    assert train(*RUN, f"--save_filename={tmp_path}/x").code == 0
    monkeypatch.undo()
    at_iteration(monkeypatch, 6, lambda: touch() or crash())
    assert train(*RUN, f"--save_filename={tmp_path}/x2").code == 9
    monkeypatch.undo()
    touch()
    assert train(*RUN, f"--save_filename={tmp_path}/x2", "--resume").code == 0
    assert_same_weights(tmp_path / "x.pt", tmp_path / "x2.pt")


@pytest.mark.parametrize("second_is", ["complete", "interrupted"])
def test_of_two_runs_of_one_name_both_end_with_their_files(train, tmp_path, monkeypatch, second_is):
    """The first one notices, at its next evaluation, that the name is taken, and says how it goes
    on."""
    flags, second = (*RUN, f"--save_filename={tmp_path}/x"), []

    def run_second():
        monkeypatch.undo()
        with monkeypatch.context() as m, torch.random.fork_rng():
            if second_is == "interrupted":
                at_iteration(m, 6, crash)
            second.append(train(*flags, "--seed=2"))
    at_iteration(monkeypatch, 6, run_second)
    first = train(*flags)
    assert first.code == 0 and second[0].code == (0 if second_is == "complete" else 9)
    [warning] = errors_of(first)
    other = tmp_path / "x_backup2.pt"
    assert warning == f"warning: another run has taken {tmp_path / 'x.pt'}; this one is now {other}"
    assert train(*RUN, f"--save_filename={tmp_path}/alone").code == 0
    assert_same_weights(other, tmp_path / "alone.pt")
    assert curve(other) == curve(tmp_path / "alone.pt")
    assert load_checkpoint(tmp_path / "x.pt")[2]["hyperparameters"]["seed"] == 2
    assert load_checkpoint(tmp_path / "x_backup1.pt")[2]["iteration"] == 4  # its best so far
    if second_is == "interrupted":
        assert train(*flags, "--resume").code == 0


def test_a_state_that_can_t_be_read_for_a_moment_is_still_the_runs_own(train, tmp_path,
                                                                      monkeypatch):
    """As while a virus scanner has it."""
    monkeypatch.setattr("lib.run.load_object", fails(errno.EACCES))
    result = train(*RUN, f"--save_filename={tmp_path}/x")
    assert result.code == 0 and errors_of(result) == [] and names(tmp_path) == ["x.pt", "x.pt.csv"]


# -----------------------------------------------------------------------------
# terminals

def test_wide_characters_take_two_columns_and_marks_none():
    vocab = ["中", "a", "\u0301", "\n"]
    shown = plain(frame([0, 0, 1, 2, 0, 1], [9] * 6, 9, vocab, "end", (5, 24)))
    assert shown == "中中a\u0301\r\n中a\r\n\r\nend"


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[31m\x0e\x07\r\n\té中") == "a\\x1b[31m\\x0e\\x07\\r\n\té中"


def test_prepare_shows_no_control_character(call, tmp_path):
    (tmp_path / "x.txt").write_text("\x1b[31mred\x1b[0m\x0e\x07\x85 text\n" * 9, encoding="utf-8")
    result = call(prepare, f"--input={tmp_path}/x.txt", f"--out_dir={tmp_path}/out")
    assert result.code == 0 and "vocab size: " in result.out
    assert not [char for char in result.out if not char.isprintable() and char != "\n"]
    assert "\\x1b" in result.out and "\\x85" in result.out


def test_an_unknown_character_is_named_by_its_code_point_and_composed_first():
    assert decode(encode("cafe\u0301", ["a", "c", "f", "é"]), ["a", "c", "f", "é"]) == "café"
    assert encode("e\u0301", ["e", "\u0301"]).tolist() == [0, 1]  # it knows them apart
    with pytest.raises(ValueError, match=r"U\+0301"):
        encode("e\u0301", ["e"])
    with pytest.raises(ValueError, match=r"U\+FE0F"):
        encode("e\ufe0f", ["e"])
    text = unicodedata.normalize("NFD", "é" * 3)
    assert len(text) == 6 and len(encode(text, ["é"])) == 3


# -----------------------------------------------------------------------------
# names and values

def test_a_home_folder_is_found_in_every_flag(sample, train, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = save_gpt(tmp_path / "x.pt", LETTERS, 16)
    assert sample(f"--path={path}", "--html=~/run.html").code == 0
    assert (tmp_path / "run.html").exists()
    assert_one_line_error(train("--data_dir=~nobody-here/x"), "~nobody-here")


def test_the_command_to_go_on_with_can_be_pasted(train, tmp_path):
    (tmp_path / "my models").mkdir()
    result = train(*RUN, f"--save_filename={tmp_path}/my models/x y")
    command = result.out.splitlines()[-1].split("Now: ")[1]
    assert shlex.split(command) == ["python", "main.py", f"--path={tmp_path}/my models/x y.pt"]


@pytest.mark.parametrize("name", ["x.pt.state", "x.pt.csv"])
def test_a_file_beside_a_checkpoint_is_not_taken_for_one(train, sample, tmp_path, name):
    assert_one_line_error(sample(f"--path={tmp_path}/{name}"), name, ".pt")
    assert_one_line_error(train(f"--save_filename={tmp_path}/{name}", "--resume"), name)


def test_a_value_means_a_file_if_it_ends_like_one_or_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("its text")
    assert text_of("there") == "its text" and text_of("g__gle.com") == "g__gle.com"
    for name in ("my notes.txt", "a.md", "b.csv", "c.sdk"):
        with pytest.raises(ValueError, match=f"there is no file {name} .* pipe it in"):
            text_of(name)


def test_a_missing_file_is_not_scored_as_text(sample):
    assert_one_line_error(sample("--score=my notes.txt"), "my notes.txt")


def test_a_text_that_is_too_short_says_what_to_do(call, tmp_path):
    (tmp_path / "x.txt").write_text("to be or not to be, " * 100)
    assert call(prepare, f"--input={tmp_path}/x.txt", f"--out_dir={tmp_path}/x").code == 0
    result = call(train_script, f"--data_dir={tmp_path}/x", f"--save_filename={tmp_path}/x")
    assert_one_line_error(result, "val.bin has only 200 tokens", "--block_size", "2,560")


def test_standard_input_that_is_closed_is_one_line(sample, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_line_error(sample("--prompt=-"), "standard input is closed")


# -----------------------------------------------------------------------------
# what takes long, and what does not work here

def test_a_long_text_says_how_long_scoring_takes_before_it_starts(sample, tmp_path, monkeypatch):
    path = save_gpt(tmp_path / "x.pt", LETTERS, 8)
    clock = iter(range(0, 10**6, 10))  # each look at the clock is 10 seconds later
    monkeypatch.setattr(lib.likelihood.time, "perf_counter", lambda: next(clock))
    result = sample(f"--path={path}", "--score=" + "the cat " * 3)
    # 10 seconds for 24 tokens; three windows of 8 tokens, each read 8 times and in 64 passes
    assert result.code == 0 and "24 characters: this will take about 12 minutes" in result.err
    monkeypatch.setattr(lib.likelihood.time, "perf_counter", time.monotonic)
    assert sample(f"--path={path}", "--score=the cat").err == ""


@pytest.mark.parametrize("message", ["Dynamo is not supported on Python 3.15+",
                                     "torch.compile is not supported on Python 3.15+"])
def test_a_python_that_is_too_new_for_the_compiler_is_one_line(train, tmp_path, monkeypatch,
                                                               message):
    def broken(*_):
        raise RuntimeError(message)
    monkeypatch.setattr(torch, "compile", broken)
    result = train("--compile", *RUN, f"--save_filename={tmp_path}/x")
    assert_one_line_error(result, "--compile", message)
    assert explain(RuntimeError("anything else"), "") is None


def test_a_pipe_that_holds_nothing_is_an_empty_prompt(sample, tmp_path, monkeypatch):
    path = save_gpt(tmp_path / "x.pt", LETTERS, 16)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert sample(f"--path={path}", "--prompt=-").code == 0
