"""Which settings a resumed run may change: one row for each, true to the documentation and to SGLang's arguments."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from exprl_megatron.config.load import check_config
from exprl_megatron.config.resuming import (
    FREE_ARGUMENTS,
    TABLE,
    WORDS,
    leaves,
    refused_changes,
    row_of,
    without_stage_number,
)
from exprl_megatron.config.run import RunConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "resume.md"


def keys(annotation, prefix: str = "") -> set[str]:
    """Every key that a config can have, without the numbers of stages."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return {k for name, field in fields for k in keys(field.annotation, f"{prefix}.{name}".lstrip("."))}
    nested = {k for inner in get_args(annotation) for k in keys(inner, prefix)}
    return nested - {prefix} or {prefix}


KEYS = keys(RunConfig)


def test_every_key_of_a_config_has_a_row():
    assert len(KEYS) > 150
    assert {"stages.loss.aggregation", "stages.segments.splitter", "judge.server.tp", "evaluation.k"} <= KEYS
    assert not sorted(key for key in KEYS if row_of(key) is None)


def test_every_row_speaks_of_a_key_and_no_two_rows_of_the_same():
    names = [name for row in TABLE for name in row.keys]
    assert len(names) == len(set(names))
    used = {name for name in names for key in KEYS if key == name or f"{key}.".startswith(name.removesuffix("*"))}
    assert set(names) == used


def test_the_documentation_has_the_table():
    rows = ["| setting | on `--resume` | because |", "|---|---|---|"]
    for row in TABLE:
        rows.append(f"| {', '.join(f'`{key}`' for key in row.keys)} | {WORDS[row.verdict]} | {row.reason} |")
    arguments = [f"`{name}` ({what})" for name, what in FREE_ARGUMENTS.items()]
    text = DOCUMENT.read_text(encoding="utf-8")
    assert "\n".join(rows) in text
    assert ", ".join(arguments) in " ".join(text.split())


STAGES = [
    {
        "kind": "exprl-outcome",
        "name": "prime",
        "steps": 5,
        "problems": {"source": "p.jsonl"},
        "sampling": {"max_new_tokens": 128},
    },
    {"kind": "sft", "name": "sft", "steps": 2, "examples": "e.jsonl"},
]
BASE = {"directory": "d", "policy": {"model": "m"}, "judge": {"model": "j"}, "stages": STAGES}


def changed(key: str, value, base=BASE) -> RunConfig:
    tree = check_config(base, "test").model_dump(mode="json")
    *parents, last = key.split(".")
    place = tree
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return check_config(tree, "test")


def refused(key: str, value, base=BASE, same_contents=True) -> list[str]:
    return [
        sentence.split(" ")[0]
        for sentence in refused_changes(check_config(base, "test"), changed(key, value, base), same_contents)
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy.micro_batch_tokens", 512),
        ("policy.recompute", "full"),
        ("policy.log_prob_chunk", 64),
        ("policy.layout.tp", 2),
        ("stages.0.optimizer.offload", 0.5),
        ("verifier.workers", 4),
        ("verifier.answer_deadline_s", 9.0),
        ("verifier.program_deadline_s", 9.0),
        ("judge.endpoints", ["http://elsewhere:1/v1"]),
        ("judge.api_key_variable", "KEY"),
        ("judge.deadline_s", 9.0),
        ("judge.concurrency", 9),
        ("judge.retries", 9),
        ("judge.max_abstention_rate", 0.9),
        ("judge.gate", {"traces": "t.jsonl"}),
        ("server.count", 4),
        ("server.extra_args", ["--mem-fraction-static", "0.7", "--log-level=info"]),
        ("sync.transport", "disk"),
        ("checkpoint.keep", 9),
        ("policy.model", "moved/m"),
        ("stages.0.problems.source", "moved/p.jsonl"),
        ("stages.1.examples", "moved/e.jsonl"),
    ],
)
def test_what_does_not_change_what_is_learned_may_change(key, value):
    assert refused(key, value) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 5),
        ("stages.0.steps", 6),
        ("stages.0.group_size", 4),
        ("stages.0.loss.kl_coefficient", 0.5),
        ("stages.1.batch_size", 4),
        ("policy.precision.kind", "bf16"),
        ("policy.max_tokens", 4096),
        ("judge.temperature", 0.5),
        ("judge.endpoint_model", "other"),
        ("judge.reasks", 0),
        ("prompt.system", "Think."),
        ("sync.fp8", True),
        ("server.extra_args", ["--quantization", "fp8"]),
        ("judge.server.extra_args", ["--mem-fraction-static", "0.7", "--kv-cache-dtype=fp8_e5m2"]),
    ],
)
def test_what_changes_what_is_learned_must_stay(key, value):
    assert refused(key, value) == [key]


def test_a_path_may_change_only_where_its_contents_are_known_to_be_the_same():
    assert refused("policy.model", "moved/m", same_contents=False) == ["policy.model"]


def test_the_order_and_the_spelling_of_free_arguments_do_not_matter():
    base = BASE | {"server": {"extra_args": ["--quantization", "fp8", "--log-level", "info"]}}
    assert refused("server.extra_args", ["--quantization=fp8"], base) == []
    assert refused("server.extra_args", ["--quantization", "fp8", "--dtype", "half"], base) == ["server.extra_args"]
    assert refused("server.extra_args", [], base) == ["server.extra_args"]


@pytest.mark.parametrize("key", ["policy.micro_batch_tokens", "policy.packing", "policy.layout.dp"])
def test_how_sequences_are_batched_must_stay_where_the_loss_depends_on_it(key):
    value = False if key == "policy.packing" else 2
    by_batch = BASE | {"reproduce": "released", "stages": [STAGES[0] | {"loss": {"aggregation": "micro-batch-mean"}}]}
    experts = BASE | {"policy": {"model": "m", "moe_aux_loss": 0.1}}
    assert refused(key, value) == []
    assert refused(key, value, by_batch) == refused(key, value, experts) == [key]


def test_another_stage_at_the_end_must_not_appear():
    longer = check_config(BASE | {"stages": [*STAGES, STAGES[1] | {"name": "more"}]}, "test")
    assert any(s.startswith("stages.2.steps") for s in refused_changes(check_config(BASE, "test"), longer, True))


def test_keys_are_named_as_the_user_writes_them():
    tree = check_config(BASE, "test").model_dump(mode="json")
    assert "stages.0.optimizer.betas" in leaves(tree)
    assert without_stage_number("stages.0.optimizer.betas") == "stages.optimizer.betas"
