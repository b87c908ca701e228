"""Controllers: what changes sampling, the choice of prompts and the overlong mask as training goes."""
