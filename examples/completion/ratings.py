"""Ratings as a long table: predict the missing ones, and see what the predictions are worth.

    python examples/completion/ratings.py

Makes ratings of 300 people for 120 films (from 1 to 5, a third of the pairs, popular films more often),
writes ratings.csv and wanted.csv, and completes them. The same from the command line:
nblora complete ratings.csv -o predicted.csv --predict wanted.csv --weighting popularity
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from nblora.completion.job import complete_file


def make_ratings(people: int, films: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All ratings, and which of them are known: taste of rank 3, biases and noise of 0.5 stars."""
    random = np.random.default_rng(seed)
    taste = random.normal(size=(people, 3)) @ random.normal(size=(3, films)) * 0.45
    stars = 3.4 + 0.4 * random.normal(size=(people, 1)) + 0.5 * random.normal(size=films) + taste
    stars = np.clip(np.rint(2 * (stars + 0.5 * random.normal(size=stars.shape))) / 2, 1, 5)
    popularity = random.permutation(np.linspace(0.1, 0.6, films))
    known = random.random(stars.shape) < popularity
    rows, columns = np.indices(stars.shape).reshape(2, -1)
    table = pd.DataFrame(
        {
            "user": [f"user {i:03}" for i in rows],
            "item": [f"film {j:03}" for j in columns],
            "rating": stars.ravel(),
        }
    )
    return table[known.ravel()], table[~known.ravel()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--films", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("completed-ratings"))
    given = parser.parse_args()

    known, unknown = make_ratings(given.people, given.films, given.seed)
    wanted = unknown.sample(min(1000, len(unknown)), random_state=given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    known.to_csv(given.out / "ratings.csv", index=False)
    wanted[["user", "item"]].to_csv(given.out / "wanted.csv", index=False)
    report = complete_file(
        given.out / "ratings.csv",
        given.out / "predicted.csv",
        predict=given.out / "wanted.csv",
        weighting="popularity",
        seed=given.seed,
        plot=given.out / "spectrum.png",
    )
    predicted = pd.read_csv(given.out / "predicted.csv")["rating"].to_numpy()
    print(report.summary)
    for name, error in report.rows()[1:]:
        print(f"RMSE on held-out ratings, {name}: {error}")
    print(f"RMSE on the wanted ratings: {np.sqrt(np.mean((predicted - wanted['rating']) ** 2)):.4g} stars")
    print(f"Wrote {given.out}: ratings.csv, wanted.csv, predicted.csv, spectrum.png")


if __name__ == "__main__":
    main()
