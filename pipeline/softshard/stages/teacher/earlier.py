"""Adapters of earlier corpora: which of them the present corpus can keep, and which can be trained as before."""

from __future__ import annotations

from dataclasses import dataclass, replace

from softshard.corpus.documents import train_documents_outside
from softshard.errors import PartCorrupt
from softshard.finetune.record import check_files
from softshard.stages.corpus.stage import StoredCorpus
from softshard.storage import Store
from softshard.teacher.documents import DOCUMENTS_FILE, TrainedDocuments, decode_documents
from softshard.teacher.record import AdapterReceipt, adapters_of_fold
from softshard.teacher.style import FoldSpec

__all__ = ["EarlierAdapters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierAdapters:
    """The adapters in a `teacher/` folder, seen from the present corpus."""

    store: Store
    """The `teacher/` folder."""
    corpus: StoredCorpus
    max_growth: float
    """The job's `teacher.retrain_growth`."""

    def find(self, spec: FoldSpec) -> AdapterReceipt | None:
        """The adapter with the most labels, ties by id, that can be kept for a fold. Raises PartCorrupt."""
        # Where the text has shrunk, a document is missing, whatever was added.
        candidates = [
            receipt
            for receipt in adapters_of_fold(self.store, spec.fold)
            if receipt.recipe == spec.recipe and 0 <= self.growth(receipt) <= self.max_growth
        ]
        for receipt in sorted(candidates, key=lambda candidate: (-candidate.num_labels, candidate.adapter_id)):
            try:
                if self._all_outside(self._read_documents(receipt.folder), fold=spec.fold):
                    check_files(self.store, receipt.folder, receipt.files)
                    return receipt
            except FileNotFoundError:
                continue
        return None

    def growth(self, receipt: AdapterReceipt) -> float:
        """Growth of the text outside an adapter's fold since its training, as a share of the labels then."""
        slices = self.corpus.manifest.slices
        labels = sum(part.num_labels for part in slices if part.split == "train" and part.fold != receipt.fold)
        return labels / receipt.num_labels - 1

    def spec_as_listed(self, spec: FoldSpec, folder: str) -> FoldSpec | None:
        """The spec of the adapter in a folder, from its list of documents; None if it cannot be trained as before."""
        try:
            listed = self._read_documents(folder)
        except (FileNotFoundError, PartCorrupt):
            return None
        before = replace(spec, documents=listed.digests(spec.other_folds))
        return before if before.folder == folder and self._all_outside(listed, fold=spec.fold) else None

    def _read_documents(self, folder: str) -> TrainedDocuments:
        path = f"{folder}/{DOCUMENTS_FILE}"
        return decode_documents(self.store.read(path), uri=f"{self.store.uri}/{path}")

    def _all_outside(self, trained: TrainedDocuments, *, fold: int) -> bool:
        """Whether all documents of a list are in the train split of the corpus, outside a fold."""
        outside = train_documents_outside(self.corpus.store, self.corpus.manifest.documents, fold=fold)
        return bool(trained.series().is_in(outside.implode()).all())
