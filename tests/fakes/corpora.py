"""A small corpus of one source, built by the package, and its manifest."""

from __future__ import annotations

from softshard.config import CorpusSettings
from softshard.corpus.build import build_corpus
from softshard.models import load_tokenizer
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter


def build_small_corpus(folder, uri, model, *, folds, sequences_per_part):
    source = {"name": "letters", "uri": str(uri), "style": "plain", "license": "CC0-1.0", "rights_basis": "owned"}
    settings = CorpusSettings.model_validate(
        {
            "sources": [source],
            "holdout_fraction": 0.25,
            "context_tokens": 24,
            "overlap_tokens": 6,
            "sequences_per_part": sequences_per_part,
        }
    )
    store = LocalStore(folder)
    tokenizer = load_tokenizer(model)
    return store, build_corpus(
        settings=settings, tokenizer=tokenizer, folds=folds, seed=1, store=store, reporter=SilentReporter()
    )
