"""A real router in front of a real server, and the list of registered servers that it receives."""

import asyncio

import aiohttp
import psutil
import pytest

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.serving.keys import read_key
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.router import RoutedClient
from exprl_megatron.serving.router_spec import JUDGE_ROUTER, RouterSpec
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.utils.ports import free_ports

pytestmark = pytest.mark.slow

PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def router(tiny_model, tmp_path_factory):
    config = ServerConfig(request_deadline_s=60)
    spec = RouterSpec(JUDGE_ROUTER, tiny_model("qwen3"), config, tmp_path_factory.mktemp("logs"))
    with start_servers([spec])[0] as started:
        yield started


@pytest.fixture
def registry(router, tmp_path):
    registry = Registry(tmp_path)
    log, key = str(router.log_file), str(router.key_file)
    registry.register(RegisteredServer("router", JUDGE_ROUTER, router.url, log, "1", key_file=key))
    return registry


def judge(number: int, url: str, key_file: object = "") -> RegisteredServer:
    return RegisteredServer("judge", f"judge-{number}", url, "none", "1", key_file=str(key_file))


async def sampled(client):
    return (await client.generate(PROMPT, temperature=1.0, max_new_tokens=8, seed=5)).token_ids.tolist()


def test_answers_come_from_the_registered_servers_that_answer(registry, qwen3_server):
    (dead,) = free_ports(1)
    registry.register(judge(0, f"http://127.0.0.1:{dead}"))
    registry.register(judge(1, qwen3_server.url, qwen3_server.key_file))

    async def ask():
        async with RoutedClient(registry, JUDGE_ROUTER, "judge", 60) as routed, qwen3_server.client() as direct:
            await routed.health()
            return [await sampled(routed) for _ in range(3)], await sampled(direct)

    through_router, directly = asyncio.run(ask())
    assert through_router == [directly] * 3


def test_without_a_server_that_answers_the_error_says_so(registry):
    (dead,) = free_ports(1)
    registry.register(judge(0, f"http://127.0.0.1:{dead}"))

    async def ask():
        async with RoutedClient(registry, JUDGE_ROUTER, "judge", 60) as routed:
            with pytest.raises(ServerError, match="none of 1 registered judge servers answers"):
                await routed.health()
            with pytest.raises(ServerError, match="none of 1 registered judge servers answers"):
                await sampled(routed)

    asyncio.run(ask())


def test_a_server_that_registers_later_is_asked_from_then_on(registry, qwen3_server):
    async def ask():
        async with RoutedClient(registry, JUDGE_ROUTER, "judge", 60) as routed:
            with pytest.raises(ServerError, match="none of 0 registered"):
                await sampled(routed)
            registry.register(judge(0, qwen3_server.url, qwen3_server.key_file))
            return await sampled(routed)

    assert len(asyncio.run(ask())) > 0


def test_a_router_takes_no_request_without_the_runs_key(router, registry, qwen3_server):
    registry.register(judge(0, qwen3_server.url, qwen3_server.key_file))

    async def without_key(path: str, body: dict | None) -> int:
        async with aiohttp.ClientSession() as session:
            method = "GET" if body is None else "POST"
            async with session.request(method, router.url + path, json=body) as reply:
                return reply.status

    async def ask():
        async with RoutedClient(registry, JUDGE_ROUTER, "judge", 60) as routed:
            await routed.health()
            generate = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}
            return [
                await without_key(*asked) for asked in (("/generate", generate), ("/workers", {"url": "http://a:1"}))
            ]

    assert asyncio.run(ask()) == [401, 401]
    key = read_key(router.key_file)
    assert key not in " ".join(psutil.Process(router.pid).cmdline()) + router.log_file.read_text()
