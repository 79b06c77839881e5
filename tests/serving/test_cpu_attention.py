"""Attention of whole batches in servers on a CPU: SGLang's numbers, in pieces, and what is left to SGLang."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exprl_megatron.serving.server_command import CPU_BACKEND

PLACES, CONTEXT, POOLS = 500, 64, 20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def attention():
    """The CPU backend's module, loaded again."""
    spec = importlib.util.spec_from_file_location("exprl_cpu_attention", CPU_BACKEND / "exprl_cpu_attention.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Requests:
    """A batch of requests with random caches, as SGLang hands it over."""

    def __init__(self, cached: list[int], new: list[int], heads: int = 4, kv_heads: int = 2, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.cached, self.new = torch.tensor(cached), torch.tensor(new)
        self.keys, self.values = (torch.randn(PLACES, kv_heads, 8, generator=generator) for _ in range(2))
        self.pools = torch.randperm(POOLS, generator=generator)[: len(cached)]
        self.table = torch.randint(0, PLACES, (POOLS, CONTEXT), generator=generator, dtype=torch.int32)
        self.query = torch.randn(sum(new), heads, 8, generator=generator)
        self.output = torch.full_like(self.query, torch.nan)
        self.settings = {"scaling": 0.3, "enable_gqa": heads != kv_heads, "causal": True}
        self.settings |= {"is_cross_attn": False, "sliding_window_size": None}
        self.encoder_lengths = None
        self.left_to_sglang = 0

    def _original(self, *_, **__) -> torch.Tensor:
        self.left_to_sglang += 1
        return self.output

    def _common(self) -> tuple:
        return self.query, self.output, self.keys, self.values, self.table, self.pools, self.cached + self.new

    def extend(self, attention) -> torch.Tensor:
        tensors = (*self._common(), self.cached, self.new, self.encoder_lengths)
        return attention.extend(self._original, None, *tensors, **self.settings)

    def decode(self, attention, backend=None) -> torch.Tensor:
        settings = self.settings | {"causal": False}
        return attention.decode(self._original, backend, *self._common(), self.encoder_lengths, **settings)

    def expected(self) -> torch.Tensor:
        """softmax(scaling * q k) v of every new token over itself and all before it, in double precision."""
        share, found, row = self.query.shape[1] // self.keys.shape[1], [], 0
        for pool, cached, new in zip(self.pools, self.cached.tolist(), self.new.tolist(), strict=True):
            for length in range(cached + 1, cached + new + 1):
                seen = self.table[pool, :length].long()
                keys, values = (cache[seen].double().repeat_interleave(share, 1) for cache in (self.keys, self.values))
                scores = 0.3 * torch.einsum("hw,thw->ht", self.query[row].double(), keys)
                found.append(torch.einsum("ht,thw->hw", scores.softmax(-1), values))
                row += 1
        return torch.stack(found).float()


MIXED = ([0, 0, 5, 30, 7, 0, 1, 40], [3, 20, 1, 9, 20, 2, 1, 20])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 2), (3, 1)])
def test_every_new_token_attends_to_itself_and_all_before_it(attention, heads, kv_heads, seed):
    prompts = Requests(*MIXED, heads, kv_heads, seed)
    torch.testing.assert_close(prompts.extend(attention), prompts.expected(), atol=2e-6, rtol=1e-5)
    cached = torch.randint(0, CONTEXT - 1, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = Requests(cached, [1] * 12, heads, kv_heads, seed)
    torch.testing.assert_close(tokens.decode(attention), tokens.expected(), atol=2e-6, rtol=1e-5)
    assert prompts.left_to_sglang == tokens.left_to_sglang == 0


def test_a_decoding_step_is_planned_once_for_all_layers_and_again_for_the_next(attention, monkeypatch):
    planned = []
    cut = attention.piece_sizes
    monkeypatch.setattr(attention, "piece_sizes", lambda *given: (planned.append(given), cut(*given))[1])
    backend = SimpleNamespace()

    def check(requests: Requests, plans: int):
        torch.testing.assert_close(requests.decode(attention, backend), requests.expected(), atol=2e-6, rtol=1e-5)
        assert len(planned) == plans

    requests = Requests([20, 3, 40, 8], [1] * 4)
    attention.forget_plans(backend, object())
    for _ in range(3):
        requests.query.normal_(generator=torch.Generator().manual_seed(1))
        requests.keys.mul_(-0.5)
        check(requests, 1)
    # The next token of each: other lengths, in a new pass and even where SGLang would not say that it is one.
    requests.cached += 1
    check(requests, 2)
    attention.forget_plans(backend)
    requests.table.copy_(requests.table.flip(1))
    check(requests, 3)
    check(Requests([20, 3, 40, 8], [1] * 4, heads=6, kv_heads=3), 4)


@pytest.mark.parametrize("piece", [1, 300, 2000, 20_000])
@pytest.mark.parametrize("padding", [0, 100, 10_000])
def test_work_is_done_in_pieces_of_bounded_memory_with_the_same_result(attention, monkeypatch, piece, padding):
    monkeypatch.setattr(attention, "PIECE", piece)
    monkeypatch.setattr(attention, "PADDING", padding)
    made = []
    together = attention._attend_together
    monkeypatch.setattr(attention, "_attend_together", lambda batch, jobs: (made.append(jobs), together(batch, jobs)))
    prompts = Requests(*MIXED)
    torch.testing.assert_close(prompts.extend(attention), prompts.expected(), atol=2e-6, rtol=1e-5)
    for jobs in made:
        count, length = max(job.count for job in jobs), max(job.length for job in jobs)
        assert len(jobs) == 1 or len(jobs) * length * (2 * 2 * 8 + count * 2) <= piece
        # A mask has a row for each query and each of the two heads that share keys.
        assert count == length or count == 1 or count * 2 * length <= piece
    tokens = sorted(row for jobs in made for job in jobs for row in range(job.first, job.first + job.count))
    assert tokens == list(range(len(prompts.query)))


@pytest.mark.parametrize("piece", [1, 300, 2000, 20_000])
@pytest.mark.parametrize("padding", [0, 100, 10_000])
def test_new_tokens_are_put_together_by_the_rule_for_prompts(attention, monkeypatch, piece, padding):
    monkeypatch.setattr(attention, "PIECE", piece)
    monkeypatch.setattr(attention, "PADDING", padding)
    cached = torch.randint(1, CONTEXT - 1, (POOLS,), generator=torch.Generator().manual_seed(piece)).tolist()
    tokens = Requests(cached, [1] * POOLS)
    batch = attention.Batch(tokens.query, tokens.output, tokens.keys, tokens.values, tokens.table, None)
    jobs = [attention.Job(0, row, 1, length + 1) for row, length in enumerate(cached)]
    expected = [[job.first for job in jobs] for jobs in attention.pieces(batch, jobs)]
    plan = attention.decode_plan(batch, tokens.pools, tokens.cached + 1)
    assert [one.rows.tolist() for one in plan.pieces] == expected
    torch.testing.assert_close(tokens.decode(attention), tokens.expected(), atol=2e-6, rtol=1e-5)


def changed(name: str, value):
    return lambda requests: requests.settings.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        changed("sliding_window_size", 16),
        changed("is_cross_attn", True),
        lambda requests: setattr(requests, "encoder_lengths", torch.ones(8, dtype=torch.int64)),
        lambda requests: setattr(requests, "keys", requests.keys.bfloat16()),
    ],
)
def test_what_is_not_plain_attention_of_a_decoder_is_left_to_sglang(attention, change):
    requests = Requests(*MIXED)
    change(requests)
    requests.extend(attention)
    requests.new.fill_(1)
    requests.decode(attention)
    assert requests.left_to_sglang == 2


