"""
The algorithm: how text is masked, what is learned from it, and how text is written.

    forward_process    mask a random share of the text                        (training)
    diffusion_loss     learn to predict what is masked                        (training)
    estimate_nelbo     measure the bound on the likelihood                    (evaluation)
    exact_nll          the exact likelihood when text is written in one order (evaluation)
    unmask             start from masks, write a few tokens at a time         (sampling)

A model is any callable that maps (B, T) token ids to (B, T, vocab_size) logits. The id of [MASK],
mask_id, is the last of the vocabulary. The file needs PyTorch alone, so it can be copied into
another project. The last section is for the twin, an autoregressive GPT to compare with.

The names are those of LLaDA (arXiv 2502.09992): input_ids are clean tokens, noisy_batch has some of
them masked, at masked_indices; x0 are predictions, x0_p their probabilities; remasking is the order
of writing (what is not written stays masked); transfer_index are the places written in a step, and
num_transfer_tokens is how many.
"""

import math

import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# training: the forward process and the loss

def forward_process(input_ids, mask_id, eps=1e-3, generator=None, p_max=1.0):
    """Mask every token independently with probability p_mask, which grows from eps at time t = 0 to
    p_max at t = 1 (LLaDA, arXiv 2502.09992, sec. 2.1, has p_max = 1). The t of each row is uniform
    on [0, 1]. The B times of a batch are stratified, one in each of B equal parts of [0, 1], so
    that every batch covers all amounts of masking (MDLM, arXiv 2406.07524).

    input_ids (B, T): clean tokens x_0 on the CPU; generator: a torch.Generator on the CPU.
    Returns noisy_batch x_t, masked_indices (bool) and p_mask, each (B, T). The loss divides by the
    third value, whose reciprocal is the weight: p'(t) / p(t) up to a constant factor, which is
    1 / p_mask here. For another schedule p(t) > 0, mask with it, and return p(t) / p'(t)."""
    B, T = input_ids.shape
    t = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    p_mask = ((p_max - eps) * t + eps)[:, None].expand(B, T)
    masked_indices = torch.rand(B, T, generator=generator) < p_mask
    noisy_batch = torch.where(masked_indices, mask_id, input_ids)
    return noisy_batch, masked_indices, p_mask


def token_losses(model, idx, targets, mask_id):
    """Return the cross-entropy of every target (B, T), in nats, when the model reads idx (B, T).
    [MASK] is never an answer, so its logit is cut off."""
    logits = model(idx)[..., :mask_id].float()               # (B, T, mask_id)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def diffusion_loss(model, mask_id, input_ids, noisy_batch, masked_indices, p_mask):
    """Return the loss (LLaDA, arXiv 2502.09992, eq. 3) per token, a scalar in nats: the
    cross-entropy of the masked tokens, each divided by p_mask, summed and divided by B * T. With
    eps = 0 and p_max = 1, its expectation is an upper bound on -log p(x_0); otherwise it covers
    only the shares of masks between eps and p_max. All tensors are (B, T)."""
    losses = token_losses(model, noisy_batch, input_ids, mask_id)
    return (losses * masked_indices / p_mask).sum() / input_ids.numel()


# -----------------------------------------------------------------------------
# evaluation: the bound, and the exact likelihood of an order of writing

