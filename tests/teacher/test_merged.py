"""An adapter merged into its model, and the canary that tells whether an engine serves it."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from softshard.errors import AdapterNotApplied, PartCorrupt
from softshard.finetune.adapters.lora import load_adapter
from softshard.models import load_model
from softshard.teacher.merged import check_canary, merged_model

VOCAB = 300
IDENTITY = {"weights": "w", "adapters": ["a"], "dtype": "float32", "transformers": "5", "torch": "2"}


@pytest.fixture(scope="module")
def merged(tiny_model, adapter):
    return merged_model(tiny_model, adapter, identity=IDENTITY, vocab_size=VOCAB)


def logits(model, ids=tuple(range(40))):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def label_logprobs(model, ids):
    logprobs = torch.log_softmax(logits(model, ids)[:-1, :VOCAB].double(), 1)
    return logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


def test_the_merged_model_gives_what_base_and_adapter_give(tiny_model, adapter, merged):
    folder, _ = merged
    base = load_model(tiny_model, dtype=torch.float32, device="cpu")
    before = logits(base)
    adapted = logits(load_adapter(base, adapter, adapter_name="default", device="cpu"))
    np.testing.assert_allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), adapted, atol=1e-4)
    assert (adapted - before).abs().max() > 0.1


def test_tied_embeddings_stay_tied_and_as_they_were(tiny_model, merged):
    folder, _ = merged
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tiny_model))
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_what_is_merged_is_found_again_and_nothing_else_is_left(tiny_model, adapter, merged):
    folder, canary = merged
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert merged_model(tiny_model, adapter, identity=IDENTITY, vocab_size=VOCAB) == (folder, canary)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    half, _ = merged_model(tiny_model, adapter, identity={**IDENTITY, "dtype": "bfloat16"}, vocab_size=VOCAB)
    assert half != folder
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16


def test_canary_passes_the_adapted_model_and_refuses_the_base(tiny_model, merged):
    folder, canary = merged
    served = label_logprobs(AutoModelForCausalLM.from_pretrained(folder), canary.token_ids)
    check_canary(canary, served, dtype="float32", model="m")
    base = label_logprobs(AutoModelForCausalLM.from_pretrained(tiny_model), canary.token_ids)
    np.testing.assert_allclose(base, canary.base, atol=1e-5)
    for wrong in (base, (base + served) / 4, served + 0.02):
        with pytest.raises(AdapterNotApplied, match="may not have applied the adapter"):
            check_canary(canary, wrong, dtype="float32", model="m")


def test_canary_sees_through_the_noise_of_a_coarser_type(merged):
    _, canary = merged
    noise = np.random.default_rng(0).normal(size=len(canary.base)) * 0.05
    check_canary(canary, np.array(canary.adapted) + noise, dtype="bfloat16", model="m")
    with pytest.raises(AdapterNotApplied):
        check_canary(canary, np.array(canary.base) + noise, dtype="bfloat16", model="m")


def test_an_adapter_that_changes_nothing_cannot_be_proven(merged):
    _, canary = merged
    same = canary.model_copy(update={"adapted": canary.base})
    with pytest.raises(AdapterNotApplied, match="0% of the adapter's effect"):
        check_canary(same, np.array(canary.base), dtype="float32", model="m")


def test_a_canary_cut_short_is_the_beginning_of_the_whole(merged):
    folder, canary = merged
    cut = canary.cut(10)
    assert (len(cut.token_ids), len(cut.base), len(cut.adapted)) == (10, 9, 9)
    assert cut.sequence.num_labels == 9
    served = label_logprobs(AutoModelForCausalLM.from_pretrained(folder), cut.token_ids)
    np.testing.assert_allclose(served, cut.adapted, atol=1e-4)


def test_a_damaged_canary_is_named(tiny_model, adapter, tmp_path):
    copy = tmp_path / "fold-0"
    copy.mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    folder, _ = merged_model(tiny_model, copy, identity=IDENTITY, vocab_size=VOCAB)
    (folder / "canary.json").write_text("{}")
    with pytest.raises(PartCorrupt, match=r"canary\.json"):
        merged_model(tiny_model, copy, identity=IDENTITY, vocab_size=VOCAB)
