"""Training from targets with Trainer of transformers, and its descendants such as TRL's SFTTrainer.

In: a `SoftLabelDataset`, whose batches are dealt to ranks already, or rows of a map-style data set with a
`SoftLabelCollator`, which Trainer deals. Out: Trainer's own steps, checkpoints and logs, the loss being the mean over
labels by their weights over accumulation and ranks. A stream goes on from a checkpoint after the batch that was trained
last, on any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from softshard.train.dealing import DealtBatches
from softshard.train.objective import CROSS_ENTROPY, Objective
from softshard.train.stream import StreamState
from softshard.train.student import accept_targets, weight_of_step

__all__ = ["SoftLabelTraining"]

_PLACE = "softshard.json"


class SoftLabelTraining:
    """Put it before a Trainer: `class SoftLabelTrainer(SoftLabelTraining, Trainer): ...`.

    Columns of rows are kept (`remove_unused_columns`). For a stream, `max_steps` is set from `num_train_epochs` where
    it is not given (epochs times the batches of epoch 0, over accumulation), the batch size of the arguments is not
    looked at, and loaders are not given to accelerate; Trainer counts all of the training as one epoch.

    Args:
        vocab_size, objective, chunk_positions: as in `accept_targets`.

    Raises:
        ValueError: a stream is to be evaluated on: it goes on from pass to pass, so give rows.
        ModelInvalid, VocabularyMismatch: as in `accept_targets`.
    """

    args: Any
    model: Any
    accelerator: Any
    train_dataset: Any
    eval_dataset: Any
    add_callback: Any

    def __init__(
        self,
        *args: Any,
        vocab_size: int,
        objective: Objective = CROSS_ENTROPY,
        chunk_positions: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        if any(isinstance(data, DealtBatches) for data in held_out.values()):
            raise ValueError("eval_dataset is a stream; give rows of `target_rows` and a SoftLabelCollator")
        accept_targets(self.model, vocab_size=vocab_size, objective=objective, chunk_positions=chunk_positions)
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.args.remove_unused_columns = False
        self._stream: _Stream | None = None
        if isinstance(data := self.train_dataset, DealtBatches):
            self.args.ignore_data_skip = True  # the data is set to its place, and need not be read up to it
            if self.args.max_steps <= 0:
                batches = self.args.num_train_epochs * data.batches_per_epoch(0)
                self.args.max_steps = max(1, round(batches / self.args.gradient_accumulation_steps))
            self.add_callback(_KeepPlace(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's. Raises ResumeMismatch for a checkpoint of other data, or of another order of it."""
        parent: Any = super()
        folder: Any = resume_from_checkpoint
        if resume_from_checkpoint is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder and isinstance(self.train_dataset, DealtBatches):
            self.train_dataset.load_state_dict(json.loads((Path(folder) / _PLACE).read_text()))
        return parent.train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Of a stream, an endless loader that nothing deals again; else Trainer's own."""
        parent: Any = super()
        if not isinstance(self.train_dataset, DealtBatches):
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
        return self._stream

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Batches of a step, and the weight of their labels over all processes, which need not be a whole number."""
        parent: Any = super()
        batches, _ = parent.get_batch_samples(epoch_iterator, num_batches, device)
        weights = (batch.get("counted", batch["position_weights"]) for batch in batches)
        moved = [{"position_weights": one.to(device)} for one in weights]
        return batches, weight_of_step(*moved) if moved else None

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """A batch's share of the step's mean, times the number of processes, whose gradients are averaged.

        Where there is no step, as in evaluation, the mean of the batch.
        """
        training = model.training
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch if training else None)
        loss = outputs.loss * self.accelerator.num_processes if training else outputs.loss
        return (loss, outputs) if return_outputs else loss


class _Stream(DataLoader[Any]):
    """Features of this rank's batches, epoch after epoch without an end."""

    dataset: DealtBatches
    place: StreamState | None = None
    """State after the batch that was given last."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is what Trainer asks for
        while True:
            for batch in super().__iter__():
                self.place = self.dataset.state_after(batch)
                yield batch.features()
            assert self.place is not None, "an epoch has a batch"
            self.dataset.load_state_dict(self.place)

    def __len__(self) -> int:
        raise TypeError("the batches do not end")


class _KeepPlace(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Writes beside each checkpoint how far the data has been trained on."""

    def __init__(self, trainer: SoftLabelTraining) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stream = self._trainer._stream
        if state.is_world_process_zero and stream is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _PLACE).write_text(json.dumps(stream.place))