@torch.no_grad()
def estimate_nelbo(model, windows, mask_id, passes=8, batch_size=64, seed=0):
    """Estimate the negative evidence lower bound (NELBO) with a small variance (LLaDA,
    arXiv 2502.09992, eq. 14; RADD, arXiv 2406.03736): mask exactly n of a window's L tokens, n
    uniform on 1..L, and take the mean cross-entropy of those n tokens. In each pass, the n of the
    windows are spread evenly over 1..L. The same seed gives every model the same masks.

    windows (W, L): token ids, on the model's device; passes: at least 2. Returns the mean over
    the passes and its standard error, in nats per token."""
    W, L = windows.shape
    g = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(passes):
        u = (torch.randperm(W, generator=g) + torch.rand(W, generator=g, dtype=torch.float64)) / W
        n = (u * L).long() + 1                                                     # (W,) in 1..L
        total = 0.0
        for w in torch.arange(W).split(batch_size):
            input_ids = windows[w]                                                 # (B, L)
            rank = torch.rand(len(w), L, generator=g).argsort(dim=1).argsort(dim=1)
            masked_indices = rank < n[w, None]                                     # n in each row
            noisy_batch = torch.where(masked_indices.to(windows.device), mask_id, input_ids)
            losses = token_losses(model, noisy_batch, input_ids, mask_id).cpu()
            total += ((losses * masked_indices).sum(dim=1).double() / n[w]).sum().item()
        means.append(total / W)
    means = torch.tensor(means, dtype=torch.float64)
    return means.mean().item(), means.std().item() / math.sqrt(passes)


@torch.no_grad()
def exact_nll(model, input_ids, mask_id, steps, remasking="low_confidence", block_length=None,
              generator=None):
    """Return -log of the probability that unmask, at temperature 1 and with these settings, writes
    each row of input_ids (B, T), as (B,) nats per token (DUEL, arXiv 2603.01367): start from masks,
    choose the places to write as unmask would, add up -log p of the true tokens there, reveal them,
    repeat.

    The value is exact if the order depends on nothing but the visible tokens: with
    block_length=1 (left to right) and with low_confidence, which goes by the probability of the
    likeliest token here. (unmask goes by the probability of the token that it drew, as LLaDA does;
    at temperature 0 both are the same.) Where the order has a random part (random; the offset of
    dilated), the expectation is an upper bound. steps, remasking and block_length are those of
    unmask; with fewer steps than tokens, tokens of one step are predicted independently."""
    x = torch.full_like(input_ids, mask_id)
    nll = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    noise = uniform(x.shape, generator, x.device)
    block = torch.arange(x.shape[1], device=x.device) // (block_length or x.shape[1])
    for _, num_transfer_tokens in schedule(x == mask_id, steps, block_length, revise=0):
        masked = x == mask_id
        p = predict(model, x, mask_id).softmax(dim=-1)                    # (B, T, mask_id)
        confidence = writing_order(remasking, p, p.amax(dim=-1), noise)
        transfer_index = choose_places(confidence, masked, block, num_transfer_tokens)
        p_true = p.gather(-1, input_ids[..., None])[..., 0]               # (B, T)
        nll -= p_true.log().where(transfer_index, 0).sum(dim=1)
        x = torch.where(transfer_index, input_ids, x)
    return nll / x.shape[1]


# -----------------------------------------------------------------------------
# sampling: the reverse process

