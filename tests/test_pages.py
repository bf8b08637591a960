"""Pages that are longer than the model's block: windows, and the steps that they share."""

import itertools

import pytest
import torch
from helpers import seeded, uniform_model

from diffusion import unmask
from lib.pages import generate_pages, page_windows, share_steps


def pages(fill, x, mask_id, block_size, steps=None, enough=4):
    windows = page_windows(x[0] == mask_id, block_size)
    return generate_pages(fill, x, mask_id, windows, share_steps(windows, steps, enough))


def masks(text):
    return torch.tensor([char == "_" for char in text])


@pytest.mark.parametrize("text, windows", [
    ("aaaa", []),                                             # nothing to write
    ("____", [(0, 4, 4, 4)]),                                 # shorter than a block
    ("a_______", [(0, 8, 8, 7)]),                             # as long as a block
    # half a block of context before; where nothing but masks follows, all of a window is final
    ("____________", [(0, 8, 8, 8), (4, 12, 12, 4)]),
    # where text follows a window, its last quarter is left to the next one
    ("__________bb", [(0, 8, 6, 8), (2, 10, 8, 4), (4, 12, 12, 2)]),
    ("a_______bbbbbbb_", [(0, 8, 6, 7), (2, 10, 8, 2), (8, 16, 16, 1)]),
    ("aaaaaaaaaaaaaaaa_", [(9, 17, 17, 1)]),                  # the page's end is as far as it goes
])
def test_the_windows_of_a_page_are_planned_as_documented(text, windows):
    """By hand, for a block of 8: (start, end, final before here, number of masks)."""
    masked = masks(text)
    before = masked.clone()
    assert page_windows(masked, 8) == windows
    assert torch.equal(masked, before)  # the page itself is not changed


def test_windows_slide_with_half_a_block_of_context():
    seen = []

    def fill(window, steps):
        seen.append((window.tolist(), steps))
        yield window.where(window != 9, len(seen))
    x = torch.tensor([[0] + [9] * 21])
    *_, x = pages(fill, x, 9, block_size=8, steps=18)
    assert x.tolist() == [[0] + [1] * 7 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 2]
    assert [steps for _, steps in seen] == [4, 4, 4, 4, 2]  # a full window has no more
    assert all(len(window[0]) == 8 for window, _ in seen)
    assert seen[1] == ([[1] * 4 + [9] * 4], 4)
    assert seen[4] == ([[3] * 2 + [4] * 4 + [9] * 2], 2)  # the last one ends with the page


def test_a_mask_has_context_on_both_sides_wherever_there_is_text():
    """The window that writes a mask for good reaches a quarter of a block beyond it, or the end."""
    x = torch.arange(100)[None] % 5
    x[0, [0, 5, 13, 14, 15, 16, 30, 31, 60, 90, 99]] = 5
    given, reach = x != 5, torch.zeros(100)

    def fill(window, _):
        at = next(i for i in range(100) if torch.equal(page[0, i:i + 16], window[0]))
        reach[at:at + 16] = torch.where(window[0] == 5, at + 16, reach[at:at + 16])
        yield window.where(window != 5, 7)
    page = x
    for page in pages(fill, x, 5, 16, 100):
        assert torch.equal(page[given], x[given])
    assert (page != 5).all()
    for i in (x[0] == 5).nonzero().flatten().tolist():
        assert reach[i] >= min(i + 5, 100)


def test_a_long_text_with_holes_is_filled_and_otherwise_unchanged():
    x = torch.arange(300).repeat(2, 1) % 5
    holes = torch.tensor([0, 1, 2, 50, 60, 61, 62, 63, 64, 65, 66, 67, 68, 200, 299])
    x[:, holes] = 5
    given = x != 5

    def fill(window, steps):
        assert window.shape[1] == 16 and (window == 5).any()
        return unmask(uniform_model, window, 5, steps, generator=seeded())
    states = list(pages(fill, x, 5, 16, 15))
    left = [int((state == 5).sum()) for state in [x, *states]]
    assert left[-1] == 0 and sum(a > b for a, b in itertools.pairwise(left)) == 15  # the passes
    assert all(torch.equal(state[given], x[given]) for state in states)


@pytest.mark.parametrize("seed", range(5))
def test_any_page_is_filled_and_every_state_keeps_what_was_given(seed):
    """Pages of random length with random holes, for blocks of several sizes."""
    g = seeded(seed)
    for block_size in (1, 2, 3, 7, 16):
        length = int(torch.randint(1, 60, (), generator=g))
        x = torch.randint(5, (2, length), generator=g)
        x[:, torch.rand(length, generator=g) < 0.5] = 5
        given, last = x != 5, x
        for last in pages(lambda w, _: iter([w.where(w != 5, 0)]), x, 5, block_size):
            assert torch.equal(last[given], x[given])
        assert (last != 5).all()


@pytest.mark.parametrize("steps, passes", [(1, 12), (7, 12), (24, 24), (1000, 1000)])
def test_the_windows_share_the_steps(steps, passes):
    """12 windows: each has at least one step, so fewer than 12 are not possible."""
    shares = []

    def fill(window, n):
        shares.append(n)
        yield window.where(window != 5, 0)
    *_, _ = pages(fill, torch.full((1, 100), 5), 5, 16, steps)
    assert len(shares) == 12 and min(shares) >= 1 and sum(shares) == passes


def test_steps_are_shared_in_proportion_to_the_masks_up_to_enough():
    windows = [(0, 0, 0, n_masks) for n_masks in (2, 4, 30)]
    assert share_steps(windows, None, enough=6) == [2, 4, 6]    # one per mask, no more than enough
    assert share_steps(windows, 12, enough=6) == [2, 4, 6]
    assert share_steps(windows, 24, enough=6) == [4, 8, 12]
    assert share_steps(windows, 6, enough=6) == [1, 2, 3]
    assert share_steps([], 5, enough=6) == []


@pytest.mark.parametrize("revise", [0.0, 0.3])
def test_a_page_that_fits_the_block_is_one_window(revise):
    def fill(window, steps):
        return unmask(uniform_model, window, 5, steps, revise=revise, generator=seeded())
    x = torch.full((2, 10), 5)
    states, window = list(pages(fill, x, 5, 16, 4)), list(fill(x, 4))
    assert torch.equal(torch.stack(states), torch.stack(window))
    assert list(pages(fill, torch.zeros(2, 10).long(), 5, 16, 4)) == []
