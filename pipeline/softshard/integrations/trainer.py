"""Training from targets with Trainer of transformers, and its descendants such as TRL's SFTTrainer.

In: a `SoftLabelDataset`, a stream whose batches are sharded over ranks already, or rows of a map-style data set with a
`SoftLabelCollator`, which Trainer shards. Out: Trainer's own steps, checkpoints and logs. The loss is the mean over
labels by their weights, over gradient accumulation and ranks, and in evaluation over all batches and ranks. A stream
resumes from a checkpoint after the batch that was trained last, on any number of processes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from softshard.data.dataset import SoftLabelDataset
from softshard.data.mix import SoftLabelMix
from softshard.data.sharding import ShardedBatches
from softshard.data.text import StreamState
from softshard.errors import ResumeMismatch
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.integrations.causal_lm import accept_targets, mean_weights, weight_of_step
from softshard.models import check_tokenizer, wrap_tokenizer

__all__ = ["SoftLabelTraining"]

_POSITION_FILE = "softshard.json"
"""In a checkpoint: the position in the data, the data's digest, and the epoch in which the training began."""


class SoftLabelTraining:
    """A mixin to put before a Trainer: `class SoftLabelTrainer(SoftLabelTraining, Trainer): ...`.

    Columns of rows are kept (`remove_unused_columns` is set to False). For a stream, `train` sets `max_steps` unless it
    is given, so that the last step ends with the last of `num_train_epochs` epochs. The batch size of the arguments is
    ignored, loaders are not given to accelerate, and Trainer counts the whole training as one epoch.

    Args:
        vocab_size, objective, chunk_positions: as in `accept_targets`.

    Raises:
        ValueError: an argument would have no effect, or not the usual one; a stream is given for evaluation, which
            needs rows; a stream is sharded over another number of processes than there are; or the objective's
            temperature is not that of the stream's targets.
        TokenizerMismatch: the `processing_class` is not the tokenizer of the stream.
        ModelInvalid, VocabularyMismatch: as in `accept_targets`.
    """

    args: Any
    model: Any
    model_init: Any
    accelerator: Any
    processing_class: Any
    compute_loss_func: Any
    train_dataset: Any
    eval_dataset: Any
    add_callback: Any
    compute_loss_context_manager: Any
    _prepare_inputs: Any
    compute_metrics: Any
    preprocess_logits_for_metrics: Any
    state: Any

    def __init__(
        self,
        *args: Any,
        vocab_size: int,
        objective: Objective = CROSS_ENTROPY,
        chunk_positions: int = 512,
        **kwargs: Any,
    ) -> None:
        self._accept = functools.partial(
            accept_targets, vocab_size=vocab_size, objective=objective, chunk_positions=chunk_positions
        )
        super().__init__(*args, **kwargs)
        _refuse_overridden(self)
        if self.model_init is None:
            self._accept(self.model)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.args.remove_unused_columns = False
        self._stream: _Stream | None = None
        self._batches_left: int | None = None
        self._measured = [0.0, 0.0]
        if isinstance(data := self.train_dataset, ShardedBatches):
            _check_stream(self, data, objective)
            self.args.ignore_data_skip = True  # the stream is set to its position, without reading up to it
            self._epochs = self.args.num_train_epochs if self.args.max_steps <= 0 else None
            self._first_epoch = 0
            self.add_callback(_SavePosition(self))

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """A new model that accepts targets."""
        parent: Any = super()
        model = parent.call_model_init(*args, **kwargs)
        self._accept(model)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's. Raises ResumeMismatch for a checkpoint of other data, or of another order of the same data."""
        parent: Any = super()
        if isinstance(self.train_dataset, ShardedBatches):
            folder: Any = resume_from_checkpoint
            if resume_from_checkpoint is True:
                folder = get_last_checkpoint(self.args.output_dir)
            self._resume(Path(folder) if folder else None)
        return parent.train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _resume(self, checkpoint: Path | None) -> None:
        """Set the stream to its position, and `max_steps` to the steps taken before plus those that remain."""
        data, taken = self.train_dataset, 0
        if checkpoint is None:
            if self._stream is not None:  # after an earlier training only its workers' copies have advanced
                data.load_state_dict(self._stream.position)
            self._first_epoch = data.state_dict()["epoch"]
        else:
            saved = json.loads((checkpoint / _POSITION_FILE).read_text())
            data.load_state_dict(saved["stream"])
            if saved["digest"] != data.digest:
                raise ResumeMismatch(saved=saved["digest"], current=data.digest, what="content")
            self._first_epoch = saved["first_epoch"]
            taken = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
        if self._epochs is not None:
            self._batches_left = data.batches_until(self._first_epoch + self._epochs)
            self.args.max_steps = taken + math.ceil(self._batches_left / self.args.gradient_accumulation_steps)

    def get_train_dataloader(self) -> Any:
        """For a stream, a loader over all epochs that is not sharded again; else Trainer's own."""
        parent: Any = super()
        if not isinstance(self.train_dataset, ShardedBatches):
            return parent.get_train_dataloader()
        workers = self.args.dataloader_num_workers
        self._stream = _Stream(
            self.train_dataset,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=workers > 0,
        )
        self._stream.position = self.train_dataset.state_dict()
        self._stream.num_left = self._batches_left
        return self._stream

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's. Of a stream, `epoch` counts passes over the data, and no samples per second are reported.

        Trainer would count the whole training as one epoch, and samples by the batch size that a stream ignores.
        """
        parent: Any = super()
        if self._stream is not None:
            self.state.epoch = self._stream.num_epochs_since(self._first_epoch)
            logs.pop("train_samples_per_second", None)
        parent.log(logs, start_time)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Batches of a step, and the weight of their labels over all processes, which need not be an integer."""
        parent: Any = super()
        batches, _ = parent.get_batch_samples(epoch_iterator, num_batches, device)
        moved = [{"position_weights": mean_weights(batch).to(device)} for batch in batches]
        return batches, weight_of_step(*moved) if moved else None

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """A batch's part of the step's mean, times the number of processes, because gradients are averaged over them.

        Outside a training step, as in evaluation, the mean of the batch.
        """
        training = model.training
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch if training else None)
        loss = outputs.loss * self.accelerator.num_processes if training else outputs.loss
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As Trainer's, but with the mean over labels by their weights instead of the mean over batches."""
        parent: Any = super()
        self._measured = [0.0, 0.0]
        output = parent.evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        measured = torch.tensor(self._measured, dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            measured = self.accelerator.reduce(measured.to(self.args.device))
        loss, weight = measured.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / weight if weight > 0 else 0.0
        return output

    def prediction_step(
        self, model: Any, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The mean of a batch, without logits. Rows that accelerate repeats to fill the last batch do not count."""
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            total = model(**inputs, num_items_in_batch=1.0).loss
        weight = mean_weights(inputs).sum()
        self._measured = [self._measured[0] + float(total), self._measured[1] + float(weight)]
        return total / torch.where(weight > 0, weight, 1.0), None, None

    def _without_repeats(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with weight zero for the rows that accelerate repeats to fill a loader's last batch.

        Of the rows of all processes together, in order of rank, only the first `remainder` are not repeated.
        """
        loader = self.accelerator.gradient_state
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return inputs
        if (starts := inputs.get("cu_seq_lens_q")) is not None:
            row = torch.searchsorted(starts[1:].long(), inputs["positions"], right=True)
            num_rows = len(starts) - 1
        else:
            num_rows, length = inputs["input_ids"].shape
            row = inputs["positions"] // length
        counts = row + self.accelerator.process_index * num_rows < loader.remainder
        weights: dict[str, Any] = {
            name: inputs[name] * counts for name in ("position_weights", "counted") if name in inputs
        }
        return {**inputs, **weights}


def _refuse_overridden(trainer: SoftLabelTraining) -> None:
    """Raise ValueError for arguments that the loss on targets overrides, and for evaluation on a stream."""
    arguments = trainer.args
    if arguments.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor={arguments.label_smoothing_factor} has no effect on targets; give 0")
    if getattr(arguments, "loss_type", "nll") != "nll":
        raise ValueError(f"loss_type={arguments.loss_type!r} has no effect on targets; give `objective` instead")
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func has no effect on targets; give `objective` instead")
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if getattr(trainer, name, None) is not None:
            raise ValueError(f"{name} would get no logits: the loss on targets makes none; evaluate it by yourself")
    _refuse_preprocessing(arguments)
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    if any(isinstance(data, ShardedBatches) for data in held_out.values()):
        raise ValueError("eval_dataset is a stream; give rows of `target_rows` and a SoftLabelCollator")


def _refuse_preprocessing(arguments: Any) -> None:
    """Raise ValueError for arguments of TRL that change rows of text: those of targets have tokens and labels."""
    for name in ("completion_only_loss", "assistant_only_loss"):
        if getattr(arguments, name, None):
            raise ValueError(f"{name}={getattr(arguments, name)} has no effect on targets, which have labels already")
    length = type(arguments).__dataclass_fields__.get("max_length")
    if length is not None and arguments.max_length not in (None, length.default):
        problem = "has no effect on targets, which are not truncated; set `corpus.context_tokens` in the job"
        raise ValueError(f"max_length={arguments.max_length} {problem}, or give None")


def _check_stream(trainer: SoftLabelTraining, data: ShardedBatches, objective: Objective) -> None:
    """Raise ValueError or TokenizerMismatch for a stream that does not fit the trainer."""
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(trainer.args, name) == "epoch":
            raise ValueError(f'{name}="epoch": Trainer counts all epochs of a stream as one; give "steps"')
    processes = trainer.accelerator.num_processes
    if data.world_size != processes:
        problem = f"the stream is sharded over {data.world_size} processes, there are {processes}"
        raise ValueError(f"{problem}; make it without rank and world_size")
    sets = data.sets if isinstance(data, SoftLabelMix) else (data,)
    for target_set in sets:
        assert isinstance(target_set, SoftLabelDataset), "batches of targets come from such data sets"
        alpha, temperature, uri = target_set.alpha, target_set.temperature, target_set.uri
        if objective.temperature != 1 and (alpha > 0 or temperature != objective.temperature):
            problem = f"targets of temperature {temperature} and alpha {alpha}, the objective has temperature"
            raise ValueError(f"{uri}: {problem} {objective.temperature}; it needs targets of its own, and alpha 0")
        if isinstance(trainer.processing_class, PreTrainedTokenizerBase):
            tokenizer = wrap_tokenizer(trainer.processing_class, name="processing_class")
            fingerprint = target_set.metadata.tokenizer_fingerprint
            check_tokenizer(tokenizer, model="the Trainer", data=uri, data_fingerprint=fingerprint)


class _Stream(DataLoader[Any]):
    """Features of this rank's batches, epoch after epoch, up to `num_left` batches.

    After the last batch, copies of it with weight zero complete its step.
    """

    dataset: ShardedBatches
    position: StreamState
    """State after the batch that was given last."""
    num_left: int | None = None
    """Batches to give before the end; None: no end."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # Trainer expects a generator
        batch = None
        while self.num_left is None or self.num_left > 0:
            for batch in super().__iter__():
                self.position = self.dataset.state_after(batch)
                yield batch.features()
                if self.num_left is not None:
                    self.num_left -= 1
                    if self.num_left == 0:
                        break
            self.dataset.load_state_dict(self.position)
        while batch is not None:
            yield batch.without_weight().features()

    def num_epochs_since(self, first: int) -> float:
        """Passes over the data since the beginning of an epoch, up to the batch that was given last."""
        epoch, consumed = self.position["epoch"], self.position["consumed"]
        return float(epoch - first + consumed / self.dataset.num_batches(epoch))

    def __len__(self) -> int:
        raise TypeError("the length of a stream is counted in steps")


class _SavePosition(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Writes the position in the data to each checkpoint."""

    def __init__(self, trainer: SoftLabelTraining) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stream = self._trainer._stream
        if state.is_world_process_zero and stream is not None:
            saved = {
                "stream": stream.position,
                "digest": stream.dataset.digest,
                "first_epoch": self._trainer._first_epoch,
            }
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _POSITION_FILE).write_text(json.dumps(saved))
