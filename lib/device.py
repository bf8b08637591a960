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
    """Return the Processes that torchrun's environment variables describe; without it, one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Processes(*(int(os.environ.get(name) or n) for name, n in zip(names, "0101")))


def connect(name, processes):
    """Return the torch.device of this process. Several processes are connected, and each takes a
    GPU of its own."""
    if processes.world_size == 1:
        return pick_device(name)
    check(name in ("auto", "cpu", "cuda"), "for several processes, --device is cpu or cuda")
    if name != "cpu" and torch.cuda.is_available():
        check(processes.local_world_size <= torch.cuda.device_count(),
              f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs")
        torch.cuda.set_device(processes.local_rank)  # before anything else touches a GPU
        name = f"cuda:{processes.local_rank}"
    device, backend = pick_device(name), "nccl" if name.startswith("cuda:") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # evaluations take long
    return device


def pick_device(name="auto"):
    """Return the torch.device for auto, cpu, cuda, cuda:N or mps. ValueError if it does not
    work."""
    check(re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name),
          f"--device={name} is not one of auto, cpu, cuda, cuda:N, mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).sum().item()  # PyTorch may have no kernels for this GPU
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{name} does not work here ({reason}): try --device=cpu") from e
    return torch.device(name)


def has_bfloat16(device):
    """Whether the device has units for bfloat16. Others emulate it, which is slower than float32:
    on a CPU without AVX-512, 30 times in matrix products."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                     or torch.cpu._is_amx_tile_supported())


def pick_dtype(name, device):
    """Return the name of the dtype to compute in: float32, bfloat16 or float16. auto is bfloat16 if
    the device has units for it, else float16 on a GPU and float32 elsewhere."""
    check(name in ("auto", "float32", "bfloat16", "float16"),
          f"--dtype={name} is not one of auto, float32, bfloat16, float16")
    without = "float16" if device.type == "cuda" else "float32"
    return name if name != "auto" else "bfloat16" if has_bfloat16(device) else without


def autocast(dtype, device):
    """Return the context in which a model computes in the dtype of that name. Its weights stay
    float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


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
