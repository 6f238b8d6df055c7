"""Which tokens of a sequence are labels."""

import numpy as np
import pytest

from fakes.targets import sequence

TOKENS = np.arange(100, 112)


def test_labels_are_the_tokens_of_the_spans_and_positions_lie_before_them():
    tokens = sequence("a", TOKENS, label_spans=((2, 4), (4, 5), (9, 12)))
    assert tokens.num_labels == 6
    assert tokens.label_indices.tolist() == [2, 3, 4, 9, 10, 11]
    assert tokens.positions.tolist() == [1, 2, 3, 8, 9, 10]
    assert tokens.labels.tolist() == [102, 103, 104, 109, 110, 111]


@pytest.mark.parametrize(
    "spans", [(), ((0, 3),), ((1, 13),), ((5, 5),), ((5, 4),), ((4, 6), (5, 8)), ((6, 8), (2, 4)), ((-2, 3),)]
)
def test_spans_that_cannot_be_labels_are_refused(spans):
    with pytest.raises(ValueError, match="label_spans is"):
        sequence("a", TOKENS, label_spans=spans)
