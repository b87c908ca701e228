"""Where prompts are played out: single answers, and episodes with tools."""
