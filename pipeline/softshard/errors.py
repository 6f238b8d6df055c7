"""The named errors of softshard and the exit code that each one ends the command with.

Every error carries its values, says on one line what is wrong, where, and the way out. Exit codes: 0 done, 1 a bug,
2 the job file or the arguments are wrong, 3 data is not what it claims (do not retry), 75 try again.
"""

from __future__ import annotations

__all__ = [
    "AdapterMissing",
    "AdapterNotInForce",
    "ArchitectureUnsupported",
    "BlendIncomplete",
    "BlendInvalid",
    "CorpusEmpty",
    "DataInvalid",
    "EngineDiffers",
    "EngineFailed",
    "EngineMissing",
    "ExtraMissing",
    "FoldEmpty",
    "HoldoutEmpty",
    "JobInvalid",
    "LeaseLost",
    "LogitsInvalid",
    "ManifestMissing",
    "ModelInvalid",
    "NotMendable",
    "NothingPasses",
    "OutputBusy",
    "OutputForeign",
    "OutputUnusable",
    "PartConflict",
    "PartCorrupt",
    "PartsFailed",
    "ResumeMismatch",
    "SequenceUnknown",
    "ShardedTwice",
    "SoftshardError",
    "SourceUnreadable",
    "Stopped",
    "StorageFull",
    "StoreUnavailable",
    "StoreUnusable",
    "TokenizerMismatch",
    "TrainingDiverged",
    "TryAgain",
    "VocabularyMismatch",
    "exit_code_of",
]

EXIT_BUG = 1
EXIT_JOB = 2
EXIT_DATA = 3
EXIT_TRY_AGAIN = 75


class SoftshardError(Exception):
    """Base of every error that softshard raises on purpose; `exit_code` is what the command ends with.

    Pickles by its message, so that an error raised on a worker reaches the client whole.
    """

    exit_code = EXIT_BUG

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[object, tuple[type[SoftshardError], str, dict[str, object]]]:
        return _rebuild, (type(self), str(self), self.__dict__)


def _rebuild(kind: type[SoftshardError], message: str, values: dict[str, object]) -> SoftshardError:
    error = kind.__new__(kind, message)
    SoftshardError.__init__(error, message)
    error.__dict__.update(values)
    return error


def exit_code_of(error: BaseException) -> int:
    """What the command ends with on an error; an interruption may be tried again, what nothing named is a bug."""
    if isinstance(error, SoftshardError):
        return error.exit_code
    return EXIT_TRY_AGAIN if isinstance(error, KeyboardInterrupt) else EXIT_BUG


class JobInvalid(SoftshardError):
    """The job file or an argument is wrong."""

    exit_code = EXIT_JOB

    def __init__(self, *, file: str, place: str, problem: str) -> None:
        self.file, self.place, self.problem = file, place, problem
        super().__init__(f"{file}: {place}: {problem}" if place else f"{file}: {problem}")


class EngineMissing(SoftshardError):
    """The job names an engine that is not installed."""

    exit_code = EXIT_JOB

    def __init__(self, *, engine: str) -> None:
        self.engine = engine
        super().__init__(
            f"teacher.engine: {engine} is not installed here; install softshard[{engine}],"
            " or use `engine: transformers`"
        )


class ExtraMissing(SoftshardError):
    """Something was asked for that an optional package does, and the package is not installed."""

    exit_code = EXIT_JOB

    def __init__(self, *, what: str, package: str, extra: str, remedy: str = "") -> None:
        self.what, self.package, self.extra = what, package, extra
        way_out = f", or {remedy}" if remedy else ""
        super().__init__(f"{what}: {package} is not installed here; install softshard[{extra}]{way_out}")


class OutputForeign(SoftshardError):
    """The output folder belongs to another job, or to something else altogether."""

    exit_code = EXIT_JOB

    def __init__(self, *, out: str, owner: str | None, job: str) -> None:
        self.out, self.owner, self.job = out, owner, job
        whose = f"belongs to job {owner!r}" if owner else "is not empty and holds no job.yaml of softshard"
        super().__init__(f"{out}: this folder {whose}, not to job {job!r}; give `out` another folder")


