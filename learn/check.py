"""
Check the exercises of learn/exercises.py.

    python learn/check.py        # all of them
    python learn/check.py 3      # exercise 3 only

Each exercise is "right", "not yet" or "empty". What is right is decided by the functions of
diffusion.py and lib/, or by what must hold for any right answer. Where your answer is wrong, it is
compared with the results of common mistakes, so that the hint can name yours. Most of these are
the functions of diffusion.py, called wrongly.
"""

import ast
import importlib.util
import math
import sys
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

import diffusion
from lib.common import fail
from lib.likelihood import exact_nll
from lib.llada import unmask_blocks

EXERCISES = Path(__file__).with_name("exercises.py")
MASK_ID = 8  # of the small worlds here: the tokens are 0 to 7


class NotYet(Exception):
    """Its text is the hint."""


def expect(condition, hint):
    if not condition:
        raise NotYet(hint)


def expect_returned(value):
    expect(value is not None, "the function returns nothing: is a return missing?")


def expect_tensor(value, shape, name, dtype=None):
    expect_returned(value)
    expect(isinstance(value, torch.Tensor), f"{name} must be a tensor, not {type(value).__name__}")
    expect(value.shape == shape, f"{name} has the shape {tuple(value.shape)}; it must be {shape}")
    expect(dtype in (None, value.dtype), f"{name} has the dtype {value.dtype}; it must be {dtype}")


def expect_three(values, shape, third):
    """Exercises 1 and 8 return noisy_batch, masked_indices and a tensor named third."""
    expect_returned(values)
    expect(isinstance(values, (tuple, list)) and len(values) == 3, "return three tensors")
    for value, name, dtype in zip(values, ("noisy_batch", "masked_indices", third),
                                  (torch.long, torch.bool, None)):
        expect_tensor(value, shape, name, dtype)
    return values


def number(value):
    expect_returned(value)
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise NotYet(f"return one number, not {type(value).__name__}") from e


def expect_close(value, right, mistakes, tolerance=1e-4):
    """mistakes: {hint: the value that this mistake gives}."""
    close = partial(math.isclose, rel_tol=tolerance, abs_tol=1e-6)
    if not close(value, right):
        hints = [hint for hint, wrong in mistakes.items() if close(value, wrong)]
        raise NotYet(hints[0] if hints else f"it returns {value:.4f}; {right:.4f} is right")


