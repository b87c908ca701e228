"""Evaluate: python tools/eval_model.py checkpoint=RUN_OR_STAGE_FOLDER [split=test] [dataset.root=… key=value …].

Another data set, by the rules of a benchmark: … dataset=mmau dataset.root=FOLDER protocol=mmau [audio=silent].
Several segmentation models together: checkpoint=[RUN,RUN,…]. Masks that are there already, without any model:
python tools/eval_model.py predictions=FOLDER labels=FOLDER [dataset_json=FILE] [classes=…] (conf/score.yaml).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments


def main() -> None:
    """Score a checkpoint with its run's own protocols, or with one of conf/protocol; arguments that conf/eval.yaml does
    not have change the run's stored config.
    """
    if any(text.startswith(("predictions=", "labels=")) for text in sys.argv[1:]):
        options, _ = split_arguments("score", sys.argv[1:], strict=True)
        from bestiary.shared.metrics.score_folders import score_folders

        score_folders(options)
        return
    cfg, overrides = split_arguments("eval", sys.argv[1:])
    from bestiary.shared.core.train import evaluate_checkpoint

    evaluate_checkpoint(cfg, overrides)


if __name__ == "__main__":
    with short_answers():
        main()
