"""
The network: a GPT-2 with bidirectional attention.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=66))
    logits = model(idx)    # idx (B, T): token ids, and config.mask_id where a token is masked

Read this file first, then diffusion.py. A GPT becomes the mask predictor of a diffusion language
model when its causal mask is removed: every position then sees every other position, so a token can
be predicted from both sides. The network is not told how much is masked (the time t of
diffusion.py): given the visible tokens, the best prediction of a masked one does not depend on it
(RADD, arXiv 2406.03736, theorem 1).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


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
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not 1 <= getattr(self, name) <= 2**16:
                raise ValueError(f"{name} must be in 1 to {2**16}, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.rope and self.n_embd // self.n_head % 2:
            raise ValueError("rotary positions need heads of even width: n_embd / n_head is "
                             f"{self.n_embd // self.n_head}")

    @property
    def mask_id(self):
        return self.vocab_size - 1


def rotary_angles(config):
    """Return the cosines and sines of the rotation angles, each (block_size, 1, head_dim / 2), on
    the CPU."""
    head_dim = config.n_embd // config.n_head
    freqs = 10000.0 ** -(torch.arange(0, head_dim, 2, device="cpu") / head_dim)
    positions = torch.arange(config.block_size, device="cpu").float()
    angles = torch.outer(positions, freqs)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Apply rotary positions (RoFormer, arXiv 2104.09864, eq. 34): turn each pair of features by an
    angle that grows with the position, so that the product of a query and a key depends on their
    distance. x (B, T, n_head, head_dim); cos and sin (T, 1, head_dim / 2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qk_norm, self.causal = config.qk_norm, config.causal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (z.view(B, T, self.n_head, -1) for z in (q, k, v))  # (B, T, n_head, head_dim)
        if self.qk_norm:  # attention can't saturate (arXiv 2010.04245, 2302.05442)
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v):
        """Return softmax(q k^T / sqrt(head_dim)) v; all are (B, n_head, T, head_dim)."""
        # is_causal=False is the one change that makes a GPT a mask predictor
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal,
                                              dropout_p=self.dropout if self.training else 0.0)


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

    def forward(self, x, cos, sin):
        x = x + self.attn(self.ln_1(x), cos, sin)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        cos, sin = rotary_angles(config) if config.rope else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2: 2 * n_layer of them add to the residual
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx):
        """Return the logits (B, T, vocab_size) for idx (B, T) long, which holds mask_id where a
        token is to be predicted. The last logit, [MASK]'s own, is never an answer: use
        logits[..., :mask_id]. ValueError if the sequence is longer than block_size."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's "
                             f"block_size={self.config.block_size}")
        x = self.wte(idx)                                    # (B, T, n_embd)
        cos = sin = None
        if self.wpe is None:
            cos, sin = self.cos[:T], self.sin[:T]
        else:
            x = x + self.wpe.weight[:T]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, cos, sin)
        return F.linear(self.ln_f(x), self.wte.weight)       # tied head: (B, T, vocab_size)
