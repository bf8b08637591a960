"""
The algorithm: how text is masked, what the model learns from it, and how text is written.

    forward_process    mask a random share of the text                    (training)
    diffusion_loss     learn to predict what is masked                    (training)
    estimate_nelbo     measure the bound on the likelihood                (evaluation)
    unmask             start from masks, write a few tokens at a time     (sampling)
    writing_order      decide which tokens are written first              (sampling)

A model is any callable that maps (B, T) token ids to (B, T, vocab_size) logits. The id of [MASK],
mask_id, is the last in the vocabulary. This file needs only PyTorch, so it can be copied into
another project.

Names follow LLaDA (arXiv 2502.09992). input_ids are clean tokens x_0, and noisy_batch is x_t: the
same tokens, masked at masked_indices. In the sampler, x0 are the model's predictions and x0_p their
probabilities (at temperature 1). transfer_index marks the places that a step writes, and
num_transfer_tokens is how many. LLaDA predicts all masks, and masks the rest again; here the rest
remains masked. Hence "remasking" for the order of writing.
"""

import math

import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# training

def forward_process(input_ids, mask_id, eps=1e-3, generator=None, p_max=1.0):
    """Mask each token independently with probability p_mask (LLaDA, arXiv 2502.09992, sec. 2.1).
    Each row has a time t, uniform on [0, 1], and p_mask grows linearly from eps at t = 0 to p_max
    at t = 1. [0, 1] is cut into B equal parts, and each part gets one of the times, so that every
    batch has lightly and heavily masked rows (MDLM, arXiv 2406.07524). p_max is below 1 for
    puzzles, which can't be solved from nothing.

    input_ids (B, T): clean tokens on the CPU; generator: a torch.Generator on the CPU. Returns
    noisy_batch, masked_indices (bool) and p_mask, each (B, T).

    For another increasing p(t) > 0, mask with p(t), but return p(t) / p'(t) as the third value,
    where p' is the derivative: the loss divides by it, so that each token has the weight
    p'(t) / p(t). (Here p' is a constant, so p(t) alone is returned.)"""
    B, T = input_ids.shape
    t = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B   # (B,)
    p_mask = ((p_max - eps) * t + eps)[:, None].expand(B, T)
    masked_indices = torch.rand(B, T, generator=generator) < p_mask
    noisy_batch = torch.where(masked_indices, mask_id, input_ids)
    return noisy_batch, masked_indices, p_mask


def diffusion_loss(model, mask_id, input_ids, noisy_batch, masked_indices, p_mask):
    """Return the loss per token (LLaDA, arXiv 2502.09992, eq. 3), a scalar in nats: the cross-
    entropy of each masked token divided by its p_mask, summed, and divided by B * T. All tensors
    are (B, T).

    If p_mask covers all of [0, 1] (eps = 0, p_max = 1), the expected loss is the negative evidence
    lower bound (NELBO), an upper bound on -log p(x_0) per token. Otherwise masking rates below eps
    and above p_max are left out."""
    losses = token_losses(model, mask_id, input_ids, noisy_batch)
    return (losses * masked_indices / p_mask).sum() / input_ids.numel()


def token_losses(model, mask_id, input_ids, noisy_batch):
    """Return the cross-entropy in nats of each of the input_ids (B, T) when the model reads
    noisy_batch (B, T). [MASK] is never an answer, so its logit, the last one, is cut off."""
    logits = model(noisy_batch)[..., :mask_id].float()                    # (B, T, mask_id)
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none")
    return losses.view(input_ids.shape)


# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def estimate_nelbo(model, windows, mask_id, passes=8, batch_size=64, seed=0, prompt_length=0):
    """Estimate the NELBO with less noise than diffusion_loss (LLaDA, arXiv 2502.09992, eq. 14;
    RADD, arXiv 2406.03736): mask exactly n of the L tokens of a window, where n is uniform on 1..L,
    and average the cross-entropy of these n tokens. With n / L in the place of p_mask, the
    expectation is the same bound. Within a pass, the values of n are spread evenly over 1..L. The
    same seed gives every model the same masks.

    windows (W, L): token ids, on the model's device; passes: at least 2, each over all windows;
    prompt_length: the first tokens of each window, which are always visible and do not count.
    Returns the mean of the passes and its standard error over the passes, in nats per token."""
    W, L = len(windows), windows.shape[1] - prompt_length
    g = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(passes):
        u = (torch.randperm(W, generator=g) + torch.rand(W, generator=g, dtype=torch.float64)) / W
        n = (u * L).long() + 1                                            # (W,), in 1..L
        total = 0.0
        for w in torch.arange(W).split(batch_size):
            input_ids = windows[w]                                        # (B, L)
            rank = torch.rand(len(w), L, generator=g).argsort(dim=1).argsort(dim=1)  # random
            masked_indices = F.pad(rank < n[w, None], (prompt_length, 0))  # n in each row
            noisy_batch = torch.where(masked_indices.to(windows.device), mask_id, input_ids)
            losses = token_losses(model, mask_id, input_ids, noisy_batch).cpu()
            total += ((losses * masked_indices).sum(dim=1).double() / n[w]).sum().item()
        means.append(total / W)
    means = torch.tensor(means, dtype=torch.float64)
    return means.mean().item(), means.std().item() / math.sqrt(passes)


