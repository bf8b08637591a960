"""
The mask predictor: a GPT-2 with bidirectional attention, the checkpoint file it lives in, and the
device and dtype it runs on.

    from model import GPT, GPTConfig, load_checkpoint
    model, chars, info = load_checkpoint("pretrained_gpt_last.pt")
    logits = model(idx)    # (B, T) ids, model.config.mask_id where masked -> (B, T, vocab_size)

A GPT becomes the mask predictor of a diffusion language model when its causal mask is removed:
every position sees every other, so a token can be predicted from both sides. There is no time
embedding: given the visible tokens, the best prediction of a masked one does not depend on the time
(RADD, arXiv 2406.03736, theorem 1).
"""

import io
import math
import os
import re
import timeit
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import check, regular_file, write_atomically


@dataclass
class GPTConfig:
    block_size: int = 256   # longest sequence, in tokens: characters or word pieces
    vocab_size: int = 66    # the tokens and, as the last id, [MASK]
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    dropout: float = 0.0
    bias: bool = False      # biases in Linears and LayerNorms, as in GPT-2
    rope: bool = True       # rotary positions; False: GPT-2's learned ones, which are slow to learn
    qk_norm: bool = True    # queries and keys of unit mean square: learns in half the iterations
    causal: bool = False    # True: the autoregressive twin, which sees only what is to the left

    def __post_init__(self):
        for f in fields(self):  # a checkpoint may come from anywhere
            value = getattr(self, f.name)
            check(type(value) is f.type or f.type is float and type(value) is int,
                  f"{f.name} must be of type {f.type.__name__}, not {value!r}")
            check(f.type is not int or 1 <= value <= 2**16,
                  f"{f.name} must be in 1 to {2**16}, not {value}")
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), not {self.dropout}")
        check(self.n_embd % self.n_head == 0,
              f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        head_dim = self.n_embd // self.n_head
        check(not self.rope or head_dim % 2 == 0,
              f"rotary positions need heads of even width, not {head_dim}")

    @property
    def mask_id(self):
        return self.vocab_size - 1


def rotate(x, cos, sin):
    """Rotary positions (RoFormer, arXiv 2104.09864, eq. 34): turn each pair of features by an angle
    that grows with the position, so that the product of a query and a key depends on their
    distance. x (B, T, heads, head_dim); cos, sin (T, 1, head_dim/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qk_norm, self.causal = config.qk_norm, config.causal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cos, sin, cache=None, start=0):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head)
        qk, v = qkv.split([2 * self.n_head, self.n_head], dim=2)
        if self.qk_norm:  # attention can't saturate (arXiv 2010.04245, 2302.05442)
            qk = F.rms_norm(qk, qk.shape[-1:])
        if cos is not None:
            qk = rotate(qk, cos.to(qk.dtype), sin.to(qk.dtype))
        q, k = qk.chunk(2, dim=2)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))     # each (B, n_head, T, head_dim)
        if cache is not None:                                # (2, B, n_head, S, head_dim)
            cache[..., start:start + T, :] = torch.stack([k, v])
            k, v = cache[..., :start + T, :]
        # is_causal=False is the one change that makes a GPT a mask predictor. (T > 1: with a cache,
        # a single new position sees all that is in it.)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x))                             # (B, T, 4 * n_embd)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cos, sin, cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        cos = sin = None
        if config.rope:
            head_dim = config.n_embd // config.n_head
            freqs = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)           # (head_dim/2,)
            angles = torch.outer(torch.arange(config.block_size).float(), freqs)[:, None]
            cos, sin = angles.cos(), angles.sin()            # each (block_size, 1, head_dim/2)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: 2 * n_layer add to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def make_cache(self, B, S):
        """Room for the twin's keys and values: B sequences of S positions,
        (n_layer, 2, B, n_head, S, head_dim)."""
        c = self.config
        return self.wte.weight.new_zeros(c.n_layer, 2, B, c.n_head, S, c.n_embd // c.n_head)

    def forward(self, idx, cache=None, start=0):
        """idx (B, T) long, [MASK] where a token is to be predicted -> (B, T, vocab_size).
        The last logit, [MASK]'s own, is never an answer: use logits[..., :mask_id].
        ValueError if the sequence is longer than block_size.

        With a cache from make_cache (causal models only), idx holds the positions from start on and
        the cache those before them. Begin with the prompt (start=0), then one at a time."""
        end = start + idx.shape[1]
        check(end <= self.config.block_size,
              f"a sequence of {end} is longer than the model's block_size={self.config.block_size}")
        x = self.wte(idx)                                    # (B, T, n_embd)
        cos = sin = None
        if self.wpe is None:
            cos, sin = self.cos[start:end], self.sin[start:end]
        else:
            x = x + self.wpe.weight[start:end]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            x = block(x, cos, sin, None if cache is None else cache[i], start)
        return F.linear(self.ln_f(x), self.wte.weight)       # tied head: (B, T, vocab_size)


# -----------------------------------------------------------------------------
# the checkpoint file

def resolve_path(name):
    """The file that a user means by X: exactly X, with .pt added if it has no suffix."""
    path = Path(os.path.expanduser(name))
    check(path.name, f"{str(name)!r} is not the name of a checkpoint file")
    return path if path.suffix else path.with_name(path.name + ".pt")


def write_file(path, content):
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def save_checkpoint(path, model, chars, **info):
    """One self-contained file: weights (in the model's dtype), config, vocabulary (chars[i] is the
    token of id i, a character or a word piece) and info, how the model was made (numbers, strings,
    lists, dicts). Atomic."""
    checkpoint = {
        "config": asdict(model.config),
        "chars": list(chars),
        "model": {name: p.detach().cpu() for name, p in model.state_dict().items()},
        "info": {**info, "torch_version": str(torch.__version__)},
    }
    write_file(path, checkpoint)


def read_file(path):
    """-> what torch.save wrote to path, on the CPU. Never runs code from the file. OSError if it
    can't be opened, ValueError if it is damaged: every part must fit its checksum."""
    regular_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about foreign files
        try:
            with zipfile.ZipFile(path) as z:  # torch.save does not compress: no small file is huge
                stored = all(part.compress_type == zipfile.ZIP_STORED for part in z.infolist())
                check(stored and z.testzip() is None, "a checksum does not fit")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # any bytes may stand in the file: torch.load fails in many ways
            raise ValueError(f"{path} is not a checkpoint, or is damaged or cut short "
                             f"({type(e).__name__})") from e


def load_checkpoint(path, device="cpu"):
    """-> (model in float32 and eval mode, chars, info). Never runs code from the file. OSError if
    it can't be opened, ValueError for all but a whole checkpoint with finite weights."""
    checkpoint = read_file(path)
    try:
        check(isinstance(checkpoint, dict), "it is no dict")
        # a checkpoint of before qk_norm goes without it
        config = GPTConfig(**{"qk_norm": False, **checkpoint["config"]})
        chars, weights, info = checkpoint["chars"], checkpoint["model"], dict(checkpoint["info"])
        check(isinstance(chars, list) and all(isinstance(c, str) and c for c in chars)
              and len(chars) == len(set(chars)) == config.mask_id,
              "its vocabulary does not fit its config")
        check(config.n_layer <= len(weights), "it holds too few weights")
        with torch.device("meta"):  # no memory is taken before the shapes are compared
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
        model = GPT(config)
        model.load_state_dict(weights)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} is not a checkpoint of this model: {reason}") from e
    check(all(p.isfinite().all() for p in model.parameters()),
          f"{path} holds weights that are not finite")
    return model.to(device).eval(), chars, info


# -----------------------------------------------------------------------------
# the device and dtype it runs on

def pick_device(name="auto"):
    """auto | cpu | cuda | cuda:N | mps -> (torch.device, why). ValueError if it does not work."""
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
    if device.type == "cuda":  # cuDNN's attention plans anew, for long, for every new length
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device, torch.cuda.get_device_name(device) if device.type == "cuda" else "as asked"


def pick_dtype(name, device):
    """auto | float32 | bfloat16 | float16 -> (torch.dtype to compute in, why)."""
    check(name in ("auto", "float32", "bfloat16", "float16"),
          f"--dtype={name} is not one of auto, float32, bfloat16, float16")
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16, "the GPU computes in it"
        return torch.float16, "the GPU has no bfloat16"
    if device.type == "mps":
        return torch.float32, "the safe choice on mps"

    def seconds(dtype):
        a = torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=4))

    # some CPUs have bfloat16 units and train about twice as fast with them; others emulate them
    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    why = f"a bfloat16 matrix product takes {ratio:.2f}x the time of a float32 one on this CPU"
    return (torch.bfloat16 if ratio < 1 / 1.5 else torch.float32), why
