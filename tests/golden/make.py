"""Writes the golden parts of each version of the format, once: `python tests/golden/make.py`.

Later versions of softshard must read them, and none is written again. Beside each part lies what it says, decoded by
the ten lines of docs/format.md, which use nothing of softshard.
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
from softshard.shard.schema import PART_SCHEMAS, SCHEMA_VERSION  # noqa: E402

VOCAB = 60
KINDS = {"threshold": 1, "threshold-draws": 3, "topk": 1, "nucleus": 1, "full": 1}


def spans_of(version, index, length):
    """Labels to the end; or from version 2 on also runs between context, of which some end before the sequence."""
    first = 1 + index % 2 * (length > 2)
    if version == SCHEMA_VERSION or length < 12:
        return ((first, length),)
    return ((first, first + 3), (first + 7, first + 8), (length - 3, length - index % 2))


def rows_of(kind, draws, rng, *, version):
    for index, length in enumerate((30, 2, 45, 17) if kind == "full" else (120, 2, 180, 68)):
        spans = spans_of(version, index, length)
        tokens = sequence(f"{index:032x}", rng.integers(VOCAB, size=length), label_spans=spans)
        distributions = random_distributions(rng, tokens.num_labels, vocab=VOCAB)
        drawn = [sketch(distributions, tokens.labels, kind=kind, rng=rng) for _ in range(draws)]
        yield tokens, in_draws(drawn)


def main():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text(), flags=re.DOTALL)
    scope = {}
    exec(code, scope)
    for version in PART_SCHEMAS:
        if not (folder := HERE / f"v{version}").exists():
            folder.mkdir()
            write_parts(folder, version, scope["targets"])


def write_parts(folder, version, targets):
    for name, draws in KINDS.items():
        kind = name.partition("-")[0]
        rows = list(rows_of(kind, draws, np.random.default_rng(len(name)), version=version))
        part = folder / f"{name}.parquet"
        described = metadata(kind, draws=draws, vocab=VOCAB, version=version)
        part.write_bytes(encode_part(rows, fold=0, metadata=described))
        said = [
            [[name, int(label), ids.tolist(), weights.round(7).tolist()] for name, label, ids, weights in labels]
            for labels in (targets(part, draw) for draw in range(draws))
        ]
        (folder / f"{name}.json").write_text(json.dumps(said, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
