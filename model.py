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
    """Return the cosines and sines of the rotation angles, each (block_size, 1, head_dim / 2)."""
    head_dim = config.n_embd // config.n_head
    # load_checkpoint builds the model on the meta device, which holds no values; these are in no
    # checkpoint, so they are made on the CPU in any case
    freqs = 10000.0 ** -(torch.arange(0, head_dim, 2, device="cpu") / head_dim)
    positions = torch.arange(config.block_size, device="cpu").float()
    angles = torch.outer(positions, freqs)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Apply rotary positions (RoFormer, arXiv 2104.09864, eq. 34): turn each pair of features by an
    angle that grows with the position, so that the product of a query and a key depends on their
    distance. x (B, T, heads, head_dim); cos and sin (T, 1, head_dim / 2)."""
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
        # is_causal=False is the one change that makes a GPT a mask predictor. (With the twin's
        # cache, a single new position, T = 1, may see everything.)
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

    def make_cache(self, B, S):
        """Return room for the twin's keys and values, for B sequences of S positions:
        (n_layer, 2, B, n_head, S, head_dim)."""
        c = self.config
        return self.wte.weight.new_zeros(c.n_layer, 2, B, c.n_head, S, c.n_embd // c.n_head)

    def forward(self, idx, cache=None, start=0):
        """Return the logits (B, T, vocab_size) for idx (B, T) long, which holds mask_id where a
        token is to be predicted. The last logit, [MASK]'s own, is never an answer: use
        logits[..., :mask_id]. ValueError if the sequence is longer than block_size.

        cache, for causal models only, comes from make_cache: idx then holds the positions from
        start on, and the cache those before. Begin with the prompt (start=0), then pass one
        position at a time."""
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"a sequence of {end} tokens is longer than the model's "
                             f"block_size={self.config.block_size}")
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