def test_bidirectional_attention_and_a_request_that_is_alone_are_left_to_sglang(attention):
    both_ways = Requests(*MIXED)
    both_ways.settings["causal"] = False
    both_ways.extend(attention)
    token, prompt, follows = Requests([9], [1]), Requests([0], [9]), Requests([9], [9])
    token.decode(attention)
    prompt.extend(attention)
    assert both_ways.left_to_sglang == token.left_to_sglang == prompt.left_to_sglang == 1
    torch.testing.assert_close(follows.extend(attention), follows.expected(), atol=2e-6, rtol=1e-5)
    assert follows.left_to_sglang == 0, "SGLang would compute the cached tokens' queries again"


@pytest.mark.slow
def test_servers_have_it_in_place_of_sglang_s_loop_with_the_same_numbers(tmp_path):
    """The benchmark calls SGLang's backend as its plugins leave it, and what it was before."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "bench_cpu_decode.py", "--rounds", "1"]
    subprocess.run([*command, "--json", figures], check=True, capture_output=True)
    rows = json.loads(figures.read_text())
    assert len(rows) >= 8 and all(row["difference"] < 5e-6 for row in rows)
    assert any(row["difference"] > 0 for row in rows), "both were SGLang's own"
    assert {row["plans"] for row in rows if row["shape"].startswith("decode")} == {1}, "each layer plans by itself"
