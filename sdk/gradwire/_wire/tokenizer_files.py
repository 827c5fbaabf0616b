"""Which files a tokenizer is made of. Read by both sides: the trainer hands out no others, the SDK writes no others."""

import re

MODEL_CONFIG = "config.json"
"""Goes along: transformers knows the tokenizer's class by it where tokenizer_config.json does not say it."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
"""Holds the templates beside the first, a `<name>.jinja` each."""
MAX_FILE_BYTES = 128 << 20
"""Of one file; the largest vocabularies take some 35 MiB."""
MAX_TOTAL_BYTES = 256 << 20
"""Of all of them."""
MAX_FILES = 64

_TEMPLATE = re.compile(rf"{CHAT_TEMPLATE_FOLDER}/[A-Za-z0-9_-][A-Za-z0-9._-]{{0,127}}\.jinja", re.ASCII)


def may_be_of_a_tokenizer(name: str) -> bool:
    """Whether a name is one that a tokenizer is loaded from; such a name stays in the folder it is put in."""
    return name in (MODEL_CONFIG, *TOKENIZER_FILES) or _TEMPLATE.fullmatch(name) is not None
