"""
Draw a replay that main.py --html wrote as a moving picture, in the look of assets/replay.html.

    python main.py --seed=1 --html=run.html
    python tests/run_gif.py run.html assets/run.gif
    python main.py --path=sudoku --infill=assets/puzzle.txt --html=run.html
    python tests/run_gif.py run.html assets/sudoku.gif 24    # of larger letters

There is one frame for each state of the first page, or for every second one of a long run. Masks
are grey, fresh characters have a yellow background, and the others are coloured from blue (decided
first) to red (decided last). The script needs Pillow (pip install pillow) and the font DejaVu Sans
Mono, where Debian's fonts-dejavu-core installs it.
"""

import argparse
import colorsys
import json
import re
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSansMono-Bold.ttf"
PAPER, DIM, MASK, FRESH, INK = map(ImageColor.getrgb, (
    "#faf9f6", "#8a8a94", "#d8d6d0", "#ffe066", "#1c1c22"))
HUES = [tuple(round(255 * v) for v in colorsys.hls_to_rgb((265 - 265 * i / 11) / 360, .38, .75))
        for i in range(12)]
WIDTH, MARGIN = 700, 20                                 # pixels
FIRST, EACH, LAST = 900, 180, 3000                      # milliseconds


def states_of(html):
    """Return a caption and a page for every state. A page is a list of (character or None, number
    of the state in which it was decided)."""
    run = json.loads(re.search(r'<script id="run"[^>]*>(.*?)</script>', html, re.S)[1])
    writes = [all(char is not None for *_, char in changes) for changes in run["changes"]]
    page = [(char, 0) for char in run["start"][0]]
    states = [(f"step 0 of {sum(writes)}", list(page))]
    for number, changes in enumerate(run["changes"], 1):
        for row, position, char in changes:
            if row == 0:
                page[position] = char, number
        again = "" if writes[number - 1] else ", masked again"
        states.append((f"step {sum(writes[:number])} of {sum(writes)}{again}", list(page)))
    return states


def lines_of(page, columns):
    """Return the lines of a page, wrapped at so many columns."""
    lines = [[]]
    for char, decided in page:
        if char == "\n" or len(lines[-1]) == columns:
            lines.append([])
        if char != "\n":
            lines[-1].append((char, decided))
    while not lines[-1]:  # empty lines at the end
        lines.pop()
    return lines


def frames_of(states, size, every):
    """Yield the picture of the first, every so many and the last state. size: of the letters, in
    pixels."""
    font, small = (ImageFont.truetype(FONT, n) for n in (size, 16))
    width, height, last = round(font.getlength("M")), size * 3 // 2, len(states) - 1
    pages = [lines_of(page, (WIDTH - 2 * MARGIN) // width) for _, page in states]
    bottom = MARGIN + height * max(len(lines) for lines in pages) + height // 2
    right = 2 * MARGIN + round(max(
        *(width * len(line) for lines in pages for line in lines),
        *(small.getlength(caption) for caption, _ in states)))
    for now, ((caption, _), lines) in enumerate(zip(states, pages)):
        if now % every and now < last:
            continue
        image = Image.new("RGB", (min(WIDTH, right), bottom + 24 + MARGIN // 2), PAPER)
        draw = ImageDraw.Draw(image)
        draw.fontmode = "1"  # letters of one colour each: smoothed ones make a larger file
        for row, line in enumerate(lines):
            for column, (char, decided) in enumerate(line):
                x, y = MARGIN + column * width, MARGIN + row * height
                ink = HUES[11 * (decided - 1) // max(1, last - 1)] if decided else INK
                if char is None:
                    char, ink = "▒", MASK
                elif decided and now - every < decided <= now < last:
                    draw.rectangle([x, y, x + width - 1, y + height - 3], fill=FRESH)
                    ink = INK
                draw.text((x, y), char, font=font, fill=ink)
        draw.text((MARGIN, bottom), caption, font=small, fill=DIM)
        yield image


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the replay, an .html file")
    parser.add_argument("target", help="the .gif file to write")
    parser.add_argument("size", nargs="?", type=int, default=16, help="of the letters, in pixels")
    args = parser.parse_args()
    states = states_of(Path(args.source).read_text(encoding="utf-8"))
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for color in (PAPER, DIM, MASK, FRESH, INK, *HUES)
                        for value in color])
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE)
              for frame in frames_of(states, args.size, 1 + len(states) // 48)]
    frames[0].save(args.target, save_all=True, append_images=frames[1:], loop=0, optimize=True,
                   duration=[FIRST, *[EACH] * (len(frames) - 2), LAST])


if __name__ == "__main__":
    main()
