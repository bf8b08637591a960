"""
Measuring a model on a split of the data: the bound or, for the twin, the exact likelihood.
"""

import math

from tqdm import tqdm

from diffusion import estimate_nelbo, estimate_nll
from lib.data import characters_per_token
from lib.windows import spread_windows


def measure(model, data, vocab, passes, batch_size, context, n_tokens=None):
    """Return (name, nats per character, standard error) for data (N,) ids, or for n_tokens of it,
    spread over it: the bound (NELBO), whose standard error is over passes, or the twin's exact
    value (NLL), whose standard error is over windows. context: of lib.device.autocast.

    The sum over the windows' tokens is divided by their number of characters, so that models of
    different vocabularies can be compared."""
    windows = spread_windows(data, n_tokens or len(data), model.config.block_size)
    length = characters_per_token(windows.numpy(), vocab)
    windows = windows.to(model.wte.weight.device)
    causal, mask_id = model.config.causal, model.config.mask_id
    n_calls = (1 if causal else passes) * math.ceil(len(windows) / batch_size)
    with tqdm(total=n_calls, desc="evaluating", leave=False, disable=None) as bar, context:
        def counted(idx):
            bar.update()
            return model(idx)
        if causal:
            nats, se = estimate_nll(counted, windows, mask_id, batch_size)
        else:
            nats, se = estimate_nelbo(counted, windows, mask_id, passes, batch_size)
    return "NLL" if causal else "NELBO", nats / length, se / length


def describe(name, nats, se, passes):
    """Format a measured value. The standard error of fewer than four passes is noise."""
    error = f" +- {se:.4f}" if name == "NLL" or passes >= 4 else ""
    return f"{name} {nats:.4f}{error} nats per character"
