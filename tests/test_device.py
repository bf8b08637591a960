"""Devices, dtypes, and the processes that torchrun starts. No test here needs a GPU: where one is
wanted, PyTorch's functions are replaced by ones that write down that they were called."""

from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch

from lib.device import Processes, autocast, connect, pick_device, pick_dtype, read_processes

CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are two GPUs. Returns the list of what is done with them, in order."""
    done, real_ones = [], torch.ones

    def ones(*size, device):
        done.append(("computes on", str(device)))
        return real_ones(*size)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: done.append(("takes", f"cuda:{i}")))
    monkeypatch.setattr(torch.cuda, "device", lambda device: done.append(("enters", str(device)))
                        or nullcontext())
    return done


@pytest.fixture
def network(monkeypatch):
    """Pretend to connect processes. Returns the list of the backends by which it was done."""
    backends = []

    def init_process_group(backend, timeout):
        assert timeout >= timedelta(hours=1)  # an evaluation may take longer than the 10 minutes
        backends.append(backend)              # that are the default
    monkeypatch.setattr("torch.distributed.init_process_group", init_process_group)
    return backends


# -----------------------------------------------------------------------------
# the device

def test_auto_is_the_gpu_if_there_is_one(gpus, monkeypatch):
    assert pick_device("auto") == pick_device() == torch.device("cuda")
    assert gpus[0] == ("computes on", "cuda")  # it is tried out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device() == CPU


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_without_kernels_is_an_error_that_says_what_to_do(gpus, monkeypatch, name):
    def no_kernel(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_...")
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(ValueError, match=r"^cuda does not work here \(CUDA error: no kernel image "
                                         r"is available\): try --device=cpu$"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cpu", "cuda:1"])
def test_the_device_that_is_asked_for_is_taken(gpus, name):
    assert pick_device(name) == torch.device(name)
    assert gpus == [("computes on", name)]


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:x", "cuda:99", "cuda:", "", "CPU", "cpu\n"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} (is not one of|does not work here)"):
        pick_device(name)


# -----------------------------------------------------------------------------
# the dtype

@pytest.mark.parametrize("avx512, amx, dtype", [
    (False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16"),
    (True, True, "bfloat16")])
def test_a_cpu_computes_in_bfloat16_if_it_has_units_for_it(avx512, amx, dtype, monkeypatch):
    """It is asked, not timed, so the same machine always decides the same."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert pick_dtype("auto", CPU) == dtype


@pytest.mark.parametrize("supported, dtype", [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_computes_in_bfloat16_if_it_can(supported, dtype, gpus, monkeypatch):
    def is_bf16_supported(including_emulation):
        return supported and not including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert pick_dtype("auto", torch.device("cuda:1")) == dtype
    assert gpus == [("enters", "cuda:1")]  # it is this GPU that is asked


def test_mps_computes_in_float32():
    assert pick_dtype("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_dtype_that_is_asked_for_is_taken(name, device):
    assert pick_dtype(name, torch.device(device)) == name


@pytest.mark.parametrize("name", ["int8", "float64", "bf16", ""])
def test_another_dtype_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--dtype={name} is not one of"):
        pick_dtype(name, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_in_the_dtype_and_its_weights_stay_float32(dtype):
    linear = torch.nn.Linear(2, 2)
    with autocast(dtype, CPU):
        assert linear(torch.ones(1, 2)).dtype == getattr(torch, dtype)
    assert linear.weight.dtype == torch.float32


# -----------------------------------------------------------------------------
# processes

def set_variables(monkeypatch, *values):
    for name, value in zip(VARIABLES, values):
        monkeypatch.setenv(name, value)


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert read_processes() == Processes() == Processes(0, 1, 0, 1)
    set_variables(monkeypatch, "", "", "", "")
    assert read_processes() == Processes()


def test_torchrun_says_which_process_this_is(monkeypatch):
    set_variables(monkeypatch, "9", "16", "1", "8")
    assert read_processes() == Processes(rank=9, world_size=16, local_rank=1, local_world_size=8)


def test_one_process_is_not_connected(network):
    assert connect("cpu", Processes()) == pick_device("cpu") and network == []


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("rank, local_rank", [(0, 0), (1, 1), (3, 1)])
def test_each_process_takes_its_own_gpu_before_it_touches_any(name, rank, local_rank, gpus,
                                                              network):
    """Otherwise the second process would hold memory of the first GPU, too."""
    device, own = connect(name, Processes(rank, 4, local_rank, 2)), f"cuda:{local_rank}"
    assert str(device) == own and network == ["nccl"]
    assert gpus[0] == ("takes", own) and {where for _, where in gpus} == {own}


@pytest.mark.parametrize("name, available", [("cpu", True), ("cpu", False), ("auto", False)])
def test_without_a_gpu_processes_share_the_cpu(name, available, gpus, network, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert connect(name, Processes(1, 3, 1, 3)) == CPU and network == ["gloo"]
    assert not any(where.startswith("cuda") for _, where in gpus)


def test_more_processes_than_gpus_are_refused(gpus, network):
    with pytest.raises(ValueError, match="--nproc_per_node must be at most 2"):
        connect("auto", Processes(0, 3, 0, 3))
    assert gpus == network == []


@pytest.mark.parametrize("name", ["cuda:0", "mps", "gpu"])
def test_several_processes_do_not_go_on_one_device(name, gpus, network):
    with pytest.raises(ValueError, match="for several processes, --device is cpu or cuda"):
        connect(name, Processes(0, 2, 0, 2))
    assert gpus == network == []
