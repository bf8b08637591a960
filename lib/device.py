"""
Devices, dtypes, and the processes that torchrun starts.
"""

import os
import re
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.common import check


@dataclass
class Processes:
    """Which of the run's processes this is, over all machines and on this one."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_processes():
    """Return the Processes that torchrun's environment variables describe; without torchrun, one.
    ValueError for variables that make no sense."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    values = [os.environ.get(name) or default for name, default in zip(names, "0101")]
    check(all(value.isdigit() for value in values) and int(values[0]) < int(values[1]),
          f"RANK={values[0]} and WORLD_SIZE={values[1]} make no sense: leave them to torchrun, or "
          "unset them")
    return Processes(*map(int, values))


def connect(name, processes):
    """Return the torch.device of this process and the reason for it. Several processes are
    connected, and each takes a GPU of its own."""
    if processes.world_size == 1:
        return pick_device(name)
    check(name in ("auto", "cpu", "cuda"), f"--device={name} is one device for "
          f"{processes.world_size} processes; use cpu or cuda")
    if name != "cpu" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        check(processes.local_world_size <= gpus,
              f"{processes.local_world_size} processes for {gpus} GPUs: give torchrun "
              f"--nproc_per_node={gpus}, or train.py --device=cpu")
        torch.cuda.set_device(processes.local_rank)  # before anything else touches a GPU
        name = f"cuda:{processes.local_rank}"
    device, why = pick_device(name)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=2))  # the others wait for evaluations
    return device, f"{why}; {processes.world_size} processes"


def pick_device(name="auto"):
    """Return (torch.device, the reason) for auto, cpu, cuda, cuda:N or mps. ValueError if it does
    not work."""
    check(re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name),
          f"--device={name} is not one of auto, cpu, cuda, cuda:N, mps")
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu"), "found no CUDA device"
    try:
        device = torch.device("cuda" if name == "auto" else name)
        torch.ones(1, device=device).sum().item()  # PyTorch may have no kernels for this GPU
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        check(name == "auto", f"--device={name} does not work here ({reason}); try --device=cpu")
        return torch.device("cpu"), f"the GPU does not work: {reason}"
    return device, torch.cuda.get_device_name(device) if device.type == "cuda" else "as asked"


def has_bfloat16(device):
    """Whether the device has units for bfloat16. Others emulate it, which is slower than float32:
    on a CPU without AVX-512, 30 times in matrix products."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                     or torch.cpu._is_amx_tile_supported())


def pick_dtype(name, device):
    """Return (torch.dtype to compute in, the reason) for auto, float32, bfloat16 or float16."""
    check(name in ("auto", "float32", "bfloat16", "float16"),
          f"--dtype={name} is not one of auto, float32, bfloat16, float16")
    if name != "auto":
        return getattr(torch, name), "as asked"
    if has_bfloat16(device):
        return torch.bfloat16, "the device has units for it"
    if device.type == "cuda":
        return torch.float16, "the GPU has no units for bfloat16"
    return torch.float32, "the device has no units for bfloat16"


def autocast(dtype, device):
    """Return the context in which a model computes in dtype. Its weights stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def choose_attention(device):
    """Choose PyTorch's fastest attention for training on this device, for the whole process."""
    if device.type == "cuda":  # cuDNN's attention re-plans, slowly, for every new length
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        # In bfloat16, attention by plain matrix products trains faster on a CPU than the flash
        # kernel (tests/benchmarks/training.py). Despite their names, the switches apply to CPUs.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def home_of(model):
    """Return the device of the sampler's tensors. mps has no float64, so there it is the CPU."""
    device = model.wte.weight.device
    return torch.device("cpu") if device.type == "mps" else device


def on_its_device(model):
    """Return a model that takes ids from, and returns logits to, any device."""
    device = model.wte.weight.device
    return lambda idx: model(idx.to(device)).to(idx.device)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")