# -----------------------------------------------------------------------------
# sampling

@torch.no_grad()
def unmask(model, x, mask_id, steps, temperature=1.0, remasking="random", revise=0.0, threshold=1.0,
           generator=None):
    """The reverse process (LLaDA, arXiv 2502.09992, algorithms 4 and 5): predict every masked
    token, write some of the predictions, leave the rest masked, repeat. An iterator that yields
    the new state x (B, T) after every change; the last one has no masks.

    x (B, T) long: mask_id wherever a token is wanted. All other tokens are given, and stay as they
    are.
    steps: the number of forward passes, at least 1. Fewer run if no mask is left.
    temperature: 0 takes the likeliest token, 1 draws from the model's distribution.
    remasking: which predictions are written first (see writing_order).
    revise: between 0, which disables it, and 1. The first quarter of the steps writes a draft. Each
    later step masks a share of it again, and rewrites that share at once. The share is revise at
    first, and then decreases linearly. What was improbable when it was written is masked more often
    (after ReMDM, arXiv 2503.00307).
    threshold: a step also writes all predictions whose probability exceeds this (after Fast-dLLM,
    arXiv 2505.22618). 1 disables it.
    generator: a torch.Generator on x's device."""
    n_masks = (x == mask_id).sum(dim=1, keepdim=True)                     # (B, 1)
    noise = torch.rand(x.shape, dtype=torch.float64, generator=generator, device=x.device)
    p_written = torch.full_like(noise, torch.inf)                         # given tokens keep inf
    draft_steps = math.ceil(steps / 4) if revise else steps
    for step in range(steps):
        num_transfer_tokens = n_masks // draft_steps + (step < n_masks % draft_steps)
        if step >= draft_steps:  # the draft is complete: mask this many again, then rewrite them
            num_transfer_tokens = (revise * (steps - step) / (steps - draft_steps) * n_masks).ceil()
            doubt = -(p_written.log() + gumbel(p_written, generator))     # keep by weight p_written
            x = torch.where(highest(doubt, num_transfer_tokens), mask_id, x)
            yield x
        masked = x == mask_id                                             # (B, T)
        if not masked.any():
            continue  # all are written early; a later step may mask again
        logits = model(x)[..., :mask_id].double()                         # (B, T, mask_id)
        x0 = (logits + temperature * gumbel(logits, generator)).argmax(dim=-1)    # (B, T)
        p = logits.softmax(dim=-1)
        x0_p = p.gather(-1, x0[..., None])[..., 0]                        # (B, T)
        confidence = writing_order(remasking, p, x0_p, noise).where(masked, -torch.inf)
        transfer_index = masked & (highest(confidence, num_transfer_tokens) | (x0_p > threshold))
        x = torch.where(transfer_index, x0, x)
        p_written = torch.where(transfer_index, x0_p, p_written)
        yield x


def writing_order(remasking, p, x0_p, noise):
    """Return the confidence (B, T) of each place: the highest are written first. For a new order,
    add a case here, and its name to the message.

    p (B, T, mask_id): the model's probabilities of all tokens (no case here needs them, but a new
    one may); x0_p (B, T): the probability of the token that would be written; noise (B, T): random
    numbers, uniform on [0, 1], that stay the same for the whole run."""
    if remasking == "random":
        return noise
    if remasking == "low_confidence":  # LLaDA's: tokens of low confidence stay masked
        return x0_p
    if remasking == "dilated":  # after DUS (arXiv 2506.19037): places of a step are far apart. If
        # two multiples of the golden ratio are close modulo 1, their indices are distant
        multiples = torch.arange(noise.shape[1], device=noise.device) * ((math.sqrt(5) - 1) / 2)
        return (multiples + noise[:, :1]) % 1
    raise ValueError(f"remasking must be random, dilated or low_confidence, not {remasking}")


def gumbel(like, generator):
    """Draw standard Gumbel noise with the shape of like. The argmax of logits + temperature * noise
    is a sample of softmax(logits / temperature). Likewise, the k highest of log p + noise are k
    draws without replacement, with weights p. It is float64: in float32 the rare large values would
    be missing, which acts like a lower temperature (arXiv 2409.02908)."""
    u = torch.rand(like.shape, dtype=torch.float64, generator=generator, device=like.device)
    return -torch.log(-torch.log(u.clamp_min(1e-300)))


def highest(score, count):
    """Return (B, T) bool: True at the count (B, 1) highest values in each row of score (B, T)."""
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)  # 0 for the highest, 1 for the next
    return rank < count
