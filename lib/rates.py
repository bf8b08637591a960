"""
Which characters are missing from a text? If somebody took out the vowels, only vowels are missing.
"""

import torch
import torch.nn.functional as F


@torch.no_grad()
def missing_rates(model, x, mask_id, block_size, smoothing=2):
    """Estimate for every token what share of its occurrences is missing from a text x (T,) long,
    which has mask_id where a token is missing. In training, all tokens are missing at equal rates.
    If the rates differ, Bayes' rule multiplies the model's probability of a token in a hole by the
    token's rate. Returns (mask_id,) float64.

    Expectation maximization (Dempster et al., 1977): count every token in what is left and, as the
    model and the rates so far expect it, in the holes; compute the rates from the counts; repeat.
    smoothing: so many more missing occurrences of each token are counted, at the average rate."""
    logits = torch.cat([model(part[None])[0, part == mask_id] for part in x.split(block_size)])
    p = logits[:, :mask_id].double().softmax(dim=-1)                      # (holes, mask_id)
    left = x[x != mask_id].bincount(minlength=mask_id)                    # (mask_id,)
    share = len(p) / len(x)
    rates = torch.full_like(p[0], share)
    for _ in range(10):
        weights = p * rates
        missing = (weights / weights.sum(dim=1, keepdim=True)).sum(dim=0)
        rates = (missing + smoothing) / (left + missing + smoothing / share)
    return rates


def weighted(model, rates):
    """Return a mask predictor whose probabilities are model's times rates (mask_id,)."""
    log_rates = F.pad(rates.log(), (0, 1))                                # (vocab_size,)
    return lambda idx: model(idx) + log_rates
