"""Chat: python tools/chat.py backbone=NAME | checkpoint=RUN [prompt="…"] [system="…"] [key=value …]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import hydra_tool, short_answers


def main() -> None:
    """Compose the config with Hydra, load the model, and answer."""
    with short_answers():
        from bestiary.shared.language.chat import run_chat, split_texts

        texts, sys.argv[1:] = split_texts(sys.argv[1:])
    hydra_tool("chat", lambda cfg, choices, overrides: run_chat(cfg, choices, texts))


if __name__ == "__main__":
    main()
