"""
Pages longer than the model's block are written in windows, one after the other.
"""

import torch
import torch.nn.functional as F

from diffusion import predict, sample


def page_windows(masked, block_size):
    """Plan how to write a page of any length: a window slides along, with up to half of it before
    the first mask, and what is written in one window is context for the next. Where text follows a
    window, its last quarter is left to the next one, so that every mask is written with context on
    both sides. masked (T,) bool. Returns a list of (start, end, keep, n_masks): fill the n_masks
    masks between start and end; positions before keep are final."""
    masked, windows = masked.clone(), []
    while masked.any():
        start = max(0, min(int(masked.int().argmax()) - block_size // 2, len(masked) - block_size))
        end = min(start + block_size, len(masked))
        keep = end if masked[end:].all() else end - block_size // 4
        windows.append((start, end, keep, int(masked[start:end].sum())))
        masked[start:keep] = False
    return windows


def share_steps(windows, steps, enough):
    """Return the forward passes of each window: one per mask, but no more than enough. If steps is
    given, the windows share that many in the same proportions, with at least one each."""
    wanted = [min(n_masks, enough) for *_, n_masks in windows]
    if steps is None or not wanted:
        return wanted
    ends = [steps * sum(wanted[:i]) // sum(wanted) for i in range(len(wanted) + 1)]
    return [max(1, end - begin) for begin, end in zip(ends, ends[1:])]


def generate_pages(fill, x, mask_id, windows, steps):
    """Write one window after the other. fill(window, steps) is an iterator of states, such as
    unmask; x (B, T) long, masked at the same places in each row; windows come from page_windows,
    steps from share_steps. Yields (B, T) states."""
    page = x
    for (start, end, keep, _), window_steps in zip(windows, steps):
        for state in fill(x[:, start:end], window_steps):
            x = torch.cat([x[:, :start], state, x[:, end:]], dim=1)
            yield x
        if (page[:, keep:end] == mask_id).any():
            x = torch.cat([x[:, :keep], page[:, keep:]], dim=1)
            yield x


def begin_word(model, x, vocab, temperature, generator):
    """Write the first token after the prompt in each row of x (B, T): one that begins with a
    space, since the prompt ended in one. In training, the space belongs to the word after it."""
    mask_id, place = model.config.mask_id, int((x[0] == model.config.mask_id).int().argmax())
    start = max(0, place - model.config.block_size // 2)
    window = x[:, start:start + model.config.block_size]
    if model.config.causal:
        window = F.pad(window, (1, 0), value=mask_id)[:, :place - start + 1]
    logits = predict(model, window.to(model.wte.weight.device), mask_id)[:, place - start]
    word = torch.tensor([token.startswith(" ") for token in vocab], device=x.device)
    x[:, place] = sample(logits.to(x.device).where(word, -torch.inf), temperature, generator)
    return x
