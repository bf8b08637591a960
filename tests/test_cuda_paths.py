"""The CUDA paths of train.py and main.py, walked where there is no CUDA: with PyTorch's fake
tensors, which have a shape, a dtype and a device, but no values. Where a value is needed, every
bool() is True and every number is 0. So these lines are not reached:

* what other values lead to: an overflow in update_weights, a row without masks in unmask;
* loops and sizes by value: get_batch, missing_rates, write_pages, solve_puzzles, unmask_blocks;
* the backward pass, which needs CUDA's library: backward() only looks at the loss.

Unseen: matrix products of two dtypes; CPU tensors with CUDA indices; CPU scalars in a stack."""

import ctypes
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import main as main_script
import train as train_script
from diffusion import diffusion_loss, forward_process
from lib import data, evaluate, likelihood, pages, rates, search, twin
from lib.device import Processes, autocast, on_its_device, pick_device, pick_dtype
from model import GPT, GPTConfig

C10 = next(Path(torch.__file__).parent.glob("lib/libc10.*"), None)
FITS = torch.__version__.startswith("2.13.") and not torch.backends.cuda.is_built()
pytestmark = [pytest.mark.skipif(not (C10 and FITS and sys.platform == "linux"),
                                 reason="needs a CPU build of PyTorch 2.13, whose inside it uses"),
              pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")]
SIZES = dict(block_size=8, n_layer=1, n_head=2, n_embd=32)
VOCAB, MASK, rand, real = list("\n abcdef"), 8, torch.rand, unset_fake_temporarily()


class Generator(torch.Generator):
    """Draws on the CPU, but says that it is on the device that was asked for."""
    device = None

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.device = torch.device(device)
        return generator


def checked_rand(*shape, generator=None, device="cpu", **kwargs):
    assert generator is None or generator.device.type == torch.device(device).type
    return rand(*shape, generator=generator, device=device, **kwargs)


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request, monkeypatch):
    """Pretend that there is a GPU, and that this dtype, the one to use, is the best one for it."""
    for name, value in {
            "__bool__": lambda _: True, "__int__": lambda _: 0, "item": lambda _: 0.0,
            "numpy": lambda t: np.zeros(t.shape, int), "tolist": lambda t: t.numpy().tolist(),
            "pin_memory": lambda t: t if t.is_cpu else pytest.fail("already on CUDA")}.items():
        monkeypatch.setattr(FakeTensor, name, value, raising=False)
    for name, value in {
            "rand": checked_rand, "Generator": Generator, "cuda.device": nullcontext,
            "cuda.is_bf16_supported": lambda **_: request.param == "bfloat16",
            "cuda.amp.common.amp_definitely_not_available": lambda: False,
            "backends.cuda.enable_cudnn_sdp": lambda enabled: None}.items():
        monkeypatch.setattr(f"torch.{name}", value)
    monkeypatch.setattr(train_script, "GPT", real(GPT))
    # FakeTensorMode replaces the device guard of CUDA (number 1) by one that does nothing, but only
    # if there is one that knows no devices. So a CPU build gets that of lazy devices (17) first.
    guards = (ctypes.c_void_p * 18).in_dll(ctypes.CDLL(str(C10)),
                                           "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[17]
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield request.param
    guards[1] = None


def test_training_and_evaluation_stay_on_the_gpu(dtype, monkeypatch):
    device, ids = pick_device("cuda"), np.arange(99) % MASK
    config = train_script.TrainConfig(**SIZES, dropout=0.1, dtype=dtype, causal=dtype == "float16")
    run = train_script.set_up(config, device, text := data.Data(ids, ids, VOCAB, {}))
    assert (pick_dtype("auto", device), run.scaler.is_enabled()) == (dtype, dtype == "float16")
    with autocast(dtype, device):
        assert run.model(torch.zeros(1, 8, device=device).long()).dtype == getattr(torch, dtype)

    def backward(loss):
        assert loss.is_cuda and loss.dtype == torch.float32 and loss.requires_grad
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
    monkeypatch.setattr(FakeTensor, "backward", backward, raising=False)
    batch = [x := torch.zeros(4, 8, dtype=torch.long), *forward_process(x, MASK)]
    train_script.set_learning_rates(run, config)
    losses = [train_script.add_gradient(run.model, loss_function, batch, run, config, Processes())
              for loss_function in (diffusion_loss, twin.autoregressive_loss)]
    train_script.update_weights(run, config)
    train_script.read_losses(run, losses, [], text, Processes())
    evaluate.evaluate(run, config, text)
    evaluate.short_sample(run.ema, config, text)
    likelihood.score(run.ema, VOCAB, "a bad face", passes=2)


def test_sampling_stays_on_the_gpu(dtype):
    model = real(GPT)(GPTConfig(**SIZES, vocab_size=MASK + 1, causal=dtype == "float16"))
    predictor = on_its_device(model.to("cuda", getattr(torch, dtype)))
    x, generator = torch.full((2, 8), MASK, device="cuda"), torch.Generator("cuda")
    x = pages.begin_word(predictor, x, model.config, VOCAB, 0.8, generator)
    predictor = rates.weighted(predictor, torch.zeros(MASK, device="cuda").double())
    search.certainty(predictor, x, x == MASK, MASK)
    likelihood.exact_nll(predictor, x, MASK, steps=3)
    config = main_script.SampleConfig(**main_script.PAGE, cfg_scale=1)
    states = [*main_script.sample(config, model, predictor, x, generator)]
    assert len(states) >= 8 and all(state.is_cuda for state in states)
