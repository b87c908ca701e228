"""Export: python tools/export_model.py checkpoint=RUN_OR_STAGE_FOLDER out=FOLDER [dtype=bfloat16]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments


def main() -> None:
    """Write the language model of a checkpoint as a folder that AutoModelForCausalLM loads."""
    cfg, _ = split_arguments("export_model", sys.argv[1:], strict=True)
    from bestiary.shared.hub.export import export

    for line in export(cfg.checkpoint, Path(cfg.out).expanduser(), cfg.dtype, cfg.shard_gb):
        print(line)


if __name__ == "__main__":
    with short_answers():
        main()
