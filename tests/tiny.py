"""Tiny random models with a real tokenizer, made offline in a second."""

import json
from pathlib import Path

VOCAB_SIZE = 128
MAX_CONTEXT_LENGTH = 64


def make_tiny_llama(folder: Path, *, seed: int = 0, tied: bool = True) -> Path:
    """Writes a Llama of two layers, random parameters in float32 and a tokenizer that splits into bytes of ASCII.

    Args:
        folder: Where; made if need be.
        seed: Of the parameters.
        tied: Whether embedding and head share their parameters.

    Returns:
        The folder.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_CONTEXT_LENGTH,
        tie_word_embeddings=tied,
        # Wide enough that logprobs differ between targets, so that a wrong gather shows.
        initializer_range=0.2,
        # What a real model has and the worker must switch off.
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = {"<|im_start|>": 0, "<|im_end|>": 1, "<unk>": 2}
    vocab = specials | {chr(code): code for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_CONTEXT_LENGTH,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
