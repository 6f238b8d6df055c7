"""A tiny model with a tokenizer of its own, and a little real text."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS = [
    "The harbour lay grey at dawn. Two boats went out, and one came back before noon with nothing in it.",
    "She counted the coins twice; there were nine. Nine was not enough for the fare, so she walked.",
    "Rain again. The gutters could not hold it, and by four the lane was a stream that carried leaves.",
    "He never said why he sold the clock. My aunt thought it was the ticking; I think it was the silence after.",
    "A letter came on Tuesday. It was short, it was polite, and nobody in the house believed a word of it.",
    "The dog would not cross the bridge. We carried him over, and he looked at the water all the way.",
    "In the back of the shop stood eleven chairs, no two alike, and the old man sat on the floor.",
    "Bread at six, papers at seven, school at eight. It had been so for thirty years and then it was not.",
    "They argued about the map until it was too dark to read it, and after that they argued about the dark.",
    "Somebody had painted the gate green. It dried badly. All summer our sleeves came home with green on them.",
    "The teacher wrote one sum on the board, sat down, and waited. Nobody moved. A fly went round the lamp.",
    "When the band stopped we heard the sea. It had been there all along, keeping its own poor time.",
]


def save_tiny_model(folder: Path, *, seed: int = 0, vocab_size: int = 320, words: tuple[str, ...] = ()) -> Path:
    """A random Llama of two layers with a byte-level BPE tokenizer of 300 tokens; logits are padded to vocab_size."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator([*TEXTS, *words], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_documents(path: Path, *, num_documents: int, words: str = "") -> Path:
    """JSON Lines of documents of six sentences each, all different."""
    sentences = [sentence for text in TEXTS for sentence in text.split(". ")]
    with path.open("w") as file:
        for index in range(num_documents):
            chosen = [sentences[(index * 7 + 5 * step * (1 + index % 3)) % len(sentences)] for step in range(6)]
            text = ". ".join(chosen) + f". {words}{index}."
            file.write(json.dumps({"text": text, "author": f"author {index % 3}"}) + "\n")
    return path
