"""The settings that a resumed run may change, and why; `--resume` and docs/resume.md use this table.

A row is a key of the config, without the number of a stage, or `SECTION.*` for all keys of a section that have no row
of their own. A key without a row is fixed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exprl_megatron.config.run import RunConfig

Verdict = Literal["free", "fixed", "content", "batching", "arguments"]
"""`free` may change. `fixed` may not. `content`: the path may, what it leads to may not. `batching` is free where the
loss does not depend on which sequences share a micro-batch, and else fixed. `arguments` of SGLang: those of
FREE_ARGUMENTS may change."""

WORDS: dict[Verdict, str] = {
    "free": "may change",
    "fixed": "must stay",
    "content": "the path may change, its contents must stay",
    "batching": "may change, unless a stage has `loss.aggregation: micro-batch-mean` or `policy.moe_aux_loss` is not 0",
    "arguments": "the arguments listed below may change, all others must stay",
}


@dataclass(frozen=True)
class ResumeRule:
    """One line of the table."""

    keys: tuple[str, ...]
    verdict: Verdict
    reason: str


TABLE = (
    ResumeRule(("directory",), "free", "a run may be moved"),
    ResumeRule(("permissions",), "free", "access rights of its files"),
    ResumeRule(("reproduce",), "fixed", "decides many settings"),
    ResumeRule(("plugin_path",), "free", "the directories of the user's modules"),
    ResumeRule(("step_metrics",), "free", "additional metrics"),
    ResumeRule(("seed",), "fixed", "decides order, sampling and starting weights"),
    ResumeRule(("checkpoint.*",), "free", "the frequency of checkpoints"),
    ResumeRule(("journal.*",), "free", "the number of steps and values in the log"),
    ResumeRule(("trackers", "tracking.*"), "free", "where metrics are shown"),
    ResumeRule(("debug.assertions",), "free", "only stops a run"),
    ResumeRule(("debug.only", "debug.rollouts"), "fixed", "the mode of the run"),
    # The policy.
    ResumeRule(("policy.model",), "content", "the weights that the run starts from, their tokenizer and chat template"),
    ResumeRule(
        ("policy.initialize", "policy.precision.*", "policy.moe_aux_loss", "policy.router_replay"),
        "fixed",
        "changes what is computed",
    ),
    ResumeRule(("policy.max_tokens",), "fixed", "decides which prompts and examples are left out"),
    ResumeRule(("policy.ref_policy",), "fixed", "a checkpoint either holds the starting weights or does not"),
    ResumeRule(("policy.recompute", "policy.log_prob_chunk"), "free", "memory against speed"),
    ResumeRule(("policy.gradient_accumulation_fusion",), "free", "speed"),
    ResumeRule(
        ("policy.layout.*", "policy.micro_batch_tokens", "policy.packing"),
        "batching",
        "how the work is divided; a checkpoint loads in any layout",
    ),
    # Servers.
    ResumeRule(("server.*", "judge.server.*"), "free", "number, place and deadlines of servers"),
    ResumeRule(("server.extra_args", "judge.server.extra_args"), "arguments", "may change the distribution of tokens"),
    ResumeRule(("placement.*",), "free", "where the servers compute"),
    ResumeRule(("sync.*",), "free", "the transport of the same weights, and its checks"),
    ResumeRule(("sync.max_log_prob_gap",), "free", "only stops a run; `auto` keeps the precision of the first step"),
    ResumeRule(("sync.fp8", "sync.pause_mode"), "fixed", "changes the distribution that is sampled from"),
    # The judge.
    ResumeRule(("judge.model",), "content", "the judge itself"),
    ResumeRule(
        ("judge.endpoints", "judge.api_key_variable", "judge.placement"), "free", "the address of the same judge"
    ),
    ResumeRule(("judge.endpoint_model", "judge.endpoint_args"), "fixed", "identifies a judge behind endpoints"),
    ResumeRule(
        (
            *("judge.prompt", "judge.prefix_prompt", "judge.segment_prompt", "judge.rubric.prompt"),
            "judge.shipped_prompts",
        ),
        "content",
        "the judge's questions",
    ),
    ResumeRule(("judge.rubric.kind", "judge.rubric.max_new_tokens"), "fixed", "the standard for traces"),
    ResumeRule(
        (
            *("judge.prompt_order", "judge.show_reference", "judge.template_args", "judge.max_new_tokens"),
            *("judge.temperature", "judge.score_format", "judge.score_reading", "judge.parser"),
            *("judge.reasks", "judge.reask_temperature"),
        ),
        "fixed",
        "changes the scores of traces",
    ),
    ResumeRule(
        (
            *("judge.retries", "judge.retry_pause_s", "judge.hedge_after_s", "judge.concurrency", "judge.deadline_s"),
            "judge.rubric.deadline_s",
        ),
        "free",
        "deadlines and repetitions of the same question",
    ),
    ResumeRule(("judge.max_abstention_rate", "judge.abstention_window", "judge.gate.*"), "free", "only stops a run"),
    ResumeRule(("judge.store",), "free", "the place of stored answers, which are found by the whole question"),
    # Verification.
    ResumeRule(("verifier.workers",), "free", "speed"),
    ResumeRule(
        ("verifier.answer_deadline_s", "verifier.program_deadline_s", "verifier.test_deadline_s"),
        "free",
        "deadlines",
    ),
    ResumeRule(("verifier.variant", "verifier.domains.*"), "fixed", "the definition of a right answer"),
    # What is learned.
    ResumeRule(("prompt.*",), "fixed", "the policy's prompts"),
    ResumeRule(("leak_guard.*",), "free", "only stops a run"),
    ResumeRule(("stages.*",), "fixed", "what the policy learns"),
    ResumeRule(
        tuple(
            f"{place}.problems.{key}"
            for place in ("stages", "evaluation")
            for key in ("source", "split", "fields.*", "limit", "domains")
        ),
        "content",
        "the problems, as they are read",
    ),
    ResumeRule(("stages.examples",), "content", "the examples"),
    ResumeRule(("stages.optimizer.overlap", "stages.optimizer.offload"), "free", "memory against speed"),
    ResumeRule(("stages.optimizer.distributed",), "fixed", "the form of the optimizer's state in a checkpoint"),
    ResumeRule(("stages.max_abstention_rate", "stages.allow_off_policy"), "free", "only stops or refuses a run"),
    ResumeRule(("evaluation.every_steps",), "free", "the frequency of the same evaluation"),
    ResumeRule(("evaluation.*",), "fixed", "the figures before and after the stages are compared with each other"),
)

FREE_ARGUMENTS: Mapping[str, str] = {
    "--mem-fraction-static": "memory",
    "--chunked-prefill-size": "memory",
    "--max-prefill-tokens": "memory",
    "--max-running-requests": "memory",
    "--max-total-tokens": "memory",
    "--max-queued-requests": "queueing",
    "--cuda-graph-max-bs-decode": "memory against speed",
    "--cuda-graph-bs-decode": "memory against speed",
    "--cuda-graph-max-bs-prefill": "memory against speed",
    "--cuda-graph-bs-prefill": "memory against speed",
    "--disable-cuda-graph": "speed",
    "--enable-memory-saver": "memory",
    "--schedule-policy": "order of requests",
    "--schedule-conservativeness": "order of requests",
    "--disable-radix-cache": "memory against speed",
    "--stream-interval": "speed",
    "--watchdog-timeout": "a deadline",
    "--dist-timeout": "a deadline",
    "--tokenizer-worker-num": "speed",
    "--nccl-port": "transport",
    "--enable-metrics": "logging",
    "--enable-request-time-stats-logging": "logging",
    "--decode-log-interval": "logging",
    "--log-level": "logging",
    "--log-level-http": "logging",
    "--log-requests": "logging",
    "--log-requests-level": "logging",
    "--show-time-cost": "logging",
}
"""Arguments of SGLang that change memory, speed, deadlines or logs, and not what is sampled; with what they change."""


def row_of(key: str) -> ResumeRule | None:
    """Return the row of the table for `key` (see `without_stage_number`); the most specific where several match."""
    rows = {name: row for row in TABLE for name in row.keys}
    if key in rows:
        return rows[key]
    sections = [name for name in rows if name.endswith(".*") and f"{key}.".startswith(name.removesuffix("*"))]
    return rows[max(sections, key=len)] if sections else None


def without_stage_number(key: str) -> str:
    """Return `stages.0.steps` as the table has it: `stages.steps`."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def refused_changes(old: RunConfig, new: RunConfig, same_contents: bool) -> list[str]:
    """Return the keys whose values in `new` a run that `old` started may not continue with, and the reasons.

    `same_contents`: the files at the paths in both configs are known to be the same.
    """
    refused = []
    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        values = before.get(key), after.get(key)
        row = row_of(without_stage_number(key)) or ResumeRule((), "fixed", "there is no row for it")
        if values[0] != values[1] and not _allowed(row.verdict, values, (old, new), same_contents):
            refused.append(f"{key} ({row.reason})")
    return refused


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a config, as JSON types, by their keys; a list of plain values is one value."""
    if isinstance(tree, dict) and tree:
        items: Iterator[tuple[Any, Any]] = iter(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        items = iter(enumerate(tree))
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in leaves(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def _allowed(
    verdict: Verdict, values: tuple[Any, Any], configs: tuple[RunConfig, RunConfig], same_contents: bool
) -> bool:
    if verdict == "arguments":
        return _decisive(values[0] or ()) == _decisive(values[1] or ())
    if verdict == "batching":
        return not any(map(_batching_counts, configs))
    return verdict == "free" or (verdict == "content" and same_contents)


def _batching_counts(config: RunConfig) -> bool:
    """Return whether the loss depends on which sequences share a micro-batch."""
    losses = (getattr(stage, "loss", stage) for stage in config.stages)
    return config.policy.moe_aux_loss > 0 or any(
        getattr(loss, "aggregation", None) == "micro-batch-mean" for loss in losses
    )


def _decisive(arguments: Sequence[str]) -> list[list[str]]:
    """Return the options with their values, in any order, without those that may change."""
    options: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not options:
            name, equals, value = argument.partition("=")
            options.append([name, value] if equals else [name])
        else:
            options[-1].append(argument)
    return sorted(option for option in options if option[0] not in FREE_ARGUMENTS)