@torch.no_grad()
def unmask(model, x, mask_id, steps, temperature=1.0, remasking="random", block_length=None,
           cfg_scale=0.0, revise=0.0, generator=None, threshold=None):
    """The reverse process (LLaDA, arXiv 2502.09992, algorithms 4 and 5): predict every masked
    token, keep some of the predictions, leave the rest masked, repeat. An iterator that yields a
    new (B, T) state whenever tokens were written or masked again. No mask is left at the end.

    x (B, T) long: mask_id wherever text is wanted (after a prompt, in the middle of a sentence,
    everywhere). Nothing else is changed.
    steps: forward passes; fewer are made if there is nothing left to write.
    temperature: 0 takes the likeliest token, 1 samples from the model.
    remasking: which predictions a step keeps: random, dilated or low_confidence (writing_order).
    block_length: write this many masks, from the left, before the next ones.
    cfg_scale > 0: classifier-free guidance towards the given tokens.
    revise > 0: a quarter of the steps write a draft; each of the others masks a share of the text
    again, first this share, then less and less, and rewrites it (after ReMDM, arXiv 2503.00307).
    generator: a torch.Generator on x's device.
    threshold: keep also every prediction whose probability is above it, in any block (after
    Fast-dLLM, arXiv 2505.22618), so that fewer steps are needed.
    ValueError for arguments that make no sense, or if the model's logits are no distribution."""
    check_arguments(steps, temperature, block_length, cfg_scale, revise, threshold)
    given = x != mask_id                                                  # (B, T)
    noise = uniform(x.shape, generator, x.device)                         # (B, T)
    block = ((~given).cumsum(dim=1) - 1) // (block_length or x.shape[1])  # (B, T): 0, 1, ...
    p_written = torch.full(x.shape, torch.inf, dtype=torch.float64, device=x.device)
    for num_revised, num_transfer_tokens in schedule(~given, steps, block_length, revise):
        if num_revised is not None:
            x = torch.where(choose_revised(p_written, num_revised, generator), mask_id, x)
            yield x
        masked = x == mask_id                                             # (B, T)
        if not masked.any():  # threshold has finished early
            continue
        logits = predict(model, x, mask_id, given, cfg_scale)             # (B, T, mask_id)
        x0 = sample(logits, temperature, generator)                       # (B, T)
        p = logits.softmax(dim=-1)
        x0_p = p.gather(-1, x0[..., None])[..., 0]                        # (B, T)
        confidence = writing_order(remasking, p, x0_p, noise)             # (B, T)
        transfer_index = choose_places(confidence, masked, block, num_transfer_tokens)
        if threshold is not None:
            transfer_index |= masked & (x0_p > threshold)
        x = torch.where(transfer_index, x0, x)
        p_written = torch.where(transfer_index, x0_p, p_written)
        yield x


def check_arguments(steps=1, temperature=1.0, block_length=None, cfg_scale=0.0, revise=0.0,
                    threshold=None):
    for name, value, valid, range_ in (
            ("steps", steps, steps >= 1, "at least 1"),
            ("temperature", temperature, 0 <= temperature < torch.inf, "finite and at least 0"),
            ("block_length", block_length, block_length is None or block_length >= 1, "at least 1"),
            ("cfg_scale", cfg_scale, 0 <= cfg_scale < torch.inf, "finite and at least 0"),
            ("revise", revise, 0 <= revise <= 1, "between 0 and 1"),
            ("threshold", threshold, threshold is None or 0 <= threshold <= 1, "between 0 and 1")):
        if not valid:
            raise ValueError(f"{name} must be {range_}, not {value}")


def predict(model, x, mask_id, given=None, cfg_scale=0.0):
    """Return the model's logits for x (B, T), without that of [MASK]: (B, T, mask_id), float64.
    Guidance moves them away from what the model says when the given tokens are masked as well
    (LLaDA, arXiv 2502.09992, eq. 16)."""
    if cfg_scale:
        both = model(torch.cat([x, x.where(~given, mask_id)]))[..., :mask_id].double()
        with_given, without = both.chunk(2)
        logits = without + (cfg_scale + 1) * (with_given - without)
        logits = torch.where(with_given.isneginf(), with_given, logits)  # -inf - -inf is NaN
    else:
        logits = model(x)[..., :mask_id].double()
    if not logits[x == mask_id].logsumexp(dim=-1).isfinite().all():
        raise ValueError("the model's logits are no distribution: NaN, +inf, or -inf for every "
                         "token")
    return logits


def uniform(shape, generator, device):
    """Draw from (0, 1) in float64. gumbel takes logs of the draws: float32 would lose its rare
    large values, which acts like a lower temperature (arXiv 2409.02908)."""
    draws = torch.rand(shape, dtype=torch.float64, generator=generator, device=device)
    return draws.clamp_min(1e-300)


def gumbel(shape, generator, device):
    """Draw Gumbel noise: the argmax of log p + noise is a sample of p."""
    return -torch.log(-torch.log(uniform(shape, generator, device)))


def sample(logits, temperature, generator):
    """Draw a token for every place from softmax(logits / temperature): (B, T, V) -> (B, T)."""
    if temperature:
        logits = logits + temperature * gumbel(logits.shape, generator, logits.device)
    return logits.argmax(dim=-1)


