"""
The page: its text with masks wherever text is wanted, and pages that are longer than the model's
block, which are written in windows, one after the other.
"""

import re
import sys

import torch
import torch.nn.functional as F

from diffusion import gumbel
from lib.common import check, read_text, say, unify_line_ends
from lib.dialogue import prompt_tokens
from lib.tokenizer import encode


def make_page(config, vocab, model_config, info):
    """Return the ids of the page, mask_id wherever text is wanted; how many of them not to show;
    and whether the first token to write must begin with a space. config has the flags of main.py
    infill, mask_char, prompt and gen_length. The page of a model of pairs is a record."""
    hidden, gen_length, new_word, prompt_length = 0, 0, False, info.get("prompt", 0)
    record = 1 if prompt_length else info.get("record", 1)
    prompt = read_text("-") if config.prompt == "-" else unify_line_ends(config.prompt)
    if prompt_length and config.infill is None:
        flag, text, holes, hidden = "--prompt", prompt_tokens(prompt), "", prompt_length
        if len(prompt) >= prompt_length:
            say(f"the prompt is long: its last {prompt_length - 1} characters count", sys.stderr)
    elif config.infill is not None:
        flag, text, holes = "--infill", config.infill, config.mask_char
    else:
        flag, text, holes = "--prompt", prompt, ""
        new_word = text.endswith(" ") and any(len(token) > 1 for token in vocab)
        text = text[:-1] if new_word else text  # word pieces begin with their space
        if not text and "\n" in vocab and record == 1:
            text, hidden = "\n", 1  # a page without a prompt begins at a line's start
    try:
        ids = encode(text, vocab, holes, model_config.mask_id).tolist()
    except ValueError as e:
        hint = ""
        if "\\n" in text:
            hint = f". For line ends, pipe it in: printf 'ROMEO:\\n' | python main.py {flag}=-"
        elif re.fullmatch(r"[\d_.|\s+-]+", text):
            hint = ". To solve a puzzle, name a model of puzzles: --path=sudoku"
        raise ValueError(f"{flag} has {e}{hint}") from e
    if config.infill is None:
        block_size = model_config.block_size
        gen_length = config.gen_length or max(block_size - len(ids), block_size // 2)
    length = len(ids) + gen_length
    check(record == 1 or length <= model_config.block_size and (gen_length or length % record == 0),
          f"this model was trained on records of {record} characters, and does not write {length}")
    return ids + [model_config.mask_id] * gen_length, hidden, new_word


@torch.no_grad()
def begin_word(model, x, config, vocab, temperature, generator):
    """Write the first token after the prompt in each row of x (B, T): one that begins with a
    space, since the prompt ended in one. In training, the space belongs to the word after it.
    config: GPTConfig."""
    mask_id, place = config.mask_id, int((x[0] == config.mask_id).int().argmax())
    start = max(0, place - config.block_size // 2)
    window = x[:, start:start + config.block_size]
    if config.causal:
        window = F.pad(window, (1, 0), value=mask_id)[:, :place - start + 1]
    logits = model(window)[:, place - start, :mask_id].double()           # (B, mask_id)
    word = torch.tensor([token.startswith(" ") for token in vocab], device=x.device)
    logits = logits.where(word, -torch.inf)
    x[:, place] = (logits + temperature * gumbel(logits, generator)).argmax(dim=-1)
    return x


def page_windows(masked, block_size):
    """Plan how to write a page of any length: a window slides along, with up to half of it before
    the first mask, and what is written in one window is context for the next. Where text follows a
    window, its last quarter is left to the next one, so that every mask is written with context on
    both sides. masked (T,) bool. Returns a list of (start, end, keep): fill the masks between start
    and end; positions before keep are final."""
    masked, windows = masked.clone(), []
    while masked.any():
        start = max(0, min(int(masked.int().argmax()) - block_size // 2, len(masked) - block_size))
        end = min(start + block_size, len(masked))
        keep = end if masked[end:].all() else end - block_size // 4
        windows.append((start, end, keep))
        masked[start:keep] = False
    return windows


def generate_pages(fill, x, mask_id, windows):
    """Write one window after the other. fill(window) is an iterator of states, such as unmask; x
    (B, T) long, masked at the same places in each row; windows come from page_windows. Yields
    (B, T) states."""
    page = x
    for start, end, keep in windows:
        for state in fill(x[:, start:end]):
            x = torch.cat([x[:, :start], state, x[:, end:]], dim=1)
            yield x
        if (page[:, keep:end] == mask_id).any():
            x = torch.cat([x[:, :keep], page[:, keep:]], dim=1)
            yield x
