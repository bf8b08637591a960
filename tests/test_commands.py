"""The three commands, as a user types them, each in a process of its own in a fresh folder."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lib.checkpoint import load_checkpoint

SMALL = ("--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def clone(tmp_path, text):
    """A folder with the code and the text, as after git clone, and nothing else."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("data/*/prepare.py")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (tmp_path / "data/shakespeare_char/input.txt").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
def test_the_three_commands(clone, run, device):
    prepared = run("data/shakespeare_char/prepare.py", cwd=clone)
    assert prepared.returncode == 0 and prepared.stderr == ""
    trained = run("train.py", "--save_filename=X", *SMALL, "--max_iters=20", "--eval_interval=10",
                  f"--device={device}", cwd=clone)
    assert trained.returncode == 0, trained.stderr
    for words in (f"device: {device}", "dtype: ", " parameters\n", "iteration 20: val NELBO",
                  "nats per character\n", "sample: "):
        assert words in trained.stdout
    assert sorted(p.name for p in clone.glob("X*")) == ["X.pt", "X.pt.csv"]
    for path, where in (("X", device), ("X.pt", "cpu")):  # a CUDA checkpoint loads on CPU
        written = run("main.py", f"--path={path}", f"--device={where}", cwd=clone)
        # a line's start is not shown: 31 characters, and the line end
        assert written.returncode == 0 and len(written.stdout) == 32, written.stderr


def test_without_the_flag_the_file_is_unmask_pt(clone, run, data_dir):
    assert run("train.py", *SMALL, "--max_iters=2", f"--data_dir={data_dir}",
               cwd=clone).returncode == 0
    assert sorted(p.name for p in clone.glob("*.pt")) == ["unmask.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_real_signal_saves_and_says_how_to_go_on(clone, data_dir, name):
    flags = ["train.py", "--save_filename=X", *SMALL, "--max_iters=1000000", "--eval_interval=20",
             f"--data_dir={data_dir}"]
    process = subprocess.Popen([sys.executable, *flags], cwd=clone, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, bufsize=1)
    for line in process.stdout:
        if "iteration 20" in line:
            break
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err
    assert (clone / "X.pt.state").exists() and load_checkpoint(clone / "X.pt")[2]["iteration"] >= 20


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_nohup_survives_a_closed_terminal(clone, data_dir):
    flags = ["train.py", "--save_filename=X", *SMALL, "--max_iters=60", "--eval_interval=20",
             f"--data_dir={data_dir}"]
    process = subprocess.Popen(["nohup", sys.executable, *flags], cwd=clone, text=True, bufsize=1,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if "iteration 20" in line:
            break
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "done in" in out, err


def test_not_prepared_says_what_to_run(clone, run):
    result = run("train.py", "--save_filename=X", *SMALL, cwd=clone)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "prepare.py" in result.stderr
    assert not list(clone.glob("X*"))
