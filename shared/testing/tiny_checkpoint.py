"""A checkpoint folder of transformers, small enough for a test: fresh weights, a byte-level BPE, a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bestiary.shared.core.errors import require

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as a Jinja template."""

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from uniform, so that an error shows
}
"""A decoder of transformers with 20 thousand parameters."""


def write_tiny_tokenizer(folder: Path, template: str | None = CHATML, extra: tuple[str, ...] = ()) -> Any:
    """Write tokenizer files: a BPE over bytes with a few merges, ``<|endoftext|>`` and the tags of ChatML.

    Args:
        folder: where to.
        template: the Jinja chat template, or None.
        extra: more special tokens.

    Returns:
        The tokenizer, of transformers.
    """
    tokenizers, transformers = require("tokenizers", "zoo"), require("transformers", "zoo")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = ["system user assistant hello there yes no the answer is that user\nassistant\n"] * 4
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    hf.chat_template = template
    hf.save_pretrained(folder)
    return hf


def write_tiny_checkpoint(
    folder: Path, model_type: str = "llama", template: str | None = CHATML, **config: Any
) -> Path:
    """Write a whole checkpoint folder: config, fp32 weights that depend on nothing, tokenizer.

    Args:
        folder: where to; made if need be.
        model_type: transformers' name of the architecture.
        template: as in :func:`write_tiny_tokenizer`.
        **config: what differs from :data:`TINY`.

    Returns:
        The folder.
    """
    transformers = require("transformers", "zoo")
    tokenizer = write_tiny_tokenizer(folder, template)
    values = {**TINY, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(model_type, **{**values, **config})
        )
    model.save_pretrained(folder)
    return folder
