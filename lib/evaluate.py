"""
What is measured and shown of a model while it trains: the bound or, for the twin, the exact
likelihood; and a short sample of what it writes.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from diffusion import estimate_nelbo, unmask
from lib.common import printable, say
from lib.data import characters_per_token, cut_windows
from lib.device import autocast, home_of, on_its_device
from lib.dialogue import END, readable
from lib.tokenizer import decode
from lib.twin import estimate_nll, left_to_right


def spread_windows(data, n_tokens, length):
    """Return as many windows of data (N,) as n_tokens hold, spread evenly over it: (W, length)."""
    n_windows = min(n_tokens, len(data)) // length
    starts = length * torch.linspace(0, len(data) // length - 1, n_windows).round().long()
    return torch.from_numpy(cut_windows(data, starts.numpy(), length))


def evaluate(run, config, data, signals=()):
    """Measure the averaged model of a Run of train.py on both splits of the data, and print the
    result. config: TrainConfig (eval_tokens None: all tokens). Returns a row of the loss curve:
    nats per character and their standard errors; or None as soon as the list signals holds one."""
    model, context = run.ema, autocast(config.dtype, run.ema.wte.weight.device)
    row = dict(iteration=run.iteration, minutes=run.minutes,
               loss=float(np.mean(run.losses or [math.nan])))
    for split, ids in (("train", data.train), ("val", data.val)):
        try:
            nats, se = row[split], row[f"{split}_se"] = measure(
                model, ids, data, config.eval_passes, config.batch_size, context,
                config.eval_tokens, signals)
        except InterruptedError:
            return None
        exact = model.config.causal
        error = f" +- {se:.4f}" if exact or config.eval_passes >= 4 else ""  # of fewer, it is noise
        say(f"iteration {run.iteration:,}: " * bool(run.iteration)
            + f"{split} {'NLL' if exact else 'NELBO'} {nats:.4f}{error} nats per character")
    return row


def measure(model, ids, data, passes, batch_size, context, n_tokens=None, signals=()):
    """Return (nats per character, standard error) for ids (N,), a split of data, or for n_tokens of
    them, spread evenly: the bound (NELBO), whose standard error is over passes, or the twin's exact
    value (NLL), whose standard error is over windows. Of pairs, it is that of the answers, given
    the prompts. context: of lib.device.autocast.

    The sum over the windows' tokens is divided by their number of characters, so that models of
    different vocabularies can be compared."""
    windows = spread_windows(ids, n_tokens or len(ids), model.config.block_size)
    counted_tokens = windows[:, data.prompt_length:].numpy()
    length = characters_per_token(counted_tokens, data.vocab)
    if data.prompt_length:  # what fills up an answer is no character of it
        length *= float((counted_tokens != data.vocab.index(END)).mean())
    windows = windows.to(model.wte.weight.device)
    causal, mask_id = model.config.causal, model.config.mask_id
    n_calls = (1 if causal else passes) * math.ceil(len(windows) / batch_size)
    with tqdm(total=n_calls, desc="evaluating", leave=False, disable=None) as bar, context:
        def counted(idx):
            if signals:
                raise InterruptedError
            bar.update()
            return model(idx)
        if causal:
            nats, se = estimate_nll(counted, windows, mask_id, batch_size, data.prompt_length)
        else:
            nats, se = estimate_nelbo(counted, windows, mask_id, passes, batch_size,
                                      prompt_length=data.prompt_length)
    return nats / length, se / length


@torch.no_grad()
def short_sample(model, config, data, length=96):
    """Return a line that shows what the model writes by now: about length tokens from a line's
    start; of a model of records, a record; or an answer to the first prompt of the validation data.
    Line ends are shown as " / "."""
    mask_id, length = model.config.mask_id, min(length, model.config.block_size)
    x = torch.full((1, length if data.record == 1 else data.record), mask_id, device=home_of(model))
    if "\n" in data.vocab and data.record == 1:
        x[0, 0] = data.vocab.index("\n")
    x[0, :data.prompt_length] = torch.from_numpy(data.val[:data.prompt_length].astype(np.int64))
    generator = torch.Generator(x.device).manual_seed(0)
    with autocast(config.dtype, model.wte.weight.device):
        if model.config.causal:
            *_, x = left_to_right(model, x, mask_id, temperature=0.8, generator=generator)
        else:
            *_, x = unmask(on_its_device(model), x, mask_id, steps=32, temperature=0.8,
                           remasking="dilated", revise=0.3, generator=generator)
    text = readable(decode(x[0].tolist(), data.vocab)) if data.prompt_length else \
        decode(x[0].tolist(), data.vocab)
    return printable(text).strip("\n").replace("\n", " / ")
