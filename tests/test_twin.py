"""The autoregressive twin on the command line: the same network with one argument changed."""

import math

import pytest
import torch
from conftest import assert_one_line_error

from lib.checkpoint import load_checkpoint, save_checkpoint
from model import GPT, GPTConfig


def test_a_twin_is_trained_evaluated_and_writes_from_left_to_right(train, sample, tmp_path):
    X = tmp_path / "twin.pt"
    result = train("--causal", "--max_iters=60", "--eval_interval=30", f"--save_filename={X}")
    assert result.code == 0 and "val NLL" in result.out and "NELBO" not in result.out, result
    model, chars, info = load_checkpoint(X)
    assert model.config.causal and info["nelbo"]["val"] < math.log(len(chars))
    evaluated = train("--eval_only", f"--init_from={X}")
    assert evaluated.code == 0 and "val NLL" in evaluated.out
    flags = (f"--path={X}", "--prompt=the ", "--num_samples=2", "--temperature=0.5")
    page = sample(*flags)
    first, second = page.out.split("\f")
    assert page.code == 0 and "[12 steps, 24 characters" in page.err
    for written in (first, second):
        assert len(written) == 17 and written.startswith("the ") and written.endswith("\n")
    assert sample(*flags).out == page.out
    without_the_flag = sample(*flags[:3]).out
    assert without_the_flag == sample(*flags[:3], "--temperature=0.8").out != page.out


@pytest.fixture
def twin(tmp_path):
    """The checkpoint of an untrained twin."""
    save_checkpoint(tmp_path / "twin.pt", GPT(GPTConfig(16, 4, 1, 2, 16, causal=True)), "abc")
    return tmp_path / "twin.pt"


@pytest.mark.parametrize("flag", ["--steps=4", "--remasking=random", "--block_length=4",
                                  "--cfg_scale=1", "--revise=0.3", "--threshold=0.9", "--tries=2",
                                  "--infill=a_c"])
def test_a_flag_that_only_diffusion_has_is_refused(sample, twin, flag):
    assert sample(f"--path={twin}").code == 0
    assert_one_line_error(sample(f"--path={twin}", flag), flag.split("=")[0], "causal")


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_temperature_that_makes_no_sense_is_refused(sample, twin, value):
    assert_one_line_error(sample(f"--path={twin}", f"--temperature={value}"), "temperature", value)


def test_a_twin_becomes_a_mask_predictor(train, tmp_path):
    """--init_from takes the weights; the causal mask and QK-norm have none and may be chosen."""
    X, Y = tmp_path / "twin.pt", tmp_path / "y.pt"
    assert train("--causal", "--max_iters=1", f"--save_filename={X}").code == 0
    flags = ("--max_iters=1", "--learning_rate=0", "--muon_lr=0", f"--save_filename={Y}")
    for new in (("--causal=False",), ("--causal=False", "--qk_norm=False")):
        assert train(f"--init_from={X}", *new, *flags).code == 0
        (twin, _, _), (model, _, _) = load_checkpoint(X), load_checkpoint(Y)
        assert not model.config.causal and model.config.qk_norm == (len(new) == 1)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters()))
    assert train(f"--init_from={X}", *flags).code == 0 and load_checkpoint(Y)[0].config.causal
    assert_one_line_error(train("--eval_only", f"--init_from={X}", "--causal=False"), "--causal")
