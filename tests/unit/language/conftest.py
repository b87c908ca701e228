"""What tests of language models share."""

import pytest


@pytest.fixture(scope="session")
def small_sizes():
    """Of a decoder of transformers, with weights far enough from uniform that its words differ."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
