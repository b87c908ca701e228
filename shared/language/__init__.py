"""Language backbones, tokenizers and the causal language model."""
