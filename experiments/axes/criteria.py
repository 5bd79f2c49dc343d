"""Do Wanda and SparseGPT lose less than magnitude when half the weights of a trained model go?

    python experiments/axes/criteria.py    # about 6 minutes on 2 cores

The default space's reference model, trained from three seeds, loses half of its weights by each pattern and criterion,
without recovery; the loss is held-out bits per byte. The last line is one JSON object.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
from rich.progress import track

from cosearch import axes
from cosearch.architecture.decoder import plain_decoder
from cosearch.core.candidate import Candidate, Value
from cosearch.paths import cache_dir
from cosearch.precision import Precision
from cosearch.quality import Recipe, corpus
from cosearch.quality.evaluate import evaluate
from cosearch.quality.serve import served

SEEDS = (0, 1, 2)
PATTERNS: dict[str, dict[str, Value]] = {
    "2:4": {"sparsity.pattern": "n_m", "sparsity.n_m": "2:4"},
    "4:8": {"sparsity.pattern": "n_m", "sparsity.n_m": "4:8"},
    "blocks of 16": {"sparsity.pattern": "block", "sparsity.blocks_kept": 0.5},
    "channels": {"sparsity.pattern": "structured", "sparsity.channels_kept": 0.5, "sparsity.heads_kept": 1},
}
CRITERIA = ("magnitude", "wanda", "sparsegpt")
SINGLE_WEIGHTS = ("2:4", "4:8")
"""What SparseGPT knows."""


def bits_per_byte(point: dict[str, Value], recipe: Recipe, text: corpus.Corpus) -> float:
    one = Candidate.from_point(point)
    model = plain_decoder(axes.served_shape(one), Precision.of(one.precision))
    params = served(one, recipe, text, cache_dir(), lambda *_: None).params(model)
    return float(np.mean(evaluate(model, params, recipe, text)["bits_per_byte"]))


def main() -> None:
    text, reference = corpus.load("python"), dict(axes.load_space("llm_decode").reference.point)
    results = []
    for seed in track(SEEDS, "training and pruning"):
        # The same text is held out and evaluated for every seed; what differs is the start and the order of training.
        own = Recipe(seed=seed)
        dense = bits_per_byte(reference, own, text)
        for pattern, criterion in product(PATTERNS, CRITERIA):
            if criterion == "sparsegpt" and pattern not in SINGLE_WEIGHTS:
                continue
            bits = bits_per_byte(reference | PATTERNS[pattern] | {"sparsity.criterion": criterion}, own, text)
            results.append({"pattern": pattern, "criterion": criterion, "seed": seed, "dense": dense, "bits": bits})
    lines = ["| half of the weights, by | magnitude | wanda | sparsegpt |", "|---|---|---|---|"]
    for pattern in PATTERNS:
        cells = []
        for criterion in CRITERIA:
            lost = [
                one["bits"] - one["dense"]
                for one in results
                if (one["pattern"], one["criterion"]) == (pattern, criterion)
            ]
            cells.append(", ".join(f"{value:+.3f}" for value in lost) or "-")
        lines.append(f"| {pattern} | {' | '.join(cells)} |")
    (Path(__file__).parent / "criteria.md").write_text("\n".join(lines) + "\n")
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
