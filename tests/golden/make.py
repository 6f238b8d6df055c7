"""Writes the golden parts of the current format, once: `python tests/golden/make.py`.

Later versions of softshard must read them. Beside each part lies what it says, decoded by the ten lines of
docs/format.md, which use nothing of softshard.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fakes.targets import in_draws, metadata, random_distributions, sequence, sketch  # noqa: E402
from softshard.shard.encode import encode_part  # noqa: E402
from softshard.shard.schema import SCHEMA_VERSION  # noqa: E402

VOCAB = 60
KINDS = {"threshold": 1, "threshold-draws": 3, "topk": 1, "nucleus": 1, "full": 1}


def rows_of(kind, draws, rng):
    for index, length in enumerate((30, 2, 45, 17) if kind == "full" else (120, 2, 180, 68)):
        tokens = sequence(f"{index:032x}", rng.integers(VOCAB, size=length), first_label=1 + index % 2 * (length > 2))
        distributions = random_distributions(rng, tokens.num_labels, vocab=VOCAB)
        drawn = [sketch(distributions, tokens.labels, kind=kind, rng=rng) for _ in range(draws)]
        yield tokens, in_draws(drawn)


def main():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text(), flags=re.DOTALL)
    scope = {}
    exec(code, scope)
    folder = HERE / f"v{SCHEMA_VERSION}"
    folder.mkdir()
    for name, draws in KINDS.items():
        kind = name.partition("-")[0]
        rows = list(rows_of(kind, draws, np.random.default_rng(len(name))))
        part = folder / f"{name}.parquet"
        part.write_bytes(encode_part(rows, fold=0, metadata=metadata(kind, draws=draws, vocab=VOCAB)))
        said = [
            [[one[0], int(one[1]), one[2].tolist(), one[3].round(7).tolist()] for one in scope["targets"](part, draw)]
            for draw in range(draws)
        ]
        (folder / f"{name}.json").write_text(json.dumps(said, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
