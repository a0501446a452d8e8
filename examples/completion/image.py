"""Remove 70 % of a picture's pixels at random, complete it, and compare.

    python examples/completion/image.py                       # scikit-learn's photograph of a temple
    python examples/completion/image.py --picture mine.jpg

Writes holes.png, completed.png and before-after.png into the folder that --out names. The same completion
from the command line: nblora complete holes.png -o completed.png --rank 30 --plot before-after.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from nblora.completion.job import complete_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--picture", type=Path, help="any picture; default: china.jpg of scikit-learn")
    parser.add_argument("--missing", type=float, default=0.7, help="share of the pixels to remove")
    parser.add_argument("--width", type=int, help="shrink the picture to this width first")
    parser.add_argument("--rank", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the pixels that are removed, and of the fit")
    parser.add_argument("--out", type=Path, default=Path("completed-image"))
    given = parser.parse_args()

    original = (
        Image.fromarray(load_sample_image("china.jpg"))
        if given.picture is None
        else Image.open(given.picture).convert("RGB")
    )
    if given.width is not None:
        original = original.resize((given.width, round(original.height * given.width / original.width)))
    pixels = np.asarray(original)  # (height, width, 3)
    kept = np.random.default_rng(given.seed).random(pixels.shape[:2]) >= given.missing
    given.out.mkdir(parents=True, exist_ok=True)
    holes, completed = given.out / "holes.png", given.out / "completed.png"
    opacity = np.where(kept, 255, 0).astype(np.uint8)  # transparent is missing
    Image.fromarray(np.dstack([pixels * kept[:, :, None], opacity])).save(holes)

    report = complete_file(
        holes, completed, rank=given.rank, seed=given.seed, plot=given.out / "before-after.png"
    )
    with Image.open(completed) as picture:
        errors = np.asarray(picture)[~kept].astype(float) - pixels[~kept]
    print(report.summary)
    for name, error in report.rows()[1:]:
        print(f"RMSE on held-out pixels, {name}: {error}")
    print(f"RMSE on the removed pixels: {np.sqrt(np.mean(errors**2)):.4g} of 255")
    print(f"Wrote {holes}, {completed} and {given.out / 'before-after.png'}")


if __name__ == "__main__":
    main()
