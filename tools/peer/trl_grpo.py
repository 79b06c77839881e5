"""Steps of TRL's GRPOTrainer on a CPU, as tools/bench_peer.py compares them with ours; runs in .venv-peer.

    python tools/peer/trl_grpo.py TASK.json     (or under torchrun, one thread a process)

TASK.json says what to train (see tools/benchmarks/peer_tasks.py). The task's directory gets a timeline.jsonl
and a metrics.jsonl in the form of our runs. Rewards are plain Python: the last match of a pattern is the answer.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Records:
    """Writes timeline.jsonl and metrics.jsonl on rank 0; the other ranks do the same at the same time."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._step = 1
        self._graded_at = 0.0
        self._metrics: dict[str, float] = {}

    def span(self, name: str, start: float) -> None:
        """What began at `start` ends now."""
        self._append("timeline.jsonl", {"name": name, "start": start, "end": time.time()})

    def graded(self, start: float, metrics: dict[str, float]) -> None:
        """All traces are there, with their rewards and advantages."""
        self.span("sample_and_grade", start)
        self._graded_at, self._metrics = time.time(), metrics

    def step_done(self, start: float) -> None:
        """The update is taken."""
        self.span("train", self._graded_at)
        self._append("metrics.jsonl", {"metrics": self._metrics})
        self.span("step", start)
        self._step += 1

    def _append(self, name: str, record: dict) -> None:
        if RANK == 0:
            with open(self._directory / name, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": "trl", "step": self._step, **record}) + "\n")


class StepEnds(TrainerCallback):
    """Marks where each optimizer step begins and ends."""

    def __init__(self, records: Records):
        self._records = records

    def on_step_begin(self, *_, **__) -> None:
        """TRL's call before a step's first micro-batch."""
        self._start = time.time()

    def on_step_end(self, *_, **__) -> None:
        """TRL's call after the update."""
        self._records.step_done(self._start)


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that notes when traces are sampled and graded, and how long they are."""

    def __init__(self, records: Records, **settings):
        self._records = records
        super().__init__(**settings)

    def _generate_and_score_completions(self, inputs):
        start = time.time()
        found = super()._generate_and_score_completions(inputs)
        tokens = torch.stack([found[name].sum() for name in ("completion_mask", "prompt_mask")]).double()
        tokens /= len(found["completion_mask"])
        if WORLD_SIZE > 1:
            torch.distributed.all_reduce(tokens)
        response, prompt = (tokens / WORLD_SIZE).tolist()
        self._records.graded(start, {"length/mean": response, "prompt/mean": prompt})
        return found


def dataset(task: dict) -> Dataset:
    """Return the task's problems as chats."""
    system = [{"role": "system", "content": task["system"]}] if task["system"] else []
    rows = [json.loads(line) for line in Path(task["problems"]).read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(
        [{"prompt": [*system, {"role": "user", "content": row["problem"]}], "answer": row["answer"]} for row in rows]
    )


def reward(pattern: str):
    """1.0 where the last match of `pattern` in a trace is the problem's answer."""

    def right(completions, answer, **_) -> list[float]:
        stated = [re.findall(pattern, completion[0]["content"]) for completion in completions]
        return [float(bool(found) and found[-1].strip() == a) for found, a in zip(stated, answer, strict=True)]

    return right


def config(task: dict) -> GRPOConfig:
    """Return the fastest settings of TRL here: one update a step on all of its traces, no reference model, no
    recomputation.
    """
    return GRPOConfig(
        output_dir=task["directory"],
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        gradient_checkpointing=False,
        per_device_train_batch_size=task["problems_per_step"] * task["group_size"] // WORLD_SIZE,
        gradient_accumulation_steps=1,
        num_generations=task["group_size"],
        max_completion_length=task["max_new_tokens"],
        temperature=task["temperature"],
        max_steps=task["steps"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        beta=0.0,
        scale_rewards="none",
        loss_type="dr_grpo",
        ddp_backend="gloo" if WORLD_SIZE > 1 else None,
        # Every parameter is used; looking for those that are not takes time.
        ddp_find_unused_parameters=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=task["seed"],
    )


def main() -> None:
    """Train to the end of the task."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    records = Records(Path(task["directory"]))
    trainer = TimedTrainer(
        records,
        model=task["model"],
        reward_funcs=reward(task["answer_pattern"]),
        args=config(task),
        train_dataset=dataset(task),
        callbacks=[StepEnds(records)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
