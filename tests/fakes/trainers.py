"""Trainers, streams and adapted students for the tests of integrations, and the loss by another route."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

from fakes.students import student
from fakes.targets import VOCAB
from softshard.data.dataset import SoftLabelDataset
from softshard.data.mixing import LabelWeights
from softshard.integrations.trainer import SoftLabelTraining

WEIGHTS = LabelWeights(entropy=((0.0, 0.0), (4.0, 3.0)))


class SoftLabelTrainer(SoftLabelTraining, Trainer):
    pass


class SoftLabelSFT(SoftLabelTraining, SFTTrainer):
    pass


def stream(targets, **changes):
    settings = {"seed": 3, "batch_tokens": 48, "shuffle_buffer": 8, "alpha": 0.5, "weights": WEIGHTS}
    return SoftLabelDataset(targets, **{**settings, "rank": 0, "world_size": 1, **changes})


def adapted(seed=0):
    model = get_peft_model(student(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def trained(model):
    return torch.cat([item.detach().flatten() for item in model.parameters() if item.requires_grad])


def dense_mean(model, features):
    """Mean cross-entropy to the entries over labels by their weights, from the model's own logits in float64."""
    inputs = {name: features[name] for name in ("input_ids", "attention_mask", "position_ids") if name in features}
    logits = model(**inputs, use_cache=False).logits.double().flatten(0, 1)[features["positions"], :VOCAB]
    logp = torch.log_softmax(logits, dim=1)
    weights = features["position_weights"].double()
    label = torch.repeat_interleave(torch.arange(len(weights)), features["entry_offsets"].diff())
    losses = -features["entry_weights"].double() * logp[label, features["entry_ids"]]
    return torch.zeros(len(weights), dtype=torch.float64).index_add(0, label, losses) @ weights / weights.sum()


def arguments(folder, kind=TrainingArguments, **changes):
    settings = {
        "output_dir": str(folder),
        "learning_rate": 0.2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }
    return kind(**{**settings, **changes})