class OutputUnusable(SoftshardError):
    """The output folder cannot be written."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: cannot be written: {problem}; give `out` a folder on a disk that can be")


class StoreUnusable(SoftshardError):
    """An object store refuses what is asked of it, or does not do it."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, problem: str) -> None:
        self.uri, self.problem = uri, problem
        super().__init__(f"{uri}: the object store cannot be used: {problem}")


class DataInvalid(SoftshardError):
    """Data is not what it claims to be; trying again cannot help."""

    exit_code = EXIT_DATA


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


class ManifestMissing(SoftshardError):
    """A stage was asked for whose input is not complete, or was made with other settings."""

    exit_code = EXIT_JOB

    def __init__(self, *, uri: str, stage: str) -> None:
        self.uri, self.stage = uri, stage
        problem = f"not there, or made with other settings, so the {stage} stage is not complete"
        super().__init__(f"{uri}: {problem}; run `softshard {stage} JOB.yaml`")


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


class ShardedTwice(SoftshardError):
    """Batches that are dealt to ranks already would be dealt again, so that each rank would see a part of its own."""

    exit_code = EXIT_JOB

    def __init__(self, *, wrapper: str, num_processes: int) -> None:
        self.wrapper, self.num_processes = wrapper, num_processes
        super().__init__(
            f"accelerate's {wrapper} would deal batches to {num_processes} processes that are dealt to ranks already,"
            " and only some of the data would be seen; do not give this data set's loader to `accelerator.prepare`,"
            " and let a Trainer's `get_train_dataloader` return it as it is"
        )


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


class TrainingDiverged(DataInvalid):
    """A training step gave a loss or a gradient that is not finite."""

    def __init__(self, *, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        super().__init__(
            f"training step {step}: the loss or its gradient is not finite (loss {loss});"
            " lower the `learning_rate`, or set `dtype: float32`"
        )


class TryAgain(SoftshardError):
    """Something passed away that may be there again later."""

    exit_code = EXIT_TRY_AGAIN


class OutputBusy(TryAgain):
    """Another run works on the same output."""

    def __init__(self, *, out: str, holder: str) -> None:
        self.out, self.holder = out, holder
        super().__init__(f"{out}: {holder} works here; wait for its end, or stop it, and start again")


class LeaseLost(TryAgain):
    """This run was taken for dead, and another works on its output now."""

    def __init__(self, *, out: str, other: str | None) -> None:
        self.out, self.other = out, other
        super().__init__(
            f"{out}: this run stood still, or was cut off from its output, so {other or 'another run'} has taken over;"
            " what both have committed is kept, and never mixed"
        )


class EngineFailed(TryAgain):
    """An engine ended in the middle of its work."""

    def __init__(self, *, engine: str, problem: str) -> None:
        self.engine, self.problem = engine, problem
        super().__init__(f"the {engine} engine failed: {problem}; what is committed is kept, run the job again")


class Stopped(TryAgain):
    """A signal asked the run to stop; `finished` tasks were ended in the time it had, `dropped` ones were cut off."""

    def __init__(self, *, signal: str, finished: int, dropped: int) -> None:
        self.signal, self.finished, self.dropped = signal, finished, dropped
        super().__init__(
            f"stopped by {signal}: of the tasks in hand {finished} finished and {dropped} dropped; what is committed"
            " is kept, and the same command goes on from there"
        )


class StoreUnavailable(TryAgain):
    """An object store has not answered, or asks for patience, in all attempts."""

    def __init__(self, *, uri: str, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(
            f"{uri}: the object store does not answer ({reason}); what is committed is kept, run the job again"
        )


class StorageFull(TryAgain):
    """The disk is full."""

    def __init__(self, *, uri: str) -> None:
        self.uri = uri
        super().__init__(
            f"{uri}: no space left on the device; free some and run the job again, nothing written is lost"
        )
