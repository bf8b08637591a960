"""
Draw assets/masks.png: a line of validation text at four times of the diffusion, and what the
shipped model predicts for each mask. Needs matplotlib: pip install ".[picture]".

    python tests/draw_masks.py assets/masks.png
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from diffusion import forward_process
from lib.checkpoint import load_checkpoint
from lib.tokenizer import encode
from main import SHIPPED

LINE = "Good morrow, neighbour Baptista."
MASK, RIGHT, WRONG = "#d8d6d0", "#1f5fbf", "#c0392b"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="of the picture")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    model, vocab, _ = load_checkpoint(SHIPPED)
    mask_id = model.config.mask_id
    x0 = torch.from_numpy(encode(LINE, vocab).astype("int64"))[None]      # (1, T)
    fig, ax = plt.subplots(figsize=(9, 3.1))
    for row, t in enumerate((0.0, 0.3, 0.7, 1.0)):
        x_t, hidden, _ = forward_process(x0, mask_id, t, torch.Generator().manual_seed(41), t)
        with torch.no_grad():
            p, predicted = model(x_t)[0, :, :mask_id].softmax(dim=-1).max(dim=-1)
        y = -3 * row
        ax.text(-1, y - 0.45, f"t = {t:g}", ha="right", va="center")
        for i, char in enumerate(LINE):
            style = dict(x=i, ha="center", va="center", family="monospace", size=13)
            if not hidden[0, i]:
                ax.text(y=y, s=char, **style)
                continue
            ax.add_patch(plt.Rectangle((i - 0.42, y - 0.45), 0.84, 0.9, color=MASK))
            guess, right = vocab[int(predicted[i])], predicted[i] == x0[0, i]
            ax.text(y=y - 1.1, s={" ": "␣", "\n": "↵"}.get(guess, guess),
                    color=RIGHT if right else WRONG, alpha=0.25 + 0.75 * float(p[i]), **style)
    ax.set(xlim=(-4, len(LINE)), ylim=(-10.8, 0.9))
    ax.axis("off")
    fig.savefig(args.path, dpi=100, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    main()
