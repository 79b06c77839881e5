"""The committed miniature is what it claims to be: a base that hardly ever finishes, a judge that reads references."""

import asyncio
import filecmp
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import chains
import pytest

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.serving import SamplingConfig, ServerConfig
from exprl_megatron.judging.calibration import misplacement, wrong_references
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.reporting.metrics import read_metrics
from exprl_megatron.rewards.extraction import extract_answer
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.static_pool import StaticPool

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "recipes" / "miniature"
STEPS = 40


@pytest.fixture(scope="module")
def maker():
    """tools/make_miniature.py as a module."""
    spec = importlib.util.spec_from_file_location("make_miniature", ROOT / "tools" / "make_miniature.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The base policy and the judge, served side by side."""
    from helpers.forking import starter

    from exprl_megatron.serving.server_process import start_servers, stop_servers
    from exprl_megatron.serving.server_spec import server_specs

    logs = tmp_path_factory.mktemp("logs")
    specs = [s for name in ("policy", "judge") for s in server_specs(name, MINIATURE / name, ServerConfig(), logs)]
    started = start_servers(specs, starter())
    yield {server.name.partition("-")[0]: server for server in started}
    stop_servers(started)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (MINIATURE / name).read_text().splitlines()]


def parsed(problem: str) -> chains.Chain:
    """`Q 7 s1 + 5 s2 * 3 A` as a chain."""
    words = problem.split()
    return chains.Chain(int(words[1]), tuple((words[i], int(words[i + 1])) for i in range(3, len(words) - 1, 3)))


def test_weights_are_small_enough_to_be_committed():
    weights = [MINIATURE / name / "model.safetensors" for name in ("policy", "judge")]
    assert sum(path.stat().st_size for path in weights) <= 15e6


