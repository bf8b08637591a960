"""Sampling where the right answer is certain: how sure the model is of a page, and the search."""

import pytest
import torch
import torch.nn.functional as F
from helpers import counting, last, seeded, sure_by_place

from diffusion import unmask
from lib.search import certainty, unmask_until_sure


def meet(i, j):
    """Whether two cells of a 4 x 4 Sudoku stand in the same row, column or box."""
    (r, c), (s, d) = divmod(i, 4), divmod(j, 4)
    return i != j and (r == s or c == d or (r // 2, c // 2) == (s // 2, d // 2))


MEET = torch.tensor([[meet(i, j) for j in range(16)] for i in range(16)]).double()  # (16, 16)


def rules(x):
    """A predictor that knows the rules of a 4 x 4 Sudoku: in a cell stands what stands nowhere in
    its row, column and box, and of two such digits rather the smaller one. Where one digit is left,
    it is certain."""
    return -30.0 * (MEET @ F.one_hot(x, 5).double() > 0) - 0.2 * torch.arange(5)    # (B, 16, 5)


def grid(cells):
    return torch.tensor([["1234_".index(cell) for cell in cells.replace(" ", "")]])


def solved(x):
    """(B,): whether no cell is empty, and no digit is twice in a row, column or box."""
    return (x < 4).all(1) & (rules(x).gather(-1, x[..., None])[..., 0] > -1).all(1)


SOLUTION = grid("1234 3412 2143 4321")
EASY = grid("___4 34__ __4_ _3__")       # there is always a cell where one digit is left
GUESSWORK = grid("____ ____ 12_3 4___")  # soon, no cell is certain, and the smaller digit is wrong
IMPOSSIBLE = grid("11__ ____ 12_3 4___")


def test_a_puzzle_is_solved_by_writing_what_is_certain_first():
    assert solved(SOLUTION) and not solved(IMPOSSIBLE)
    assert solved(last(unmask(rules, EASY, 4, 16, 0.0, "low_confidence")))
    assert not all(solved(last(unmask(rules, EASY, 4, 16, 0.0, "random", generator=seeded(seed))))
                   for seed in range(8))


def test_certainty_is_the_least_probability_of_a_written_token():
    written = torch.ones(1, 16, dtype=torch.bool)
    wrong = SOLUTION.clone()
    wrong[0, 5] = 0
    assert certainty(rules, SOLUTION, written, 4)[0] > 1 - 1e-9
    # what contradicts its row gets exp(-30) beside a certain digit, or about 1/4 if all contradict
    assert certainty(rules, wrong, written, 4)[0] < 0.4
    model, calls = counting(rules)  # a quarter of the cells is masked in each pass, then a fifth
    certainty(model, SOLUTION, written, 4)
    assert [int((x == 4).sum()) for x in calls] == [4] * 4 + [3, 4, 3, 3, 3]
    assert (sum((x == 4).long() for x in calls) == 2).all()
    both = torch.cat([SOLUTION, wrong])
    assert certainty(rules, both, torch.zeros_like(both, dtype=torch.bool), 4).tolist() == [1, 1]


def test_certainty_by_hand():
    """Only written tokens count: the given one, of probability 0.1, does not."""
    model = sure_by_place(0.9, 0.5, 0.7, 0.1, 0.6)
    x, written = torch.zeros(1, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 1]]).bool()
    assert certainty(model, x, written, 3).item() == pytest.approx(0.5)
    written[0, 1] = False
    assert certainty(model, x, written, 3).item() == pytest.approx(0.6)


def search(model, x, tries=16, **settings):
    return list(unmask_until_sure(model, x, 4, tries, **settings))


def test_a_wrong_guess_is_noticed_and_replaced():
    [*_, draft] = search(rules, GUESSWORK, tries=1)
    assert not solved(draft)
    assert torch.equal(draft, last(unmask(rules, GUESSWORK, 4, 16, 0.0, "low_confidence",
                                          threshold=0.999)))
    [*_, x] = search(rules, GUESSWORK)
    assert solved(x) and torch.equal(x[GUESSWORK < 4], GUESSWORK[GUESSWORK < 4])


def test_a_sure_answer_needs_one_try_and_certain_cells_are_written_together():
    model, calls = counting(rules)
    assert solved(search(model, EASY)[-1])
    assert len(calls) < int((EASY == 4).sum()) + 9           # nine check the full page
    model, calls = counting(rules)
    search(model, EASY, threshold=1.0)                       # a cell in each pass
    assert len(calls) == int((EASY == 4).sum()) + 9


def test_the_surest_try_is_the_answer():
    """Of givens that contradict each other, no try is sure."""
    states = search(rules, IMPOSSIBLE, tries=6)
    *tries, answer = [x for x in states if (x != 4).all()]
    assert len(tries) == 6 and not solved(answer)
    found = [certainty(rules, x, IMPOSSIBLE == 4, 4).item() for x in tries]
    assert max(found) < 0.999 and torch.equal(answer, tries[found.index(max(found))])
    assert all(torch.equal(x[IMPOSSIBLE != 4], IMPOSSIBLE[IMPOSSIBLE != 4]) for x in states)


def test_the_likeliest_alternative_comes_first():
    """Two independent places, of probabilities (0.6, 0.4) and (0.9, 0.1), and no page is sure: the
    pages come in the order of their probabilities, and after the last one the search ends."""
    logits = torch.tensor([[[0.6, 0.4], [0.9, 0.1]]]).log()
    model = lambda x: F.pad(logits.expand(len(x), -1, -1), (0, 1))  # noqa: E731
    def pages(threshold):
        states = unmask_until_sure(model, torch.full((1, 2), 2), 2, 9, threshold)
        return [tuple(x[0].tolist()) for x in states if (x != 2).all()]
    *found, answer = pages(threshold=0.999)
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1)] and answer == (0, 0)
    # of tokens written together, only the least probable one has alternatives
    assert pages(threshold=0.5) == [(0, 0), (1, 0), (1, 1), (0, 0)]
