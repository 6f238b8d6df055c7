"""Which of vLLM's models can be a teacher, and what is said of those that cannot."""

from __future__ import annotations

import json

import pytest

from fakes.tiny_decoders import FAMILIES, open_vllm, save_decoder
from softshard.errors import ArchitectureUnsupported
from softshard.teacher.vllm_pooler import PREFIX, make_teacher, register, teacher_class


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("AbacusForCausalLM", "no model of that name"),
        ("BertModel", "without an output layer"),
        ("BertForSequenceClassification", "no compute_logits"),
        ("Blip2ForConditionalGeneration", "more than text"),
        ("MambaForCausalLM", "carries a state"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused_by_name(architecture, reason):
    with pytest.raises(ArchitectureUnsupported, match=f"cannot use {architecture} as a teacher: .*{reason}"):
        teacher_class(architecture)


def test_a_model_folder_of_such_an_architecture_is_refused_before_it_is_loaded(tmp_path):
    folder = save_decoder(tmp_path / "model", "Llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ArchitectureUnsupported, match="MambaForCausalLM"):
        open_vllm(folder)


def test_the_common_decoders_have_a_teacher():
    wanted = [f"{family}ForCausalLM" for family in (*FAMILIES, "Mistral", "Gemma3", "Phi3", "Olmo") if family != "GPT2"]
    for architecture in (*wanted, "GPT2LMHeadModel"):
        assert teacher_class(architecture).is_pooling_model


def test_the_plugin_leaves_vllms_own_models_as_they_are():
    from vllm.model_executor.models import ModelRegistry

    before = dict(ModelRegistry.models)
    register()
    own = {name: model for name, model in ModelRegistry.models.items() if not name.startswith(PREFIX)}
    assert own == {name: model for name, model in before.items() if not name.startswith(PREFIX)}
    assert {PREFIX + name for name in own} == ModelRegistry.models.keys() - own.keys()


def test_a_class_of_transformers_is_not_compiled_in_a_workers_own_process():
    assert make_teacher("PhiForCausalLM", compiled_here=False) == f"{PREFIX}PhiForCausalLM"
    with pytest.raises(ArchitectureUnsupported, match="own_process"):
        make_teacher("PhiForCausalLM", compiled_here=True)
    assert make_teacher("LlamaForCausalLM", compiled_here=True) == f"{PREFIX}LlamaForCausalLM"