def writing_order(remasking, p, x0_p, noise):
    """Score every place, (B, T) in [0, 1]: the highest scores are written first. A new order of
    writing is a new case here, and its name a value of remasking.

    p (B, T, V): the model's probabilities; x0_p (B, T): that of the token that would be written;
    noise (B, T): uniform draws, which stay the same for the whole run."""
    if remasking == "random":
        return noise
    if remasking == "dilated":  # after DUS (arXiv 2506.19037): in i times the golden ratio,
        # modulo 1, close scores belong to places that are far apart; noise shifts all of them
        multiples = torch.arange(noise.shape[1], device=noise.device) * ((math.sqrt(5) - 1) / 2)
        return (multiples + noise[:, :1]) % 1
    if remasking == "low_confidence":  # LLaDA's: the tokens of low confidence stay masked
        return x0_p
    raise ValueError(f"remasking must be random, dilated or low_confidence, not {remasking}")


def choose_places(confidence, masked, block, count):
    """Choose count (B, 1) masked places per row: those of highest confidence in the first block,
    then those of the next. Confidence is in [0, 1], so 2 per block puts earlier blocks first.
    Returns (B, T) bool."""
    confidence = torch.where(masked, confidence - 2 * block, -torch.inf)
    return highest(confidence, count) & masked


def choose_revised(p_written, count, generator):
    """Choose exactly count (B, 1) tokens per row to mask again, as (B, T) bool. The tokens that
    stay are drawn without replacement with weights p_written (B, T), the probability that each had
    when it was written (as in MaskGIT, arXiv 2202.04200), so improbable ones tend to go. Given
    tokens have an infinite weight and always stay."""
    noise = gumbel(p_written.shape, generator, p_written.device)
    return highest(-(p_written.log() + noise), count)


def highest(score, count):
    """Return (B, T) bool: True at the count (B, 1) highest scores (B, T) of each row."""
    return score.argsort(dim=1, descending=True).argsort(dim=1) < count


