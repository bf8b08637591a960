"""
The twin: an autoregressive GPT, the same network with a causal mask, to compare with. It reads
[MASK] + x[:-1] and predicts x, so that the first token is predicted, too.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import gumbel, token_losses
from lib.common import check


def next_token_losses(model, mask_id, input_ids):
    """Return -log p of each token of input_ids (B, T) given those before it, (B, T) nats."""
    shifted = F.pad(input_ids[:, :-1], (1, 0), value=mask_id)
    return token_losses(model, mask_id, input_ids, shifted)


def autoregressive_loss(model, mask_id, input_ids, *_):
    """Return the exact negative log-likelihood per token of input_ids (B, T), a scalar in nats. It
    takes the arguments of diffusion_loss, and needs no masks."""
    return next_token_losses(model, mask_id, input_ids).mean()


@torch.no_grad()
def estimate_nll(model, windows, mask_id, batch_size=64, prompt_length=0):
    """The twin's counterpart of estimate_nelbo: the mean over windows (W, L) of the exact negative
    log-likelihood, in nats per token, and its standard error (infinite for a single window)."""
    losses = torch.cat([next_token_losses(model, mask_id, part).cpu()
                        for part in windows.split(batch_size)])           # (W, L)
    nll = losses[:, prompt_length:].mean(dim=1).double()                  # (W,)
    se = nll.std().item() / math.sqrt(len(nll)) if len(nll) > 1 else math.inf
    return nll.mean().item(), se


@torch.no_grad()
def left_to_right(model, x, mask_id, temperature=1.0, generator=None):
    """The twin's counterpart of unmask: one token per forward pass, each given those to its left.
    x (B, T) long holds a prompt, equally long in each row, and then mask_id. An iterator that
    yields a new (B, T) state after every pass."""
    model, done = Cached(model, *x.shape), 0
    for i in range(int((x[0] != mask_id).sum()), x.shape[1]):
        shifted = F.pad(x, (1, 0), value=mask_id)             # shifted[:, i] predicts token i
        logits = model(shifted[:, done:i + 1])[:, -1, :mask_id].double()
        x, done = x.clone(), i + 1
        x[:, i] = (logits + temperature * gumbel(logits, generator)).argmax(dim=-1)
        yield x


class Cached:
    """A causal GPT that keeps the keys and values of the positions that it has read. Each call
    continues the sequences: idx (B, T) holds the next T tokens, and the result (B, T, vocab_size)
    is what the GPT would say of them after all tokens so far. First the prompt, then one token at a
    time."""

    def __init__(self, model, B, S):
        """B sequences of at most S tokens."""
        check(S <= model.config.block_size, f"a sequence of {S} tokens is longer than the model's "
                                            f"block_size={model.config.block_size}")
        self.model, self.start = model, 0
        # a copy that shares the weights; only the functions that attend are its own
        self.copy = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        head_dim = model.config.n_embd // model.config.n_head
        for block in self.copy.h:
            shape = (2, B, model.config.n_head, S, head_dim)
            block.attn.attend = self.with_cache(model.wte.weight.new_empty(shape))

    def with_cache(self, cache):
        def attend(q, k, v):
            end = self.start + k.shape[2]
            cache[0, :, :, self.start:end], cache[1, :, :, self.start:end] = k, v
            return F.scaled_dot_product_attention(q, *cache[..., :end, :], is_causal=k.shape[2] > 1)
        return attend

    def __call__(self, idx):
        if self.model.wpe is None:
            self.copy.cos, self.copy.sin = self.model.cos[self.start:], self.model.sin[self.start:]
        else:
            self.copy.wpe = nn.Embedding.from_pretrained(self.model.wpe.weight[self.start:])
        home = self.model.wte.weight.device
        logits = self.copy(idx.to(home)).to(idx.device)
        self.start += idx.shape[1]
        return logits
