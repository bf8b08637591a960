"""
How likely is a given text? Exactly, when it is written from left to right, and on average over all
orders of writing.
"""

import torch

from diffusion import estimate_nelbo, exact_nll, next_token_losses
from lib.common import check
from lib.tokenizer import encode


@torch.no_grad()
def score(model, vocab, text, passes=64):
    """Return a line that says how likely text is, in nats per character: for a mask predictor the
    exact value from left to right and the bound (NELBO), for a twin its exact value. A text that
    is longer than the model's block is cut into windows."""
    check(text, "--score has no text")
    model.float()
    ids = torch.from_numpy(encode(text, vocab).astype("int64")).to(model.wte.weight.device)
    mask_id, exact, bound = model.config.mask_id, 0.0, 0.0
    full = len(ids) // model.config.block_size * model.config.block_size
    for part, length in ((ids[:full], model.config.block_size), (ids[full:], len(ids) - full)):
        for windows in part.view(-1, length).split(64) if len(part) else []:
            if model.config.causal:
                exact += next_token_losses(model, mask_id, windows).sum().item()
            else:
                nll = exact_nll(model, windows, mask_id, steps=length, block_length=1)
                exact += length * nll.sum().item()
                bound += windows.numel() * estimate_nelbo(model, windows, mask_id, passes)[0]
    exact, bound = exact / len(text), bound / len(text)
    if model.config.causal:
        return f"{exact:.4f} nats per character, exact"
    return f"{exact:.4f} nats per character, exact, from left to right; at most {bound:.4f} " \
           "averaged over all orders of writing (NELBO)"