def schedule(masked, steps, block_length, revise):
    """Plan the forward passes: how many tokens to mask again before each (None in the draft), and
    how many to write. Returns a list of pairs of (B, 1), without passes that would write nothing.
    masked (B, T) bool: the places to write."""
    n_masks = masked.sum(dim=1, keepdim=True)                             # (B, 1)
    longest = int(n_masks.max())
    draft_steps = min((steps + 3) // 4 if revise else steps, longest)
    block_length = block_length or max(longest, 1)
    n_blocks = math.ceil(longest / block_length)
    passes, waiting = [], 0
    for i in range(n_blocks):
        # with fewer steps than blocks, some blocks get no step; the next block's step writes them
        waiting = waiting + (n_masks - i * block_length).clamp(0, block_length)
        block_steps = draft_steps * (i + 1) // n_blocks - draft_steps * i // n_blocks
        for step in range(block_steps):  # evenly; the first steps take the remainder, as in LLaDA
            passes.append((None, waiting // block_steps + (step < waiting % block_steps)))
        waiting = 0 if block_steps else waiting
    if revise and longest:
        for remaining in range(steps - draft_steps, 0, -1):
            count = (revise * remaining / (steps - draft_steps) * n_masks).ceil()
            passes.append((count, count))
    return [(again, count) for again, count in passes if count.any()]


# -----------------------------------------------------------------------------
# sampling where the right answer is certain: puzzles

@torch.no_grad()
def unmask_until_sure(model, x, mask_id, tries, threshold=0.999, sure=0.999):
    """unmask for puzzles, as a best-first search. Each pass writes every token whose probability is
    above threshold or, if there is none, the likeliest one. Whatever else could stand in place of
    the least probable token written is kept as an alternative: the page before the pass, with that
    token. Its cost is -log of the product of its probability and those of the tokens chosen so on
    the way to it. If the certainty of the full page is below sure, a token is probably wrong: the
    alternative of lowest cost is filled next, and so on, until tries pages were filled.

    x (1, T) long. An iterator of states like unmask; the last is the surest of the full pages."""
    written = x == mask_id                                                # (1, T)
    best, surest, cost, alternatives = x, -1.0, 0.0, []
    for attempt in range(tries):
        if attempt:
            alternatives.sort(key=lambda alternative: alternative[0], reverse=True)
            cost, x = alternatives.pop()
            yield x
        while (masked := x == mask_id).any():
            p = predict(model, x, mask_id).softmax(dim=-1)                # (1, T, mask_id)
            x0_p, x0 = p.max(dim=-1)                                      # (1, T)
            confidence = x0_p.where(masked, -1)
            likeliest = F.one_hot(confidence.argmax(dim=1), x.shape[1]).bool()
            transfer_index = (confidence > threshold) | likeliest         # (1, T)
            place = x0_p.where(transfer_index, 2).argmin()
            for token in p[0, place].argsort()[:-1]:                      # all but the likeliest
                alternative = x.clone()
                alternative[0, place] = token
                alternatives.append((cost - p[0, place, token].log().item(), alternative))
            cost -= x0_p[0, place].log().item()
            x = torch.where(transfer_index, x0, x)
            yield x
        found = certainty(model, x, written, mask_id).item()
        if found > surest:
            best, surest = x, found
        if surest >= sure or not alternatives:
            break
    yield best


@torch.no_grad()
def certainty(model, x, written, mask_id):
    """How sure the model is of the tokens written (B, T) bool in each row of x (B, T): mask a
    quarter of them at a time, then a fifth at a time, and take the lowest probability that any
    token has when it is masked. Returns (B,) float64, 1 where nothing was written."""
    lowest = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for parts in (4, 5):
        for part in range(parts):
            masked = written & (written.cumsum(dim=1) % parts == part)
            p = predict(model, torch.where(masked, mask_id, x), mask_id).softmax(dim=-1)
            p = p.gather(-1, x[..., None])[..., 0]                        # (B, T)
            lowest = torch.minimum(lowest, p.where(masked, 1.0).amin(dim=1))
    return lowest


# -----------------------------------------------------------------------------
# the autoregressive twin, for comparison: what a GPT learns, and how it writes

def next_token_losses(model, mask_id, input_ids):
    """Return -log p of each token given those before it, (B, T) nats. The twin reads
    [MASK] + x[:-1] and predicts x, so the first token is scored, too."""
    shifted = F.pad(input_ids[:, :-1], (1, 0), value=mask_id)
    return token_losses(model, shifted, input_ids, mask_id)


def autoregressive_loss(model, mask_id, input_ids):
    """Return the exact negative log-likelihood per token of input_ids (B, T), a scalar in nats."""
    return next_token_losses(model, mask_id, input_ids).mean()


@torch.no_grad()
def estimate_nll(model, windows, mask_id, batch_size=64):
    """The twin's counterpart of estimate_nelbo: the mean over windows (W, L) of the exact negative
    log-likelihood, in nats per token, and its standard error (infinite for a single window)."""
    nll = torch.cat([next_token_losses(model, mask_id, part).mean(dim=1).cpu()
                     for part in windows.split(batch_size)]).double()              # (W,)
    se = nll.std().item() / math.sqrt(len(nll)) if len(nll) > 1 else math.inf
    return nll.mean().item(), se


@torch.no_grad()
def left_to_right(model, x, mask_id, temperature=1.0, generator=None):
    """The twin's counterpart of unmask: one token per forward pass, each given those to its left,
    with a key/value cache. x (B, T) long holds a prompt, equally long in each row, and then
    mask_id. model: a causal GPT. An iterator that yields a new (B, T) state after every step."""
    check_arguments(temperature=temperature)
    cache, done = model.make_cache(*x.shape), 0
    for i in range(int((x[0] != mask_id).sum()), x.shape[1]):
        shifted = F.pad(x, (1, 0), value=mask_id)             # shifted[:, i] predicts token i
        logits = model(shifted[:, done:i + 1].to(cache.device), cache, done)
        x, done = x.clone(), i + 1
        logits = logits[:, -1, :mask_id].to(x.device).double()
        x[:, i] = sample(logits, temperature, generator)
        yield x
