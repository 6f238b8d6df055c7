from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import kl_div
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from fakes.students import student
from fakes.targets import metadata, row, sequence
from softshard.config import Job, LoraSettings
from softshard.config.job_file import load_job
from softshard.data.batch import collate, collate_text
from softshard.data.dataset import SoftLabelDataset
from softshard.data.mixing import Mixing
from softshard.data.target_set import TargetSet
from softshard.errors import ModelInvalid
from softshard.finetune.adapters.lora import attach_lora
from softshard.finetune.hidden_states import hidden_states
from softshard.finetune.objective import CROSS_ENTROPY, Objective
from softshard.models import load_model
from softshard.models.decoder import Decoder
from softshard.shard.manifest import read_manifest
from softshard.stages.job import run_job
from softshard.storage import open_store
from softshard.telemetry import SilentReporter

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TEXT = [sequence("a", [3, 1, 4, 1, 5, 9, 2, 6], first_label=3), sequence("b", [2, 7, 1, 8, 2]), sequence("c", [6, 2])]


def test_hidden_states_at_the_positions_give_the_models_own_logits_label_by_label(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    decoder, batch = Decoder.of(model), collate_text(TEXT)
    ours = hidden_states(decoder, batch) @ decoder.weight.T
    alone = []
    for tokens in TEXT:
        logits = model(input_ids=torch.tensor([tokens.token_ids.tolist()])).logits[0]
        alone.append(logits[tokens.positions])
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_decoder_of_an_adapted_model_is_that_of_its_base(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    before = Decoder.of(model)
    after = Decoder.of(attach_lora(model, LoraSettings(rank=2), seed=0))
    assert before.body is after.body
    assert before.weight is after.weight


def test_gpt2_has_its_last_norm_in_the_body():
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=60, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).eval()
    decoder, batch = Decoder.of(model), collate_text(TEXT)
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    torch.testing.assert_close(hidden_states(decoder, batch) @ decoder.weight.T, logits)


SCALED = {
    "Gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=3.0)),
    "RecurrentGemma": lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SHAPE, logits_soft_cap=4.0)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    "HyperCLOVA X": lambda: HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**SHAPE, logits_scaling=0.25)),
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**{**SHAPE, "logit_scale": 0.0625})),
}


@pytest.mark.parametrize("family", SCALED)
def test_logits_of_a_model_that_caps_or_scales_them_are_its_own(family):
    torch.manual_seed(0)
    model = SCALED[family]().eval()
    model.get_output_embeddings().weight.data *= 40
    decoder, ids = Decoder.of(model), torch.arange(2, 12)[None]
    with torch.no_grad():
        ours = decoder.logits(decoder.body(input_ids=ids, use_cache=False).last_hidden_state)
        own = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    plain = torch.nn.functional.linear(decoder.body(input_ids=ids, use_cache=False).last_hidden_state, decoder.weight)
    assert (plain - own).abs().max() > 0.5, "what is done to the logits can be seen"


def test_a_cap_that_the_config_names_and_the_model_has_not_is_refused(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelInvalid, match="with final_logit_softcapping 30"):
        Decoder.of(model)


class Capped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 200 * torch.tanh(output.logits / 200)
        return output


def test_a_cap_that_the_config_does_not_name_is_found_though_small_logits_hide_it(tiny_model):
    model = Capped.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        assert model(torch.arange(1, 5)[None]).logits.abs().max() < 20
    with pytest.raises(ModelInvalid, match="its logits are not"):
        Decoder.of(model)


def test_a_granite_that_scales_by_one_is_taken():
    model = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=1.0)).eval()
    assert Decoder.of(model).weight.shape == (60, 16)


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_model_that_changes_its_logits_without_saying_so_is_refused(tiny_model):
    with pytest.raises(ModelInvalid, match="its logits are not"):
        Decoder.of(Doubled.from_pretrained(tiny_model))


@pytest.fixture
def decoder(tiny_model):
    return Decoder.of(load_model(tiny_model, dtype=torch.float32, device="cpu"))


SIZES = {"num_valid": 320, "chunk_positions": 4}


def test_num_items_in_batch_normalises_as_transformers_does(decoder, tiny_model):
    """Two batches of an accumulation step, divided by the labels of both, are the mean over all their labels."""
    model = load_model(tiny_model, dtype=torch.float32, device="cpu")
    whole, parts = collate_text(TEXT), [collate_text(TEXT[:2]), collate_text(TEXT[2:])]
    items = sum(batch.position_weights.sum() for batch in parts)
    losses = [CROSS_ENTROPY.loss(decoder, batch, **SIZES, num_items_in_batch=items) for batch in parts]
    for batch, loss in zip(parts, losses, strict=True):
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.positions + 1] = batch.labels
        theirs = model(input_ids=batch.input_ids, labels=labels, num_items_in_batch=int(items)).loss
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert sum(losses).item() == pytest.approx(CROSS_ENTROPY.loss(decoder, whole, **SIZES).item(), rel=1e-5)


