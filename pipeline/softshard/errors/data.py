"""Errors that end the command with 3: data is not what it claims to be, and trying again cannot help."""

from __future__ import annotations

from softshard.errors.base import DataInvalid

__all__ = [
    "AdapterMissing",
    "AdapterNotApplied",
    "AdapterNotMergeable",
    "AdapterWithoutEffect",
    "ArchitectureUnsupported",
    "AuthorDominates",
    "BalanceImpossible",
    "BlendIncomplete",
    "BlendInvalid",
    "EngineDiffers",
    "FilterMatchesNothing",
    "HoldoutEmpty",
    "LogitsInvalid",
    "MergeDiffers",
    "ModelInvalid",
    "NotRepairable",
    "PartConflict",
    "PartCorrupt",
    "PartsFailed",
    "ResumeMismatch",
    "SequenceUnknown",
    "TargetsUnsuitable",
    "TokenizerMismatch",
    "TrainingDiverged",
    "VocabularyMismatch",
]


class EngineDiffers(DataInvalid):
    """A worker's engine differs from the one that part ids are computed from."""

    def __init__(self, *, what: str, expected: str, actual: str) -> None:
        self.what, self.expected, self.actual = what, expected, actual
        super().__init__(
            f"this worker's {what} is {actual}, the job's is {expected}, so its parts would not match their ids;"
            " give all workers the same environment and set `teacher.device`"
        )


class ArchitectureUnsupported(DataInvalid):
    """An engine cannot run this model architecture as a teacher."""

    def __init__(self, *, architecture: str, reason: str) -> None:
        self.architecture, self.reason = architecture, reason
        super().__init__(
            f"the vllm engine cannot use {architecture} as a teacher: {reason}; set `teacher.engine: transformers`"
        )


class AdapterNotApplied(DataInvalid):
    """An engine that should serve an adapted model does not return that model's distributions."""

    def __init__(self, *, model: str, share: float, difference: float, allowed: float) -> None:
        self.model, self.share, self.difference, self.allowed = model, share, difference, allowed
        super().__init__(
            f"{model}: on a known text the engine shows {share:.0%} of the adapter's effect and differs by"
            f" {difference:.2g} nats per token from the adapted model (allowed: {allowed:g}), so it may not have"
            " applied the adapter; set `teacher.engine: transformers`, or `teacher.dtype: float32`"
        )


