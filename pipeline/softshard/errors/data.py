"""Errors that end the command with 3: data is not what it claims to be, and trying again cannot help."""

from __future__ import annotations

from softshard.errors.base import DataInvalid

__all__ = [
    "AdapterMissing",
    "AdapterNotInForce",
    "AdapterNotMergeable",
    "AdapterWithoutEffect",
    "ArchitectureUnsupported",
    "BlendIncomplete",
    "BlendInvalid",
    "CorpusEmpty",
    "EngineDiffers",
    "FoldEmpty",
    "HoldoutEmpty",
    "LogitsInvalid",
    "MergeDiffers",
    "ModelInvalid",
    "NotMendable",
    "NothingPasses",
    "PartConflict",
    "PartCorrupt",
    "PartsFailed",
    "ResumeMismatch",
    "SequenceUnknown",
    "SourceUnreadable",
    "TokenizerMismatch",
    "TrainingDiverged",
    "VocabularyMismatch",
]


class SourceUnreadable(DataInvalid):
    """A source of the corpus does not exist or cannot be read as its format."""

    def __init__(self, *, source: str, uri: str, problem: str) -> None:
        self.source, self.uri, self.problem = source, uri, problem
        super().__init__(f"{uri}: source {source!r}: {problem}")


class CorpusEmpty(DataInvalid):
    """No document was left after screening."""

    def __init__(self, *, counts: dict[str, int], split: str | None = None) -> None:
        self.counts, self.split = counts, split
        seen = ", ".join(f"{count} {name}" for name, count in counts.items())
        where = f"the {split} split of the corpus" if split else "the corpus"
        super().__init__(f"{where} has no document ({seen}); check `corpus.sources` and `corpus.holdout_fraction`")


class EngineDiffers(DataInvalid):
    """A worker would score with another engine than the one that a part is named by."""

    def __init__(self, *, what: str, expected: str, actual: str) -> None:
        self.what, self.expected, self.actual = what, expected, actual
        super().__init__(
            f"this worker's {what} is {actual}, the job's is {expected}: parts would not be what their id says;"
            " give all workers the same environment and name `teacher.device`"
        )


class ArchitectureUnsupported(DataInvalid):
    """A model whose architecture an engine cannot make a teacher of."""

    def __init__(self, *, architecture: str, reason: str) -> None:
        self.architecture, self.reason = architecture, reason
        super().__init__(
            f"the vllm engine cannot make a teacher of {architecture}: {reason}; use `teacher.engine: transformers`"
        )


class AdapterNotInForce(DataInvalid):
    """An engine that should serve an adapted model does not give that model's distributions."""

    def __init__(self, *, model: str, share: float, difference: float, allowed: float) -> None:
        self.model, self.share, self.difference, self.allowed = model, share, difference, allowed
        super().__init__(
            f"{model}: on a known text the engine shows {share:.0%} of what the adapter changes, and is"
            f" {difference:.2g} nats a token from the adapted model (allowed: {allowed:g}), so the adapter is not"
            " proven to be in force; use `teacher.engine: transformers`, or `teacher.dtype: float32`"
        )


class AdapterNotMergeable(DataInvalid):
    """An adapter that no weights of the model's own shape can stand for."""

    def __init__(self, *, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(f"adapter {kind}: {reason}; train with another `train.adapter` to export a whole model")


class AdapterWithoutEffect(DataInvalid):
    """A model with an adapter whose distributions are those of the base, or would be once its weights are rounded."""

    def __init__(self, *, adapter: str, rounded_to: str | None = None) -> None:
        self.adapter, self.rounded_to = adapter, rounded_to
        super().__init__(
            f"{adapter}: on a known text the adapter changes nothing, so there is nothing to export"
            if rounded_to is None
            else f"{adapter}: rounded to {rounded_to}, the merged model is nearer to the base than to base and adapter,"
            " so nothing is written; export it with --dtype float32"
        )


class MergeDiffers(DataInvalid):
    """A merged model whose logits are not those of the base with its adapter."""

    def __init__(self, *, model: str, difference: float, allowed: float) -> None:
        self.model, self.difference, self.allowed = model, difference, allowed
        super().__init__(
            f"{model}: merged, a logit differs by {difference:.2g} (allowed: {allowed:g}), so nothing is written;"
            " serve base and adapter, or train with a smaller learning rate"
        )


class FoldEmpty(DataInvalid):
    """A fold of the style teacher would have nothing to train on."""

    def __init__(self, *, fold: int, folds: int, documents: int) -> None:
        self.fold, self.folds, self.documents = fold, folds, documents
        super().__init__(
            f"corpus: style teacher {fold} of {folds} would have no document to train on"
            f" ({documents} documents in all); add documents, or set `teacher.folds: 0` to use the model as it is"
        )


class HoldoutEmpty(DataInvalid):
    """There is nothing held out to measure a model on."""

    def __init__(self, *, data: str, problem: str, remedy: str) -> None:
        self.data, self.problem, self.remedy = data, problem, remedy
        super().__init__(f"{data}: {problem}; {remedy}")


class TokenizerMismatch(DataInvalid):
    """Data and model were made with different tokenizers."""

    def __init__(self, *, data: str, data_fingerprint: str, model: str, model_fingerprint: str) -> None:
        self.data, self.model = data, model
        self.data_fingerprint, self.model_fingerprint = data_fingerprint, model_fingerprint
        super().__init__(
            f"{data}: made with tokenizer {data_fingerprint[:16]}, but the tokenizer of {model} is"
            f" {model_fingerprint[:16]}; use a model with the tokenizer of the data, or recompute the data"
        )


class VocabularyMismatch(DataInvalid):
    """A model's output is smaller than the vocabulary of the data."""

    def __init__(self, *, data: str, data_size: int, model: str, model_size: int) -> None:
        self.data, self.data_size, self.model, self.model_size = data, data_size, model, model_size
        super().__init__(
            f"{model}: gives logits for {model_size} tokens, but {data} has a vocabulary of {data_size};"
            " teacher and student must share one tokenizer"
        )


class ModelInvalid(DataInvalid):
    """A model folder cannot be loaded."""

    def __init__(self, *, model: str, problem: str) -> None:
        self.model, self.problem = model, problem
        super().__init__(f"{model}: {problem}")


class LogitsInvalid(DataInvalid):
    """A model gave NaN or +inf; `setting` is the key of the job file that chooses its type."""

    def __init__(
        self,
        *,
        sequence_id: str,
        position: int,
        value: float,
        model: str = "the teacher",
        setting: str = "teacher.dtype",
    ) -> None:
        self.sequence_id, self.position, self.value = sequence_id, position, value
        self.model, self.setting = model, setting
        super().__init__(
            f"sequence {sequence_id}, position {position}: the logits of {model} contain {value};"
            f" check the model's weights, or set `{setting}: float32`"
        )


class PartCorrupt(DataInvalid):
    """A part is not the bytes that its receipt names, or cannot be decoded."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}; `softshard repair` sets it aside and makes it again")


class PartConflict(DataInvalid):
    """Another file with other bytes already has the name of this part."""

    def __init__(self, *, uri: str, expected: str, actual: str) -> None:
        self.uri, self.expected, self.actual = uri, expected, actual
        super().__init__(
            f"{uri}: a file with sha256 {actual[:16]} is already there where {expected[:16]} was to be written;"
            " nothing was overwritten; move that file away and run the job again"
        )


class NotMendable(DataInvalid):
    """What is bad in an output cannot be made again as it was."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}")


