"""What the client does where no server answers; the rest is shown on real servers in test_real_servers."""

import asyncio

import pytest
from aiohttp import web

from exprl_megatron.errors import KeyRefused, ServerError
from exprl_megatron.processes.log_tail import log_tail
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint
from exprl_megatron.serving.ready import wait_ready
from exprl_megatron.utils.ports import free_ports


def ask_health(log_file):
    async def run():
        async with SGLangClient(f"http://127.0.0.1:{free_ports(1)[0]}", "judge-1", log_file, 60) as client:
            await client.health()

    asyncio.run(run())


def test_a_dead_server_is_named_with_its_last_words(tmp_path):
    log_file = tmp_path / "judge-1.log"
    log_file.write_text("\n".join(f"line {i}" for i in range(1000)) + "\nout of memory\n\n")
    with pytest.raises(ServerError) as caught:
        ask_health(log_file)
    first, *last = str(caught.value).splitlines()
    assert first.startswith("judge-1 (http://127.0.0.1:") and "asked /health: died or is not reachable" in first
    assert first.endswith(f"Log: {log_file}; its last lines:")
    assert [line.strip() for line in last] == [*(f"line {i}" for i in range(986, 1000)), "out of memory"]


def test_the_error_of_the_rank_that_failed_first_is_named_before_the_others_last_words(tmp_path):
    log_file = tmp_path / "policy-0.log"
    others = ["RuntimeError: Connection closed by peer", *(f"line {i}" for i in range(20))]
    log_file.write_text(
        "warm-up failed\nTraceback (most recent call last):\nConnectionRefusedError: [Errno 111] refused\n"
        "[TP1] Scheduler hit an exception: Traceback (most recent call last):\n"
        '  File "loader.py", line 3\n    raise ValueError: no\nFileNotFoundError: No such file: model-00017\n\n'
        "During handling of the above exception, another exception occurred:\nsome.hub.ValidationError: a repo id\n"
        "[TP0] Scheduler hit an exception: Traceback (most recent call last):\n" + "\n".join(others)
    )
    first, *last = log_tail(log_file).splitlines()
    assert first == f" Log: {log_file}; first error: FileNotFoundError: No such file: model-00017; its last lines:"
    assert [line.strip() for line in last] == [f"line {i}" for i in range(5, 20)]


def test_a_server_that_does_not_become_ready_is_named_with_its_deadline(tmp_path):
    async def wait():
        async with SGLangClient(f"http://127.0.0.1:{free_ports(1)[0]}", "ref-0", tmp_path / "ref-0.log") as client:
            await wait_ready(client, 0.1)

    expected = (
        r"ref-0 \(http://.*\) was not ready within start_deadline_s \(0.1 s\).*asked /health: .*not reachable.*Log: "
    )
    with pytest.raises(ServerError, match=expected):
        asyncio.run(wait())


def endpoint_at(answers):
    """Wait for an endpoint whose list of models has these statuses in turn; returns what was reported."""
    said = []

    async def models(request):
        return web.json_response({}, status=answers.pop(0) if len(answers) > 1 else answers[0])

    async def wait():
        app = web.Application()
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            async with OpenAIEndpoint(url, "m", "judge-0", api_key="sk-secret") as endpoint:
                await wait_ready(endpoint, 60, said.append)
        finally:
            await runner.cleanup()

    asyncio.run(wait())
    return said


def test_an_endpoint_that_answers_is_not_reported():
    assert endpoint_at([200]) == []


def test_what_an_endpoint_lacks_is_reported_once_and_immediately():
    (sentence,) = endpoint_at([503, 503, 200])
    assert sentence.startswith("waiting at most 60 s: judge-0 (http://127.0.0.1:")
    assert "asked /models: refused with HTTP 503" in sentence and "\n" not in sentence


def test_an_endpoint_that_refuses_the_key_is_not_waited_for():
    with pytest.raises(KeyRefused, match=r"judge-0 .*asked /models: refused with HTTP 401") as caught:
        endpoint_at([401])
    assert "sk-secret" not in str(caught.value)


def test_a_log_that_cannot_be_read_does_not_hide_the_error(tmp_path):
    with pytest.raises(ServerError, match=r"judge-1 .*not reachable.* Log: .*absent.log \(unreadable: No such file"):
        ask_health(tmp_path / "absent.log")
    assert log_tail(None) == " Its log is not on this machine."


def test_a_client_that_was_not_opened_says_so():
    client = SGLangClient("http://127.0.0.1:1", "policy-0")
    with pytest.raises(RuntimeError, match="the client of policy-0 is not open"):
        asyncio.run(client.health())


def test_a_client_that_was_closed_while_it_was_in_use_is_a_server_error():
    """As where a server registers again: what asks it then asks another server, and the run does not end."""

    async def closed():
        async with SGLangClient("http://127.0.0.1:1", "policy-0") as client:
            pass
        await client.health()

    with pytest.raises(ServerError, match=r"policy-0 \(http://127.0.0.1:1\), asked /health: its client was closed"):
        asyncio.run(closed())
