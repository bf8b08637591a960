"""
How likely is a given text? Exactly, if it is written in one given order, and on average over all
orders of writing.
"""

import sys
import time

import torch
from tqdm import tqdm

from diffusion import estimate_nelbo, unmask
from lib.common import check, say
from lib.llada import unmask_blocks
from lib.tokenizer import encode
from lib.twin import next_token_losses


@torch.no_grad()
def exact_nll(model, input_ids, mask_id, steps, sampler=unmask, **settings):
    """Return -log of the probability that a sampler writes each row of input_ids (B, T), as (B,)
    nats per token (DUEL, arXiv 2603.01367). sampler(model, x, mask_id, steps, temperature,
    **settings) is unmask or a wrapper of it, and draws at temperature 1 in each place that it
    chooses to write.

    The sampler itself chooses the places here, at temperature 0, but instead of the model it gets a
    teacher: one that always sees the true tokens at the places written so far, whatever the sampler
    has written there. At the places that the sampler writes, -log p of the true tokens is added up.

    The value is exact if the places depend on nothing but the visible tokens: from left to right
    (unmask_blocks with block_length=1), and for low_confidence if it goes by the probability of the
    likeliest token, as it does at temperature 0. Where the order has a random part (random; the
    offset of dilated), the expectation is an upper bound. The tokens of one step are predicted
    independently."""
    log_p = None                                              # (B, T): of the true tokens

    def teacher(x):
        nonlocal log_p
        logits = model(input_ids.where(x != mask_id, mask_id))[..., :mask_id].double()
        log_p = logits.log_softmax(dim=-1).gather(-1, input_ids[..., None])[..., 0]
        return logits

    x = torch.full_like(input_ids, mask_id)
    nll = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for state in sampler(teacher, x, mask_id, steps, temperature=0.0, **settings):
        written = (x == mask_id) & (state != mask_id)
        nll -= log_p.where(written, 0).sum(dim=1)
        x = state
    return nll / x.shape[1]


@torch.no_grad()
def score(model, vocab, text, passes=64):
    """Return a line that says how likely text is, in nats per character: for a mask predictor the
    exact value from left to right and the bound (NELBO), for a twin its exact value. A text that is
    longer than the model's block is cut into windows. Shows a bar, and says before it starts how
    long it will take if that is more than a minute."""
    check(text, "--score has no text")
    ids = torch.from_numpy(encode(text, vocab).astype("int64")).to(model.wte.weight.device)
    causal, mask_id, block_size = model.config.causal, model.config.mask_id, model.config.block_size
    full, exact, bound = len(ids) // block_size * block_size, 0.0, 0.0
    batches = [*ids[:full].view(-1, block_size).split(16), ids[full:][None]]
    batches = [x for x in batches if x.numel()]
    tokens = sum(x.numel() * (1 if causal else x.shape[1] + passes) for x in batches)
    started = time.perf_counter()
    model(batches[0])
    minutes = (time.perf_counter() - started) / batches[0].numel() * tokens / 60
    if minutes > 1:
        say(f"{len(text):,} characters: this will take about {minutes:.0f} minutes", sys.stderr)
    with tqdm(total=tokens, desc="scoring", unit=" tokens", unit_scale=True, leave=False,
              disable=None) as bar:
        def counted(idx):
            bar.update(idx.numel())
            return model(idx)

        for x in batches:
            if causal:
                exact += next_token_losses(counted, mask_id, x).sum().item()
            else:
                nll = exact_nll(counted, x, mask_id, x.shape[1], unmask_blocks, block_length=1)
                exact += nll.sum().item() * x.shape[1]
                bound += estimate_nelbo(counted, x, mask_id, passes)[0] * x.numel()
    line = f"{exact / len(text):.4f} nats per character, exact"
    return line if causal else (f"{line}, from left to right; at most {bound / len(text):.4f} "
                                "averaged over all orders of writing (NELBO)")