class PartsFailed(DataInvalid):
    """Parts were set aside; the others are committed, and no manifest was written."""

    def __init__(self, *, failures: dict[str, str], out: str) -> None:
        self.failures, self.out = failures, out
        named = "; ".join(f"{part}: {why}" for part, why in list(failures.items())[:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        super().__init__(
            f"{out}: {len(failures)} task(s) were set aside, no manifest was written: {named}{more};"
            " mend the cause and run the job again, what is committed is kept"
        )


class AdapterMissing(DataInvalid):
    """An adapter that a stage needs is not there."""

    def __init__(self, *, uri: str) -> None:
        self.uri = uri
        super().__init__(f"{uri}: no finished adapter is here; run `softshard train JOB.yaml` first")


class SequenceUnknown(DataInvalid):
    """No part holds the sequence that was asked for."""

    def __init__(self, *, sequence_id: str, out: str) -> None:
        self.sequence_id, self.out = sequence_id, out
        super().__init__(
            f"{out}: no sequence has an id that starts with {sequence_id!r}; `softshard status {out}` names some"
        )


class ResumeMismatch(DataInvalid):
    """Saved training state belongs to other data, or to another order of it."""

    def __init__(self, *, saved: str, current: str, what: str = "manifest") -> None:
        self.saved, self.current, self.what = saved, current, what
        super().__init__(
            f"the saved state belongs to {what} {saved[:16]}, the data is {what} {current[:16]};"
            " remove the checkpoint to start again"
        )


class NothingPasses(DataInvalid):
    """No sequence of a split passes the filter."""

    def __init__(self, *, uri: str, split: str, where: str) -> None:
        self.uri, self.split, self.where = uri, split, where
        super().__init__(f"{uri}: no sequence of the {split} split passes the filter ({where}); widen it")


class BlendIncomplete(DataInvalid):
    """Target sets that are to be blended do not hold the same sequences."""

    def __init__(self, *, missing: dict[str, tuple[int, list[str]]], num_sequences: int) -> None:
        self.missing, self.num_sequences = missing, num_sequences
        listed = "; ".join(
            f"{uri} lacks {count} of {num_sequences} ({', '.join(some)}{', ...' if count > len(some) else ''})"
            for uri, (count, some) in missing.items()
        )
        super().__init__(f"target sets of a blend must hold the same sequences: {listed}; score them all, or filter")


class BlendInvalid(DataInvalid):
    """Target sets that cannot be mixed or blended with each other."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}")


class TargetsUnsuitable(DataInvalid):
    """Stored targets that cannot be trained on as asked."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}; compute targets of another kind, or train on them as they are stored")


class BalanceImpossible(DataInvalid):
    """Groups of sequences cannot be given the shares that are asked for."""

    def __init__(self, *, column: str, problem: str) -> None:
        self.column, self.problem = column, problem
        super().__init__(f"train.balance: by {column}: {problem}; change `shares`, or the `column`")


class AuthorDominates(DataInvalid):
    """One author's writing is more of what would be trained on, or weighs more in the loss, than the job allows."""

    def __init__(self, *, author: str, share: float, cap: float, of: str) -> None:
        self.author, self.share, self.cap, self.of = author, share, cap, of
        super().__init__(
            f"train.author_cap: author {author!r} has {share:.1%} of {of}, at most {cap:.1%} may be one"
            " author's; add other writing, name the author in the `consent` of the source if there is consent, or leave"
            " `group_field` out where it does not name authors"
        )


class TrainingDiverged(DataInvalid):
    """A training step gave a loss or a gradient that is not finite."""

    def __init__(self, *, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        super().__init__(
            f"training step {step}: the loss or its gradient is not finite (loss {loss});"
            " lower the `learning_rate`, or set `dtype: float32`"
        )
