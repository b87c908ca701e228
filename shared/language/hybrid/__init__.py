"""The hybrid Mamba-Transformer stack of the Nemotron family: a pattern of M * - E, one mixer a layer.

A batch goes: :class:`~bestiary.shared.language.hybrid.model.HybridLM` → a :class:`.layout.Layout` (what is padding,
what is packed) → layers (norm, mixer, residual) → ``norm_f`` → ``lm_head``. The mixers are in ``mamba2.py`` (M),
``attention.py`` (*), ``mlp.py`` (-) and ``moe.py`` (E); ``cache.py`` is what they remember, ``mtp.py`` the heads that
look further ahead.
"""