class AdapterNotMergeable(DataInvalid):
    """An adapter of a kind that cannot be merged into the model's own weights."""

    def __init__(self, *, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(f"adapter {kind}: {reason}; train with another `train.adapter` to export a merged model")


class AdapterWithoutEffect(DataInvalid):
    """An adapter that does not change the base model's distributions, or no longer does once merged and rounded."""

    def __init__(self, *, adapter: str, rounded_to: str | None = None) -> None:
        self.adapter, self.rounded_to = adapter, rounded_to
        super().__init__(
            f"{adapter}: on a known text the adapter changes nothing, so nothing was exported; train it again"
            if rounded_to is None
            else f"{adapter}: rounded to {rounded_to}, the merged model is closer to the base model than to the adapted"
            " one, so nothing was exported; export with --dtype float32"
        )


class MergeDiffers(DataInvalid):
    """The logits of a merged model differ from those of the base model with its adapter."""

    def __init__(self, *, model: str, difference: float, allowed: float) -> None:
        self.model, self.difference, self.allowed = model, difference, allowed
        super().__init__(
            f"{model}: after merging, a logit differs by {difference:.2g} (allowed: {allowed:g}), so nothing was"
            " exported; serve the base model with its adapter, or train with a smaller learning rate"
        )


class HoldoutEmpty(DataInvalid):
    """No text is held out to evaluate a model on."""

    def __init__(self, *, data: str, problem: str, remedy: str) -> None:
        self.data, self.problem, self.remedy = data, problem, remedy
        super().__init__(f"{data}: {problem}; {remedy}")


class TokenizerMismatch(DataInvalid):
    """Data and model were made with different tokenizers; `difference` says in words where they differ, if known."""

    def __init__(
        self, *, data: str, data_fingerprint: str, model: str, model_fingerprint: str, difference: str | None = None
    ) -> None:
        self.data, self.model, self.difference = data, model, difference
        self.data_fingerprint, self.model_fingerprint = data_fingerprint, model_fingerprint
        where = f": {difference}" if difference else ""
        super().__init__(
            f"{data}: was made with tokenizer {data_fingerprint[:16]}, but the tokenizer of {model} is"
            f" {model_fingerprint[:16]}{where}; use a model with the tokenizer of the data, or recompute the data"
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
    """A stored file differs from its receipt, or cannot be decoded."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}; `softshard repair` moves it aside and makes it again")


class PartConflict(DataInvalid):
    """A file with other content already has the name of this part."""

    def __init__(self, *, uri: str, expected: str, actual: str) -> None:
        self.uri, self.expected, self.actual = uri, expected, actual
        super().__init__(
            f"{uri}: a file with other content exists here (sha256 {actual[:16]}, new content {expected[:16]});"
            " nothing was overwritten; move that file away and run the job again"
        )


class NotRepairable(DataInvalid):
    """A damaged file cannot be recomputed to what it was."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}")


class PartsFailed(DataInvalid):
    """Some tasks failed and were set aside; other parts are committed, and no manifest was written."""

    def __init__(self, *, failures: dict[str, str], out: str) -> None:
        self.failures, self.out = failures, out
        listed = "; ".join(f"{part}: {reason}" for part, reason in list(failures.items())[:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        super().__init__(
            f"{out}: {len(failures)} task(s) were set aside, and no manifest was written: {listed}{more};"
            " fix the cause and run the job again, committed parts are kept"
        )


class AdapterMissing(DataInvalid):
    """An adapter that a stage needs does not exist."""

    def __init__(self, *, uri: str) -> None:
        self.uri = uri
        super().__init__(f"{uri}: there is no finished adapter; run `softshard train JOB.yaml` first")


class SequenceUnknown(DataInvalid):
    """No part holds the requested sequence."""

    def __init__(self, *, sequence_id: str, out: str) -> None:
        self.sequence_id, self.out = sequence_id, out
        super().__init__(
            f"{out}: no sequence has an id that starts with {sequence_id!r}; `softshard status {out}` lists some"
        )


class ResumeMismatch(DataInvalid):
    """Saved training state belongs to other data, or to another order of it."""

    def __init__(self, *, saved: str, current: str, what: str = "manifest") -> None:
        self.saved, self.current, self.what = saved, current, what
        super().__init__(
            f"the saved state belongs to {what} {saved[:16]}, but the data has {what} {current[:16]};"
            " remove the checkpoint to start from the beginning"
        )


class FilterMatchesNothing(DataInvalid):
    """No sequence of a split matches the filter."""

    def __init__(self, *, uri: str, split: str, where: str) -> None:
        self.uri, self.split, self.where = uri, split, where
        super().__init__(f"{uri}: no sequence of the {split} split matches the filter ({where}); widen the filter")


class BlendIncomplete(DataInvalid):
    """The target sets of a blend do not hold the same sequences."""

    def __init__(self, *, missing: dict[str, tuple[int, list[str]]], num_sequences: int) -> None:
        self.missing, self.num_sequences = missing, num_sequences
        listed = "; ".join(
            f"{uri} lacks {count} of {num_sequences} ({', '.join(examples)}{', ...' if count > len(examples) else ''})"
            for uri, (count, examples) in missing.items()
        )
        super().__init__(
            f"the target sets of a blend must hold the same sequences: {listed}; score the rest, or filter them out"
        )


class BlendInvalid(DataInvalid):
    """Target sets that cannot be mixed or blended."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}")


class TargetsUnsuitable(DataInvalid):
    """Stored targets do not support the requested loss or settings."""

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: {problem}; compute targets of another kind, or change the training settings")


class BalanceImpossible(DataInvalid):
    """Groups of sequences cannot have the requested shares."""

    def __init__(self, *, column: str, problem: str) -> None:
        self.column, self.problem = column, problem
        super().__init__(f"train.balance: by {column}: {problem}; change `shares`, or the `column`")


class AuthorDominates(DataInvalid):
    """One author has a larger share of the training text, or of its weight in the loss, than the job allows."""

    def __init__(self, *, author: str, share: float, cap: float, of: str) -> None:
        self.author, self.share, self.cap, self.of = author, share, cap, of
        super().__init__(
            f"train.author_cap: author {author!r} has {share:.1%} of {of}, and one author may have at most {cap:.1%};"
            " add writing by others, list the author in the source's `consent` if they have agreed, or remove"
            " `group_field` if it does not name authors"
        )


class TrainingDiverged(DataInvalid):
    """A training step produced a loss or gradient that is not finite."""

    def __init__(self, *, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        super().__init__(
            f"training step {step}: the loss or its gradient is not finite (loss {loss});"
            " lower the `learning_rate`, or set `dtype: float32`"
        )