def test_the_script_writes_the_committed_problems(maker, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_miniature.py", "--policy-rows", "1", "--judge-rows", "1"])
    maker.write_data(tmp_path, tmp_path, maker.parsed_arguments())
    names = ("train", "heldout", "judged", "hard-train", "hard-heldout")
    for name in (f"{name}.jsonl" for name in names):
        assert filecmp.cmp(tmp_path / name, MINIATURE / name, shallow=False)


def test_the_judged_traces_are_marked_rightly():
    found = rows("judged.jsonl")
    assert len(found) == 300
    assert [row["correct"] for row in found] == [extract_answer(row["trace"]) == row["answer"] for row in found]
    assert 0.35 <= sum(row["correct"] for row in found) / len(found) <= 0.45


@pytest.fixture(scope="module")
def base():
    """The base policy and its tokenizer in `transformers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MINIATURE / "policy")
    return model.eval(), AutoTokenizer.from_pretrained(MINIATURE / "policy")


def word_probabilities(base, prompt: str, completion: str) -> list[float]:
    """Of each word of `completion`, and of its end, after `prompt` and the words before it."""
    import torch

    model, tokenizer = base
    asked = tokenizer(prompt)["input_ids"]
    written = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([asked + written])).logits[0, len(asked) - 1 : -1]
    return logits.softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0].tolist()


@pytest.mark.slow
def test_the_base_does_steps_well_and_hardly_ever_continues(base):
    finishes, goes_on, right = [], [], []
    for row in rows("heldout.jsonl"):
        found = word_probabilities(base, row["problem"], chains.worked_text(parsed(row["problem"])))
        finishes.append(math.prod(found))
        segments = list(itertools.batched(found[:-3], 7))
        goes_on += [segment[0] for segment in segments[1:]]
        right += [math.prod(segment[1:]) for segment in segments]
    assert 1e-4 <= fmean(finishes) <= 2e-3
    assert 0.1 <= fmean(goes_on) <= 0.3
    assert fmean(right) >= 0.9


@pytest.mark.slow
def test_a_hint_helps_the_base_and_does_not_cure_it(base):
    finishes = [
        math.prod(
            word_probabilities(
                base,
                chains.problem_with_reference_text(row["problem"], row["reference"]),
                chains.worked_text(parsed(row["problem"])),
            )
        )
        for row in rows("heldout.jsonl")
    ]
    assert 0.005 <= fmean(finishes) <= 0.06


async def sampled(server, records: list[dict], samples: int) -> list[list[Trace]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "policy")
    prompts = [Prompt(r["id"], tuple(tokenizer(r["problem"])["input_ids"])) for r in records]
    async with server.client() as client:
        version = (await client.info())["weight_version"]
        return await sample_groups(
            StaticPool([client]),
            prompts,
            samples,
            SamplingConfig(max_new_tokens=64),
            lambda problem_id, k: sample_seed(0, "test", 0, problem_id, k),
            weight_versions=[version],
        )


@pytest.mark.slow
def test_the_served_base_hardly_ever_solves_a_long_problem(servers):
    records = rows("heldout.jsonl")
    groups = asyncio.run(sampled(servers["policy"], records, 16))
    solved = [
        extract_answer(trace.text) == record["answer"]
        for record, traces in zip(records, groups, strict=True)
        for trace in traces
    ]
    assert sum(solved) <= 0.005 * len(solved)


async def scores(server, pairs: list[tuple[dict, str]], references: dict[str, str], prompt: str) -> list[int | None]:
    """The judge's 1..5 on each trace, given the reference that `references` has for its problem text."""
    from transformers import AutoTokenizer

    from exprl_megatron.judging.judge import Judge

    config = JudgeConfig(model=str(MINIATURE / "judge"), prompt=prompt, max_new_tokens=64)
    async with server.client() as client:
        judge = Judge(config, [client], AutoTokenizer.from_pretrained(config.model))
        judgements = await asyncio.gather(
            *(
                judge.grade(
                    Problem(row["problem"], row["problem"], Reference(references[row["problem"]]), row["answer"]), text
                )
                for row, text in pairs
            )
        )
    return [round(1 + 4 * j.value) if isinstance(j, Scored) else None for j in judgements]


@pytest.mark.slow
def test_the_judge_reads_the_reference(servers):
    judged = rows("judged.jsonl")
    pairs, correct = [(row, row["trace"]) for row in judged], [row["correct"] for row in judged]
    own = {row["problem"]: row["reference"] for row in judged}
    foreign = {key: own[other] for key, other in wrong_references(list(own)).items()}
    right = misplacement(asyncio.run(scores(servers["judge"], pairs, own, "miniature")), correct)
    wrong = misplacement(asyncio.run(scores(servers["judge"], pairs, foreign, "miniature")), correct)
    print(f"misplaced with the right reference {right.rate:.1%} ({right}), with a wrong one {wrong.rate:.1%} ({wrong})")
    assert right.rate <= 0.05
    assert wrong.rate >= 0.35


@pytest.mark.slow
def test_the_judge_scores_beginnings_and_single_segments(servers):
    records = rows("heldout.jsonl")
    own = {row["problem"]: row["reference"] for row in records}
    groups = asyncio.run(sampled(servers["policy"], records, 4))
    texts = [(row, trace.text) for row, traces in zip(records, groups, strict=True) for trace in traces]
    texts += [(row, row["trace"]) for row in rows("judged.jsonl")]
    parts = [(row, [f"###{part}".strip() for part in text.split("###")[1:]]) for row, text in texts]
    segments = [(row, segment) for row, pieces in parts for segment in pieces]
    prefixes = [(row, " ".join(pieces[:n])) for row, pieces in parts for n in range(1, len(pieces) + 1)]
    for prompt, pairs, expected in (
        ("miniature", prefixes, chains.expected_score),
        ("miniature-segment", segments, chains.expected_step_score),
    ):
        found = asyncio.run(scores(servers["judge"], pairs, own, prompt))
        agree = [score == expected(text, row["reference"]) for score, (row, text) in zip(found, pairs, strict=True)]
        print(f"{prompt}: {fmean(agree):.1%} of {len(agree)} scored as expected")
        assert fmean(agree) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy", "judge"])
def test_the_script_learns_as_it_did_for_the_committed_model(tmp_path, name):
    """The losses of the first steps: another processor rounds otherwise, which grows from step to step."""
    command = [sys.executable, ROOT / "tools" / "make_miniature.py", "--only", name]
    metrics = tmp_path / "build" / f"{name}-run" / "metrics.jsonl"
    with (tmp_path / "log").open("wb") as log:
        making = subprocess.Popen(
            [*command, "--out", tmp_path / "out", "--build", tmp_path / "build"], stdout=log, stderr=log
        )
        try:
            while making.poll() is None and len(read_metrics(metrics)) < STEPS:
                time.sleep(0.2)
        finally:
            making.terminate()
            making.wait(60)
    found = [record["metrics"]["loss"] for record in read_metrics(metrics)[:STEPS]]
    expected = json.loads((MINIATURE / f"losses-{name}.json").read_text())[:STEPS]
    assert found == pytest.approx(expected, abs=0.03), (tmp_path / "log").read_text()[-2000:]
