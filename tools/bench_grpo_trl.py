#!/usr/bin/env python
"""TRL's side of tools/bench_grpo.py; runs in a venv of its own, without bestiary: bench_grpo_trl.py SPEC.json.

SPEC has ``model`` (a folder of transformers), ``prompts`` (jsonl with prompt and ids of the right completion), ``out``,
``steps``, ``prompts_per_step``, ``samples``, ``lr``, ``max_new_tokens``, ``seed``. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(spec: dict) -> None:
    """Train, and time the steps alone."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in Path(spec["prompts"]).read_text().splitlines()]
    data = datasets.Dataset.from_list(rows)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(spec["model"])
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)

    def reward(completion_ids: list[list[int]], right: list[list[int]], **_: object) -> list[float]:
        return [float(list(ids) == list(gold)) for ids, gold in zip(completion_ids, right, strict=True)]

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.began = time.process_time()

        def on_train_end(self, *_, **__):
            self.took = time.process_time() - self.began

    config = trl.GRPOConfig(
        output_dir=spec["out"],
        per_device_train_batch_size=spec["prompts_per_step"] * spec["samples"],
        num_generations=spec["samples"],
        max_completion_length=spec["max_new_tokens"],
        max_steps=spec["steps"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        weight_decay=0.0,
        max_grad_norm=1.0,
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
        epsilon=0.2,
        num_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to=[],
        logging_steps=spec.get("logging_steps", 1),
        save_strategy="no",
        seed=spec["seed"],
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = trl.GRPOTrainer(
        model, reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    trainer.save_model(spec["out"])
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    print("RESULT " + json.dumps({"cpu_s": clock.took, **versions}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
