"""
Two options of LLaDA's sampler (arXiv 2502.09992): blocks, which wrap unmask, and guidance, which
wraps the model.
"""

import math

import torch

from diffusion import unmask


def unmask_blocks(model, x, mask_id, steps, block_length, **settings):
    """Unmask the first block_length masks of each row of x (B, T), then the next ones, and so on.
    Each block is written by unmask, which takes the masks of later blocks for given tokens. The
    steps are divided evenly among the blocks; with fewer steps than blocks, the blocks are longer.
    An iterator of states like unmask; settings are those of unmask."""
    place = (x == mask_id).cumsum(dim=1).where(x == mask_id, 0)    # (B, T): 1, 2, ... at the masks
    longest = int(place.max())
    block_length = max(block_length, math.ceil(longest / steps))
    n_blocks = math.ceil(longest / block_length)

    def sees_masks(idx):
        return model(idx.where(idx >= 0, mask_id))

    for i in range(n_blocks):
        later = place > block_length * (i + 1)                            # (B, T)
        block_steps = steps * (i + 1) // n_blocks - steps * i // n_blocks
        for state in unmask(sees_masks, x.where(~later, -1), mask_id, block_steps, **settings):
            x = state.where(~later, mask_id)
            yield x


def guided(model, given, mask_id, cfg_scale):
    """Return a model with classifier-free guidance (LLaDA, eq. 16): its logits are moved away from
    those that model has when the given tokens, (B, T) bool, are masked as well."""
    def guided_model(idx):
        both = model(torch.cat([idx, idx.where(~given, mask_id)])).double()
        with_given, without = both.chunk(2)
        logits = without + (cfg_scale + 1) * (with_given - without)
        return logits.where(with_given.isfinite(), with_given)            # -inf - -inf is NaN
    return guided_model