def full_batch(kind="full", *, alpha=0.0):
    rng = np.random.default_rng(5)
    rows = [row(name, 9, rng, kind=kind) for name in "ab"]
    return collate(rows, metadata=metadata(kind), mixing=Mixing(alpha=alpha, truncated="ghost"))


def dense_reference(decoder, batch, temperature):
    """Targets and log-probabilities [N, 50] in float64."""
    counts = batch.entry_offsets.diff()
    places = torch.repeat_interleave(counts), batch.entry_ids
    target = torch.zeros(len(counts), 50, dtype=torch.float64)
    target.index_put_(places, batch.entry_weights.double(), accumulate=True)
    with torch.no_grad():
        logits = hidden_states(decoder, batch).double() @ decoder.weight.double().T
    return target, torch.log_softmax(logits[:, :50] / temperature, dim=1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_divergences_of_whole_targets_are_those_of_torch(decoder, divergence, temperature):
    batch = full_batch()
    chosen = Objective(divergence=divergence, temperature=temperature, jsd_beta=0.25)
    loss = chosen.loss(decoder, batch, num_valid=50, chunk_positions=4)
    target, logs = dense_reference(decoder, batch, temperature)
    middle = (0.25 * target + 0.75 * logs.exp()).log()
    expected = {
        "forward": -(target * logs).sum(),
        "reverse": kl_div(target.log(), logs, log_target=True, reduction="sum"),
        "jensen_shannon": 0.25 * kl_div(middle, target, reduction="sum")
        + 0.75 * kl_div(middle, logs, log_target=True, reduction="sum"),
    }
    mean = temperature**2 * expected[divergence] / len(target)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("divergence", ["reverse", "jensen_shannon"])
def test_a_tail_mass_that_the_grid_took_for_nothing_leaves_the_divergence_finite(decoder, divergence, alpha):
    batch = full_batch("topk", alpha=alpha)
    batch.targets.tail_mass[:3] = 0
    loss = Objective(divergence=divergence).loss(decoder, batch, num_valid=50, chunk_positions=4)
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("packing", [False, True])
def test_context_between_labels_has_no_part_in_loss_and_gradient(packing):
    rng, spans = np.random.default_rng(6), (((2, 4), (7, 9)), ((1, 3), (6, 7)))
    rows = [row(name, 9, rng, kind="full", label_spans=own) for name, own in zip("ab", spans, strict=True)]
    batch = collate(rows, metadata=metadata("full"), mixing=Mixing(alpha=0.2, truncated="ghost"), packing=packing)
    model, reference = student(), student().double()
    loss = Objective().loss(Decoder.of(model), batch, num_valid=50, chunk_positions=3)
    loss.backward()
    expected, first = torch.zeros((), dtype=torch.float64), 0
    for tokens, targets in rows:
        logits = reference(input_ids=torch.from_numpy(tokens.token_ids.astype(np.int64))[None]).logits[0, :, :50]
        logs = torch.log_softmax(logits, dim=1)
        heads = np.split(np.arange(len(targets.head_ids)), np.cumsum(targets.head_count)[:-1])
        for label, head in zip((i for span in tokens.label_spans for i in range(*span)), heads, strict=True):
            target = torch.zeros(50, dtype=torch.float64)
            target[targets.head_ids[head]] = torch.from_numpy(np.exp(targets.head_logprobs[head].astype(np.float64)))
            target = 0.8 * target / target.sum()
            target[int(tokens.token_ids[label])] += 0.2
            expected, first = expected - (target * logs[label - 1]).sum(), first + 1
    (expected / first).backward()
    assert first == 7
    assert loss.item() == pytest.approx(expected.item() / first, rel=1e-5)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def job_with(target, **train):
    return {
        "name": "one",
        "out": "somewhere",
        "corpus": {
            "sources": [{"name": "a", "uri": "a.txt", "style": "s", "license": "CC0-1.0", "rights_basis": "owned"}]
        },
        "teacher": {"model": "m"},
        "target": target,
        "train": train,
    }


TOPK = {"kind": "topk", "k": 8}


@pytest.mark.parametrize(
    ("target", "train", "message"),
    [
        ({"kind": "threshold"}, {"divergence": "reverse"}, "train.divergence: reverse is biased for .* threshold"),
        ({"kind": "threshold"}, {"divergence": "jensen_shannon"}, "jensen_shannon is biased"),
        (TOPK, {"divergence": "reverse", "truncated": "renormalise"}, "set `train.truncated: ghost`"),
        ({"kind": "full"}, {"divergence": "reverse", "alpha": 1}, "against a label alone"),
        ({"kind": "full"}, {"divergence": "reverse", "objective": "ce"}, "against a label alone"),
        ({"kind": "full"}, {"match_temperature": True}, "alpha 0"),
        ({"kind": "full"}, {"match_temperature": True, "alpha": 0, "objective": "ce"}, "objective: kl"),
    ],
)
def test_a_divergence_that_the_target_would_bias_is_refused_when_the_job_is_read(target, train, message):
    with pytest.raises(ValidationError, match=message):
        Job.model_validate(job_with(target, **train))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("target", [TOPK, {"kind": "nucleus"}, {"kind": "full"}])
def test_the_kinds_that_allow_a_divergence_are_taken(target, divergence):
    train = {"divergence": divergence, "alpha": 0, "match_temperature": True}
    assert Job.model_validate(job_with(target, **train)).train.divergence == divergence


def test_the_training_stage_takes_the_divergence_of_the_job(tiny_job, tmp_path):
    """The first loss in its log, before any update, is the untouched student's reverse KL to the first batch."""
    changes = {"divergence": "reverse", "alpha": 0.25, "baseline": None, "retention": None, "shuffle_buffer": 64}
    job = load_job(tiny_job(tmp_path, target=TOPK, teacher={"folds": 0}, train=changes))
    run_job(job, SilentReporter(), stages=("corpus", "teacher", "targets", "train"))
    targets = open_store(f"{job.out}/targets")
    stream = SoftLabelDataset(
        TargetSet(store=targets, manifest=read_manifest(targets)),
        seed=job.seed,
        batch_tokens=512,
        shuffle_buffer=64,
        alpha=0.25,
        truncated="ghost",
    )
    student = Decoder.of(load_model(Path(job.teacher.model), dtype=torch.float32, device="cpu"))
    expected = reverse_kl_by_cell(student, next(iter(stream)))
    (log,) = Path(job.out).glob("adapter/*/log.jsonl")
    assert json.loads(log.read_text().splitlines()[0])["loss"] == pytest.approx(expected, rel=1e-4)


def reverse_kl_by_cell(decoder, batch):
    with torch.no_grad():
        q = torch.softmax(hidden_states(decoder, batch).double() @ decoder.weight.double().T[:, :300], dim=1)
    total, offsets = 0.0, batch.entry_offsets.tolist()
    for position, one in enumerate(q):
        span = slice(offsets[position], offsets[position + 1])
        ids, weights, in_head = (
            x[span].tolist() for x in (batch.entry_ids, batch.entry_weights, batch.targets.entry_in_head)
        )
        mass = {token: weight for token, weight, inside in zip(ids, weights, in_head, strict=True) if inside}
        rest = max(float(batch.targets.tail_mass[position]), 1 / 1020)
        for token, weight, inside in zip(ids, weights, in_head, strict=True):
            if not inside:
                mass, rest = ({**mass, token: mass[token] + weight}, rest) if token in mass else (mass, rest + weight)
        cells = [(mass[token], one[token].item()) for token in mass]
        cells.append((rest, 1 - sum(other for _, other in cells)))
        total += sum(own * math.log(own / target) for target, own in cells)
    return total / len(q)


def test_the_example_of_the_training_page_runs_and_is_the_mean_of_its_targets(tiny_model):
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    scope = {"FOLDER": tiny_model}
    exec(code, scope)
    with torch.no_grad():
        logs = torch.log_softmax(scope["model"](torch.tensor([[5, 6, 7]])).logits[0, :, :300], dim=1)
    expected = -(0.75 * logs[0, 7] + 0.25 * logs[0, 8] + 0.5 * logs[1, 9])
    assert scope["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert scope["model"].get_input_embeddings().weight.grad.any()


def test_a_bfloat16_body_with_an_adapter_is_near_its_float32_twin(tiny_model):
    batch, states = collate_text(TEXT), []
    for dtype in (torch.float32, torch.bfloat16):
        model = attach_lora(load_model(tiny_model, dtype=dtype, device="cpu"), LoraSettings(rank=4), seed=0)
        with torch.no_grad():
            for name, item in model.named_parameters():
                if "lora_B" in name:
                    item.copy_(torch.linspace(-0.1, 0.1, item.numel()).reshape(item.shape))
        states.append(hidden_states(Decoder.of(model), batch))
    assert states[1].dtype == torch.bfloat16
    error = (states[0] - states[1].float()).norm() / states[0].norm()
    assert error < 0.05
