"""Pages that are longer than the model's block: how windows slide along, and what they write."""

import pytest
import torch
from helpers import seeded, uniform_model

from diffusion import unmask
from lib.pages import generate_pages, page_windows


def pages(fill, x, mask_id, block_size):
    return generate_pages(fill, x, mask_id, page_windows(x[0] == mask_id, block_size))


def masks(text):
    return torch.tensor([char == "_" for char in text])


@pytest.mark.parametrize("text, windows", [
    ("aaaa", []),                                             # nothing to write
    ("____", [(0, 4, 4)]),                                    # shorter than a block
    ("a_______", [(0, 8, 8)]),                                # as long as a block
    # half a block of context before; where nothing but masks follows, all of a window is final
    ("____________", [(0, 8, 8), (4, 12, 12)]),
    # where text follows a window, its last quarter is left to the next one
    ("__________bb", [(0, 8, 6), (2, 10, 8), (4, 12, 12)]),
    ("a_______bbbbbbb_", [(0, 8, 6), (2, 10, 8), (8, 16, 16)]),
    ("aaaaaaaaaaaaaaaa_", [(9, 17, 17)]),                     # the page's end is as far as it goes
])
def test_the_windows_of_a_page_are_planned_as_documented(text, windows):
    """By hand, for a block of 8: (start, end, final before here)."""
    masked = masks(text)
    before = masked.clone()
    assert page_windows(masked, 8) == windows
    assert torch.equal(masked, before)  # the page itself is not changed


def test_windows_slide_with_half_a_block_of_context():
    seen = []

    def fill(window):
        seen.append(window.tolist())
        yield window.where(window != 9, len(seen))
    x = torch.tensor([[0] + [9] * 21])
    *_, x = pages(fill, x, 9, block_size=8)
    assert x.tolist() == [[0] + [1] * 7 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 2]
    assert len(seen) == 5 and all(len(window[0]) == 8 for window in seen)
    assert seen[:2] == [[[0] + [9] * 7], [[1] * 4 + [9] * 4]]
    assert seen[4] == [[3] * 2 + [4] * 4 + [9] * 2]  # the last one ends with the page


def test_a_mask_has_context_on_both_sides_wherever_there_is_text():
    """The window that writes a mask for good reaches a quarter of a block beyond it, or the end."""
    x = torch.arange(100)[None] % 5
    x[0, [0, 5, 13, 14, 15, 16, 30, 31, 60, 90, 99]] = 5
    given, reach = x != 5, torch.zeros(100)

    def fill(window):
        at = next(i for i in range(100) if torch.equal(page[0, i:i + 16], window[0]))
        reach[at:at + 16] = torch.where(window[0] == 5, at + 16, reach[at:at + 16])
        yield window.where(window != 5, 7)
    page = x
    for page in pages(fill, x, 5, 16):
        assert torch.equal(page[given], x[given])
    assert (page != 5).all()
    for i in (x[0] == 5).nonzero().flatten().tolist():
        assert reach[i] >= min(i + 5, 100)


def test_a_long_text_with_holes_is_filled_and_otherwise_unchanged():
    x = torch.arange(300).repeat(2, 1) % 5
    holes = torch.tensor([0, 1, 2, 50, 60, 61, 62, 63, 64, 65, 66, 67, 68, 200, 299])
    x[:, holes] = 5
    given = x != 5

    def fill(window):
        assert window.shape[1] == 16 and (window == 5).any()
        return unmask(uniform_model, window, 5, 3, generator=seeded())
    states = list(pages(fill, x, 5, 16))
    assert (states[-1] != 5).all() and ((states[-1] >= 0) & (states[-1] < 5)).all()
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
        for last in pages(lambda w: iter([w.where(w != 5, 0)]), x, 5, block_size):
            assert torch.equal(last[given], x[given])
        assert (last != 5).all()


@pytest.mark.parametrize("revise", [0.0, 0.3])
def test_a_page_that_fits_the_block_is_one_window(revise):
    def fill(window):
        return unmask(uniform_model, window, 5, 4, revise=revise, generator=seeded())
    x = torch.full((2, 10), 5)
    states, window = list(pages(fill, x, 5, 16)), list(fill(x))
    assert torch.equal(torch.stack(states), torch.stack(window))
    assert list(pages(fill, torch.zeros(2, 10).long(), 5, 16)) == []
