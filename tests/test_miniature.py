"""The committed miniature is what it claims to be: a base that seldom finishes, a judge that reads the reference."""

import asyncio
import filecmp
import importlib.util
import json
from pathlib import Path
from random import Random

import pytest

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.serving import SamplingConfig, ServerConfig
from exprl_megatron.evaluation.pass_at_k import estimate_pass_at_k
from exprl_megatron.judging.calibration import misplacement, wrong_references
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.problems import chains
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.rewards.extraction import extract_answer
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed
from exprl_megatron.rollout.trace import Trace

ROOT = Path(__file__).parents[1]
MINIATURE = ROOT / "recipes" / "miniature"
SAMPLES = 16


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
    from exprl_megatron.serving.launch import server_specs, start_servers, stop_servers

    logs = tmp_path_factory.mktemp("logs")
    specs = [s for name in ("policy", "judge") for s in server_specs(name, MINIATURE / name, ServerConfig(), logs)]
    started = start_servers(specs)
    yield {server.name.partition("-")[0]: server for server in started}
    stop_servers(started)


def heldout() -> list[dict]:
    return [json.loads(line) for line in (MINIATURE / "heldout.jsonl").read_text().splitlines()]


async def sampled(server, records: list[dict], sampling: SamplingConfig) -> list[list[Trace]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "policy")
    prompts = [Prompt(r["id"], tuple(tokenizer(r["problem"])["input_ids"])) for r in records]
    async with server.client() as client:
        version = (await client.info())["weight_version"]
        return await sample_groups(
            [client],
            prompts,
            SAMPLES,
            sampling,
            lambda problem_id, k: sample_seed(0, "test", 0, problem_id, k),
            weight_version=version,
        )


def test_weights_are_small_enough_to_be_committed():
    weights = [MINIATURE / name / "model.safetensors" for name in ("policy", "judge")]
    assert sum(path.stat().st_size for path in weights) <= 15e6


def test_the_script_writes_the_committed_problems(maker, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_miniature.py", "--policy-rows", "1", "--judge-rows", "1"])
    maker.write_data(tmp_path, tmp_path, maker.parsed_arguments())
    for name in ("train.jsonl", "heldout.jsonl"):
        assert filecmp.cmp(tmp_path / name, MINIATURE / name, shallow=False)


@pytest.mark.slow
def test_the_base_seldom_solves_a_long_problem(servers):
    records = heldout()
    groups = asyncio.run(sampled(servers["policy"], records, SamplingConfig(max_new_tokens=64)))
    counts = [
        (SAMPLES, sum(extract_answer(trace.text) == record["answer"] for trace in traces))
        for record, traces in zip(records, groups, strict=True)
    ]
    assert 0 < estimate_pass_at_k(counts, 1).mean <= 0.03
    assert estimate_pass_at_k(counts, 16).mean <= 0.30


def judged_traces(samples: list[list[Trace]], records: list[dict]) -> list[tuple[dict, str]]:
    """For each held-out problem: its worked solution, the same with a slip carried on, and one of the base's traces."""
    rng = Random("calibration")
    pairs = []
    for record, traces in zip(records, samples, strict=True):
        chain = parsed(record["problem"])
        slipped = chains.values(chain, {rng.randrange(len(chain.operations)): rng.randrange(1, 100)})
        pairs.append((record, record["reference"]))
        pairs.append((record, chains.solution_text(chain, slipped, slipped[-1])))
        pairs.append((record, traces[0].text))
    return pairs


def parsed(problem: str) -> chains.Chain:
    """`Q 7 s1 + 5 s2 * 3 A` as a chain."""
    words = problem.split()
    return chains.Chain(int(words[1]), tuple((words[i], int(words[i + 1])) for i in range(3, len(words) - 1, 3)))


async def scores(server, pairs: list[tuple[dict, str]], references: dict[str, str]) -> list[int | None]:
    """The judge's 1..5 on each trace, given the reference that `references` has for its problem."""
    from transformers import AutoTokenizer

    from exprl_megatron.judging.judge import Judge

    config = JudgeConfig(model=str(MINIATURE / "judge"), prompt="miniature", max_new_tokens=64)
    async with server.client() as client:
        judge = Judge(config, [client], AutoTokenizer.from_pretrained(config.model))
        judgements = await asyncio.gather(
            *(
                judge.judge(
                    Problem(record["id"], record["problem"], Reference(references[record["id"]]), record["answer"]),
                    Trace(record["id"], 0, (), (), (), text, "stop", ()),
                )
                for record, text in pairs
            )
        )
    return [round(1 + 4 * j.value) if isinstance(j, Scored) else None for j in judgements]


@pytest.mark.slow
def test_the_judge_reads_the_reference(servers):
    records = heldout()
    samples = asyncio.run(sampled(servers["policy"], records, SamplingConfig(max_new_tokens=64)))
    pairs = judged_traces(samples, records)
    correct = [extract_answer(text) == record["answer"] for record, text in pairs]
    own = {record["id"]: record["reference"] for record in records}
    foreign = {key: own[other] for key, other in wrong_references(list(own)).items()}
    right = misplacement(asyncio.run(scores(servers["judge"], pairs, own)), correct)
    wrong = misplacement(asyncio.run(scores(servers["judge"], pairs, foreign)), correct)
    print(f"misplaced with the right reference {right.rate:.1%} ({right}), with a wrong one {wrong.rate:.1%} ({wrong})")
    assert right.rate <= 0.15
    assert wrong.rate >= 0.35


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ["policy", "judge"])
def test_the_script_makes_the_model_again(maker, tmp_path, monkeypatch, name):
    out, build = tmp_path / "out", tmp_path / "build"
    arguments = ["--out", str(out), "--build", str(build), "--only", name]
    monkeypatch.setattr("sys.argv", ["make_miniature.py", *arguments])
    maker.main()
    examples = build / f"{name}-sft.jsonl"
    # Another processor rounds otherwise, and hundreds of steps make that large: losses agree, weights need not.
    assert losses(out / name, examples) == pytest.approx(losses(MINIATURE / name, examples), abs=0.03)


def losses(model: Path, examples: Path) -> float:
    """Mean loss of a model, in nats a token, on the last rows that it learned from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    total, tokens = 0.0, 0
    for line in examples.read_text().splitlines()[-200:]:
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            loss = loaded(torch.tensor([prompt + completion]), labels=labels).loss
        total, tokens = total + loss.item() * len(completion), tokens + len(completion)
    return total / tokens
