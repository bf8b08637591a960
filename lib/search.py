"""
Solving puzzles by best-first search.
"""

import sys

import torch

from diffusion import highest
from lib.common import check
from lib.device import home_of, on_its_device
from lib.puzzles import conflict, read_puzzles
from lib.show import save_replay, shown, watch
from lib.tokenizer import encode

SURE = 0.999        # the certainty from which an answer is taken for right


@torch.no_grad()
def unmask_until_sure(model, x, mask_id, tries, threshold=0.999, sure=SURE):
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
            p = model(x)[..., :mask_id].double().softmax(dim=-1)          # (1, T, mask_id)
            x0_p, x0 = p.max(dim=-1)                                      # (1, T)
            confidence = x0_p.where(masked, -1)
            transfer_index = highest(confidence, 1) | (confidence > threshold)    # (1, T)
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
            logits = model(torch.where(masked, mask_id, x))[..., :mask_id].double()
            p = logits.softmax(dim=-1).gather(-1, x[..., None])[..., 0]   # (B, T)
            lowest = torch.minimum(lowest, p.where(masked, 1.0).amin(dim=1))
    return lowest


def solve_puzzles(config, model, vocab, side, sample):
    """Solve the puzzles of --infill, side x side cells each, one after the other: by a search or,
    if flags of unmask are given, by one run of it. config and sample: those of main.py. The search
    knows no rule of the puzzle, but what it found is checked with the rules: exit status 3 if an
    answer breaks one."""
    mask_id, predictor = model.config.mask_id, on_its_device(model)
    puzzles = read_puzzles(config.infill, side)
    check(len(puzzles) == 1 or not config.html, "--html is for a single puzzle")
    generator, failed = torch.Generator(home_of(model)).manual_seed(config.seed), False
    for puzzle in puzzles:
        ids = encode(puzzle.to_page(), vocab, "_", mask_id).tolist()
        x = torch.tensor([ids], device=generator.device)                  # (1, T)
        if config.tries:
            pages = unmask_until_sure(predictor, x, mask_id, config.tries, config.threshold)
        else:
            pages = sample(config, model, predictor, x, generator)
        states, summary = watch(pages, x, int((x == mask_id).sum()), vocab, mask_id, config)
        text = shown(states[-1][0].tolist(), vocab)
        print(text.replace("\n", "") + "\n" if puzzle.one_line else text, end="", flush=True)
        wrong = conflict(text.replace("\n", ""), side)
        failed = failed or wrong
        if wrong:
            print(f"wrong after {config.tries or 1} tries: {wrong}", file=sys.stderr)
        elif certainty(predictor, states[-1], x == mask_id, mask_id).item() < SURE:
            print(f"not sure of this answer ({config.tries or 1} tries)", file=sys.stderr)
        print(summary, file=sys.stderr)
        if config.html:
            save_replay(config.html, states, mask_id, vocab)
    if failed:
        sys.exit(3)