class ToyModel(torch.nn.Module):
    """Random logits that depend on the place and on all visible tokens."""

    def __init__(self, T, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.bias = torch.nn.Parameter(torch.randn(T, MASK_ID + 1, generator=g))
        effect = torch.randn(MASK_ID + 1, T, MASK_ID + 1, generator=g) / 2
        self.effect = torch.nn.Parameter(effect)
        self.seen = []                                                    # all rows that it read

    def forward(self, x):
        expect(isinstance(x, torch.Tensor) and x.ndim == 2,
               "give the model ids of the shape (B, T), also if there is only one text")
        self.seen += x.tolist()
        logits = self.bias + self.effect[x].sum(dim=1)                    # (B, T, MASK_ID + 1)
        return logits + 9 * (torch.arange(MASK_ID + 1) == MASK_ID)        # [MASK] is the likeliest


def generator():
    return torch.Generator().manual_seed(1)


# -----------------------------------------------------------------------------
# one check per exercise: it returns if the answer is right, or raises NotYet(hint)

def check_forward_process(answer):
    ids, eps = some_ids(400, 1000), 0.1
    masked, p_mask = masks_of(answer, ids, "p_mask", eps=eps)
    expect(p_mask.min() > eps * 0.999 and p_mask.max() < 1.001,
           f"with eps = {eps}, p_mask goes from {p_mask.min():.3f} to {p_mask.max():.3f}; it must "
           "go from eps to 1: (1 - eps) * t + eps")
    expect(abs(p_mask.mean() - (1 + eps) / 2) < 0.05 and p_mask.std() > 0.23,
           "t is not uniform on [0, 1]: p_mask should be spread evenly over eps to 1")
    expect_masked_with(p_mask, masked)


def some_ids(*shape):
    return torch.randint(MASK_ID - 2, shape, generator=generator())


def masks_of(answer, ids, name, **settings):
    """Call exercise 1 or 8, and check what both promise. name: of the third tensor. Returns
    masked_indices and the third tensor."""
    before, shape = ids.clone(), tuple(ids.shape)
    results = [answer(ids, MASK_ID, generator=generator(), **settings) for _ in range(2)]
    noisy, masked, third = expect_three(results[0], shape, name)
    expect(torch.equal(ids, before), "it changes input_ids; make a new tensor, as torch.where does")
    expect(torch.equal(masked, noisy == MASK_ID),
           "masked_indices must be True exactly where noisy_batch holds mask_id")
    expect(torch.equal(noisy[~masked], ids[~masked]), "tokens that are not masked must stay")
    expect(torch.equal(noisy, results[1][0]), "two calls with equal generators give different "
                                              "masks: pass generator=generator to torch.rand")
    expect((third - third[:, :1]).abs().max() < 1e-5, f"{name} differs within a row: draw one t "
                                                      "for each row")
    expect(third[:, 0].std() > 0.01, f"{name} is the same in all rows: draw a t for each row")
    in_column = masked.float().mean(dim=0)
    expect(in_column.std() < 0.1, "all rows use the same random numbers: draw (B, T) of them")
    expect(in_column.min() > 0.1, "there are places that are never masked")
    return masked, third


def expect_masked_with(p, masked):
    """Each token must be masked independently with probability p (B, T)."""
    T, p = masked.shape[1], p[:, 0]
    count, spread = masked.sum(dim=1), p.clamp(0.02, 0.98)
    surprise = (count - T * p) ** 2 / (T * spread * (1 - spread))         # 1 in the mean
    row = surprise.argmax()
    expect(surprise.mean() < 1.6, f"a row has p = {p[row]:.3f}, but {count[row] / T:.1%} of its "
                                  "tokens are masked")
    expect(surprise.mean() > 0.5, "each row has as many masks as one expects, without any "
                                  "accident: decide for each token on its own")


def check_diffusion_loss(answer):
    ids, model, watched = some_ids(6, 10), ToyModel(10), ToyModel(10)
    noisy, masked, p_mask = diffusion.forward_process(ids, MASK_ID, 0.1, generator())

    def loss(mask_id=MASK_ID, noisy=noisy, masked=masked, p_mask=p_mask):
        return diffusion.diffusion_loss(model, mask_id, ids, noisy, masked, p_mask).item()

    value = answer(watched, MASK_ID, ids, noisy, masked, p_mask)
    got, ones, tokens = number(value), torch.ones_like(p_mask), ids.numel()
    expect(watched.seen, "it never calls the model")
    expect_close(got, loss(), {
        "it does not divide by p_mask": loss(p_mask=ones),
        "it is BERT's loss, the mean over the masks: divide each term by p_mask, and the sum by "
        "B * T": loss(p_mask=ones) * tokens / masked.sum().item(),
        "it divides the sum by the number of masks; divide by B * T":
            loss() * tokens / masked.sum().item(),
        "it counts all tokens: only the masked ones have a loss": loss(masked=masked | True),
        "[MASK] is among the possible answers: cut its logit off": loss(mask_id=MASK_ID + 1),
        "the model reads input_ids, where it can see the answers; it must read noisy_batch":
            loss(noisy=ids),
        "it multiplies by p_mask; divide by it": loss(p_mask=1 / p_mask),
        "it is not divided by B * T": loss() * tokens,
        "it is divided by B alone; divide by B * T": loss() * ids.shape[1],
        "its sign is wrong: a cross-entropy is -log p": -loss(),
    })
    expect(isinstance(value, torch.Tensor) and value.requires_grad,
           "the value is right, but no gradient can flow: return the tensor itself")


def check_average_loss(answer):
    for first, second, alone_1, alone_2 in ((2, 1.5, 0.4, 0.1), (0.2, 3, 1, 2.5)):
        world = {(False, False): (0.0, 0.0), (True, False): (alone_1, 0.0),
                 (False, True): (0.0, alone_2), (True, True): (first, second)}
        orders = ((first + alone_2) / 2 + (second + alone_1) / 2) / 2     # per token
        one, both = (alone_1 + alone_2) / 2, (first + second) / 2
        value = number(answer(world))
        expect_close(value, orders, {
            "it does not divide by p_mask: rows with many masks then count too much":
                one / 6 + both / 3,
            "it is not divided by B * T = 2": one + both,
            "it divides by the number of masks in place of B * T, and not by p_mask":
                one / 3 + both / 3,
            "it divides by the number of masks in place of B * T": one + both / 2,
            "it takes the four cases for equally likely, without p_mask: their probabilities "
            "depend on t": one / 4 + both / 4,
            "it leaves out the cases in which one token is masked": both / 2,
            "it leaves out the case in which both tokens are masked": one / 2,
        }, tolerance=0.015)
    return (f"The average over the two orders of writing is {orders:.4f} in the last world; yours "
            f"is {value:.4f}.")


def check_unmask_step(answer):
    hidden = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1, 1, 1, 1],
                           [0, 0, 0, 1, 0, 0, 0, 0, 0]]).bool()
    x = some_ids(3, 9).where(~hidden, MASK_ID)
    for seed, k in ((0, 2), (1, 2), (2, 3), (3, 20)):
        model, before = ToyModel(9, seed), x.clone()
        value = answer(model, x, MASK_ID, k)
        expect_tensor(value, tuple(x.shape), "the result", torch.long)
        expect(torch.equal(x, before), "it changes x: work on a copy")
        expect(torch.equal(value[~hidden], x[~hidden]), "it rewrites tokens that are no masks")
        written = hidden & (value != MASK_ID)
        for n, n_masks in zip(written.sum(dim=1).tolist(), hidden.sum(dim=1).tolist()):
            case = f"with k = {k}, a row of {n_masks} masks gets {n} of them written"
            expect(n >= min(k, n_masks), f"{case}. Is [MASK] among the answers? Do places without "
                                         "a mask count?")
            expect(n <= min(k, n_masks), f"{case}: choose k places in each row")
        steps = [max(1, int(n) // k) for n in hidden.sum(dim=1)]          # the first writes k
        right = torch.cat([next(diffusion.unmask(model, row[None], MASK_ID, n, temperature=0.0,
                                                 remasking="low_confidence"))
                           for row, n in zip(x, steps)])
        expect(torch.equal(written, right != x), "it writes at other places than those where the "
               "likeliest token has the highest probability. Is the order reversed? Does [MASK]'s "
               "logit count in the probabilities? Are logits compared in place of probabilities?")
        expect(torch.equal(value, right), "the places are right, but not the tokens: write the "
                                          "likeliest one at each place, given x alone")


def check_num_transfer_tokens(answer):
    for n_masks, steps in (([7, 2], 3), ([8, 0], 4), ([256, 255], 32), ([3, 1], 5)):
        counts = answer(torch.tensor(n_masks)[:, None], steps)
        expect_tensor(counts, (len(n_masks), steps), "the result", torch.long)
        for n, row in zip(n_masks, counts.tolist()):
            case = f"{n} masks in {steps} steps: it gives {row if steps < 6 else '...'}"
            left = n - sum(row)
            expect(left <= 0, f"{case}, so {left} of them are never written")
            expect(left >= 0, f"{case}, {-left} more than there are")
            expect(max(row) - min(row) <= 1 and min(row) >= 0, f"{case}, which is not as even as "
                                                               "possible")
            expect(row == sorted(row, reverse=True), f"{case}; the larger counts come first")


def check_from_both_ends(answer):
    for T in (5, 8, 1, 65):
        confidence = answer(torch.rand(2, T, generator=generator()))
        expect_tensor(confidence, (2, T), "the confidence")
        for row in confidence.tolist():
            right = [i // 2 if i % 2 == 0 else T - 1 - i // 2 for i in range(T)]
            order = sorted(range(T), key=row.__getitem__, reverse=True)
            said = f"for T = {T}, the places are written in the order {str(order[:8])[:-1]}, ...]"
            expect(order == right or order[::-1] != right, f"{said}: it is reversed. The highest "
                                                           "confidence is written first")
            expect(len(set(row)) == T, f"for T = {T}, two places have the same confidence, so "
                                       "nobody knows which of them is written first")
            expect(order == right, f"{said}; it must be {str(right[:8])[:-1]}, ...]")


def check_order_nll(answer):
    T, order, ids = 6, [2, 5, 0, 1, 4, 3], some_ids(6)
    model = ToyModel(T, seed=3)

    def nll(order, steps=T, mask_id=MASK_ID):
        """Write the reordered text from left to right, with a model that puts it in order again."""
        back = torch.tensor(order).argsort()
        block = dict(sampler=unmask_blocks, block_length=1) if steps == T else {}

        def reordered(x):
            logits = F.pad(model(x[:, back].clamp(max=MASK_ID)), (0, 1))
            return logits[:, order]
        return exact_nll(reordered, ids[order][None], mask_id, steps, **block).item() * T

    before = ids.clone()
    value, seen = number(answer(model, ids, MASK_ID, list(order))), model.seen.copy()
    expect(torch.equal(ids, before), "it changes ids: begin with a new tensor of masks")
    expect(seen, "it never calls the model")
    expect(all(token in (MASK_ID, true) for row in seen for token, true in zip(row, ids.tolist())),
           "the model sees a wrong token: at each place, it must see [MASK] or the true token of "
           "this place, not a prediction")
    expect(any(set(row) == {MASK_ID} for row in seen), "the model never sees masks alone: predict "
                                                       "first, then write the true token")
    expect_close(value, nll(order), {
        "all tokens are predicted from nothing but masks: write the true token before the next "
        "prediction": nll(order, steps=1),
        "the order is reversed": nll(order[::-1]),
        "it goes from left to right: use order": nll(list(range(T))),
        "it writes order[i] at step i, but at the wrong place (the inverse of order)":
            nll([order.index(i) for i in range(T)]),
        "[MASK]'s logit counts: cut it off before the softmax": nll(order, mask_id=MASK_ID + 1),
        "it is the mean; return the sum over the text": nll(order) / T,
        "its sign is wrong: -log p is positive": -nll(order),
    })


def check_squared_forward_process(answer):
    masked, third = masks_of(answer, some_ids(400, 1000), "the third tensor")
    share = masked.float().mean().item()
    expect(abs(share - 1 / 2) > 0.06, "half of all tokens are masked: that is p(t) = t. With t ** 2"
                                      " it is a third")
    expect(abs(share - 1 / 3) < 0.06, f"{share:.0%} of all tokens are masked; with p(t) = t ** 2 it"
                                      " is a third: 33%")
    t = masked.float().mean(dim=1).sqrt().clamp_min(0.01)                 # nearly, in each row
    mistakes = {"p(t)": t ** 2, "p'(t)": 2 * t, "t": t, "p'(t) / p(t)": 2 / t}
    for name, value in mistakes.items():
        expect((third[:, 0] / value - 1).abs().median() > 0.1,
               f"the third tensor is {name}; return p(t) / p'(t)")
    expect_masked_with(4 * third ** 2, masked)                            # t is twice p / p'


CHECKS = {  # name: (its check, where its counterpart stands)
    "forward_process": (check_forward_process, "forward_process in diffusion.py, which also "
                        "spreads the times of a batch evenly"),
    "diffusion_loss": (check_diffusion_loss, "diffusion_loss in diffusion.py"),
    "average_loss": (check_average_loss, "estimate_nelbo in diffusion.py, which measures this "
                     "average on real text"),
    "unmask_step": (check_unmask_step, "the loop of unmask in diffusion.py"),
    "num_transfer_tokens": (check_num_transfer_tokens, "the first line of the loop of unmask "
                            "in diffusion.py"),
    "from_both_ends": (check_from_both_ends, "writing_order in diffusion.py. Add it there, as a "
                       "case \"ends\", and see: python main.py --remasking=ends --animate"),
    "order_nll": (check_order_nll, "exact_nll in lib/likelihood.py"),
    "squared_forward_process": (check_squared_forward_process, "forward_process in diffusion.py. "
                                "Its docstring says the same; put yours there to train with it"),
}


# -----------------------------------------------------------------------------
# the command line

def verdict(name, answer):
    """Return what to print of an exercise whose function is answer."""
    check, counterpart = CHECKS[name]
    try:
        remark = check(answer)
    except NotYet as e:
        return f"not yet: {e}"
    except Exception as e:  # the answer may do anything
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__)
                 if frame.filename == str(EXERCISES)]
        where = f"line {lines[-1]} of {EXERCISES.name}" if lines else "its result does not fit"
        reason = (str(e) or "no message").splitlines()[0]
        return f"not yet: {type(e).__name__}: {reason} ({where})"
    return f"right. {remark + ' ' if remark else ''}Its counterpart: {counterpart}"


def load_exercises():
    """Return {name: function}, with None for a function whose body is still empty."""
    try:
        code = ast.parse(EXERCISES.read_text(encoding="utf-8"))
        spec = importlib.util.spec_from_file_location("exercises", EXERCISES)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except SyntaxError as e:
        fail(f"{EXERCISES.name}, line {e.lineno}: {e.msg}")
    except Exception as e:
        fail(f"{EXERCISES.name} can't be imported: {type(e).__name__}: {e}")
    empty = {f.name for f in code.body if isinstance(f, ast.FunctionDef)
             and all(isinstance(line, ast.Pass) or isinstance(line, ast.Expr)
                     and isinstance(line.value, ast.Constant) for line in f.body)}
    return {name: None if name in empty else getattr(module, name, None) for name in CHECKS}


def main():
    wanted = sys.argv[1:] or [str(n) for n in range(1, len(CHECKS) + 1)]
    names = dict(zip(map(str, range(1, len(CHECKS) + 1)), CHECKS))
    if unknown := [n for n in wanted if n not in names]:
        fail(f"there is no exercise {unknown[0]}: give numbers from 1 to {len(CHECKS)}, or nothing")
    answers = load_exercises()
    verdicts = {n: verdict(names[n], answers[names[n]]) if answers[names[n]] else "empty"
                for n in wanted}
    for n, text in verdicts.items():
        print(f"{n} {names[n]:<24} {text}")
    not_right = [n for n, text in verdicts.items() if not text.startswith("right")]
    following = str(int(wanted[-1]) + 1)
    if not_right or following in names:
        n = not_right[0] if not_right else following
        print(f"\nNext: {names[n]} in learn/{EXERCISES.name}. Its docstring says what to write. "
              f"Then run\n    python learn/check.py {n}")
    else:
        print("\nYou have written the algorithm. Now read diffusion.py.")


if __name__ == "__main__":
    main()
