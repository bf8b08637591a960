"""
Eight exercises: write the algorithm of a diffusion language model yourself, a few lines at a time.

    python learn/check.py        # says of each exercise: right, not yet (with a hint), or empty
    python learn/check.py 3      # checks exercise 3 only

Write the body of each function below its docstring. None needs more than 12 lines, and you don't
need to have read diffusion.py: the docstrings say all that is needed.

Words that all of them use. A text is a row of token ids, integers from 0 to mask_id - 1. mask_id
itself stands for [MASK]: a token that is hidden. A tensor of B texts of T tokens each has the shape
(B, T). A model is a function: model(x) takes ids (B, T), some of which may be mask_id, and returns
logits (B, T, mask_id + 1), one for each token and, as the last, one for [MASK]. [MASK] is never an
answer: cut its logit off before you use the others.
"""

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401


def forward_process(input_ids, mask_id, eps=1e-3, generator=None):
    """Exercise 1: hide a random share of each text.

    Draw a time t for each row, uniform on [0, 1]. In a row of time t, replace each token by mask_id
    with probability p_mask = (1 - eps) * t + eps, independently of all other tokens. Draw all
    random numbers with torch.rand(..., generator=generator).

    input_ids: (B, T) long. Leave it unchanged.
    Returns three tensors (B, T): noisy_batch, the text with its masks (long); masked_indices, True
    where there is a mask (bool); and p_mask, the probability with which each token was masked, the
    same in all of a row (float).

    Example: input_ids [[3, 1, 4, 1]], mask_id 5, t = 0.5: noisy_batch may be [[3, 5, 5, 1]],
    masked_indices is then [[False, True, True, False]], and p_mask is 0.5005 in each place."""


def diffusion_loss(model, mask_id, input_ids, noisy_batch, masked_indices, p_mask):
    """Exercise 2: the loss that the model learns from.

    The model reads noisy_batch. At each masked place, take the cross-entropy of the true token,
    which is -log of its probability among the tokens 0 to mask_id - 1, and divide it by p_mask. Add
    up these values, and divide the sum by B * T: the number of all tokens, masked or not.

    model: see above; the four tensors (B, T) are those of exercise 1.
    Returns a scalar tensor, in nats per token.

    Example: B = 1, T = 4, and two tokens are masked with p_mask = 0.5. The model gives both of them
    the probability 1/e, so each cross-entropy is 1. The loss is (1 / 0.5 + 1 / 0.5) / 4 = 1."""


def average_loss(cross_entropy):
    """Exercise 3: why 1 / p_mask.

    Take a text of two tokens and eps = 0, so that p_mask = t. Four things can happen to the text:
    neither token is masked, only the first, only the second, or both. Return the average of the
    loss of exercise 2 (with its division by p_mask and by B * T = 2) over t, uniform on [0, 1],
    and over what is masked.

    cross_entropy: a dict that knows what the model says in each case. Its key is a pair of bools:
    which tokens are masked. Its value is a pair of floats: the cross-entropies of the two tokens,
    0.0 for a token that is not masked.
    Returns a float, exact to 1 %. You may go through a thousand evenly spaced values of t (without
    0), and through the four cases at each, weighting a case by its probability. Or solve the
    integral on paper.

    Example: {(False, False): (0, 0), (True, False): (1, 0), (False, True): (0, 1), (True, True):
    (1, 1)} gives 1.0.

    How it is checked: there are two orders in which the model can write the text, one token after
    the other. In each of them the text has a probability. -log of it, per token and averaged over
    the two orders, must be your value, though no t and no p_mask occur in it."""


def unmask_step(model, x, mask_id, k):
    """Exercise 4: one step of writing.

    Let the model predict every mask of x. In each row, write the likeliest token at those k masked
    places where the model is most confident: where the probability of the likeliest token is
    highest. All other masks stay masks. The tokens that are no masks stay as they are.

    x: (B, T) long. Leave it unchanged. k: how many masks of each row to write; a row with fewer
    masks gets all of them written.
    Returns the new ids, (B, T) long.

    Example: x = [[7, 9, 9, 9]] with mask_id 9 and k = 1. If the likeliest tokens of the three masks
    are 2, 5 and 3, with probabilities 0.3, 0.8 and 0.6, the result is [[7, 9, 5, 9]]."""


def num_transfer_tokens(n_masks, steps):
    """Exercise 5: the schedule, which says how many masks each step writes.

    Divide the masks of each row as evenly as possible among the steps: no two steps differ by more
    than one, and the steps that write one more come first. The counts of a row add up to its masks.

    n_masks: (B, 1) long, the number of masks in each row. steps: an int, at least 1.
    Returns (B, steps) long.

    Example: n_masks [[7], [2]] and steps 3 give [[3, 2, 2], [1, 1, 0]]."""


def from_both_ends(noise):
    """Exercise 6: an order of writing of your own.

    The sampler asks a function like this one for the confidence of each place, and writes the
    places of the highest confidence first. Return a confidence with which a text is written from
    both ends to the middle: the first place, then the last, then the second, then the last but one,
    and so on.

    noise: (B, T) float, random numbers for orders that need them. This one needs only its shape.
    Returns (B, T) float, in which all values of a row are different.

    Example: for T = 5, the places are written in the order 0, 4, 1, 3, 2."""


def order_nll(model, ids, mask_id, order):
    """Exercise 7: how likely is a text, exactly, if it is written in a given order?

    Begin with masks in all places. For each place of order in turn: let the model predict the text
    as it is so far, add -log of the probability of the true token at this place, and write the true
    token there. The [MASK] logit does not count.

    ids: (T,) long, the true text. order: a list of all places 0 to T - 1.
    Returns a float, in nats for the whole text: the sum.

    Example: a model that gives each of 4 tokens the probability 1/4 everywhere: a text of 3 tokens
    gets 3 * log(4) = 4.159, in any order."""


def squared_forward_process(input_ids, mask_id, generator=None):
    """Exercise 8: another noise schedule.

    As in exercise 1, but mask with probability p(t) = t ** 2, so that more rows have few masks. The
    loss must then weight a masked token by p'(t) / p(t), where p' is the derivative of p, in place
    of 1 / p_mask. Only then is its average still the value of exercise 3. The loss of exercise 2
    divides by the third tensor, so return p(t) / p'(t) there. Draw t as
    1 - torch.rand(..., generator=generator), which is never 0.

    Returns noisy_batch, masked_indices and p(t) / p'(t), each (B, T), as in exercise 1.

    Example: a row with t = 0.5 is masked with probability 0.25, and its third tensor holds 0.25,
    since p'(t) = 2 t = 1. A row with t = 0.8: probability 0.64, third tensor 0.4."""
