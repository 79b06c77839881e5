"""`exprl report --serve`: who gets an answer, and that what a run leaves meanwhile is in the next one."""

import gzip
import json
import os
import shutil

import pytest
from aiohttp.test_utils import TestClient, TestServer
from report_runs import write_run

from exprl_megatron.inspection.report_page.page_model import PageReader
from exprl_megatron.inspection.report_page.page_server import PageServer

TOKEN = "token-of-the-page"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def asked(written, tmp_path):
    """`asked(run=..., then=coroutine of a client)`: what the client's coroutine gives."""
    import asyncio

    def ask(then, run=written):
        async def within():
            server = TestServer(PageServer(PageReader([run], references=True), TOKEN).application(), host="127.0.0.1")
            async with TestClient(server) as client:
                return await then(client)

        return asyncio.run(within())

    return ask


@pytest.mark.parametrize("path", ["/", "/stamp", "/model", f"/block/{16 * '0'}", "/elsewhere"])
@pytest.mark.parametrize("token", [None, "", "token-of-the-pagE", "tök", TOKEN + "x"])
def test_nobody_gets_an_answer_without_the_token(asked, path, token):
    async def then(client):
        async with client.get(path, params={} if token is None else {"token": token}) as answer:
            return answer.status, await answer.text()

    status, text = asked(then)
    assert status == 403 and "train-1" not in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "localhost"])
def test_a_page_of_another_site_gets_no_answer_even_with_the_token(asked, host):
    async def then(client):
        headers = {"Host": host.format(port=client.port)}
        async with client.get("/model", params={"token": TOKEN}, headers=headers) as answer:
            return answer.status

    assert asked(then) in (400, 403)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(asked, method):
    async def then(client):
        async with client.request(method, "/model", params={"token": TOKEN}) as answer:
            return answer.status

    assert asked(then) == 405


def test_the_page_its_model_and_its_blocks_are_served_under_a_policy_that_allows_its_own_server_alone(asked):
    async def then(client):
        found = []
        for path in ("/", "/model"):
            async with client.get(path, params={"token": TOKEN}) as answer:
                found.append((answer.status, answer.headers, await answer.read()))
        key = json.loads(found[1][2])["runs"][0]["places"][0]["block"]
        async with client.get(f"/block/{key}", params={"token": TOKEN}) as answer:
            found.append((answer.status, answer.headers, await answer.read()))
        return found

    (page_status, headers, page), (_, _, model), (_, _, block) = asked(then)
    assert page_status == 200 and headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    assert b"connect-src &#39;self&#39;" in page and b"default-src &#39;none&#39;" in page
    assert json.loads(model)["runs"][0]["places"][0]["kept"] == 4
    assert json.loads(gzip.decompress(block))["groups"][0]["problem"] == "train-1"


def test_a_step_that_a_run_leaves_meanwhile_is_in_the_next_answer(asked, written, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(written, run)
    last = run / "journal" / "sparse" / "step-000003.parquet"
    kept = last.read_bytes()
    last.unlink()

    async def then(client):
        found = []
        for _ in range(2):
            async with client.get("/stamp", params={"token": TOKEN}) as answer:
                stamp = await answer.text()
            async with client.get("/model", params={"token": TOKEN}) as answer:
                found.append((stamp, len((await answer.json())["runs"][0]["places"])))
            last.write_bytes(kept)
        return found

    (first_stamp, first), (second_stamp, second) = asked(then, run)
    assert (first, second) == (6, 7) and first_stamp != second_stamp


def test_a_window_of_an_earlier_model_gets_no_other_steps_traces_under_the_name_that_it_knows(asked, written, tmp_path):
    run, other = tmp_path / "run", write_run(tmp_path / "other", problem="another problem")
    shutil.copytree(written, run)

    async def block_of_first_place(client):
        async with client.get("/model", params={"token": TOKEN}) as answer:
            return (await answer.json())["runs"][0]["places"][0]["block"]

    async def status(client, key):
        async with client.get(f"/block/{key}", params={"token": TOKEN}) as answer:
            return answer.status

    async def then(client):
        known = await block_of_first_place(client)
        for path in sorted((other / "journal").rglob("*.parquet")):
            replaced = run / path.relative_to(other)
            replaced.unlink()
            shutil.copy(path, replaced)
        today = await block_of_first_place(client)
        return known == today, await status(client, known), await status(client, today)

    assert asked(then, run) == (False, 404, 200)


def test_lines_that_come_within_one_tick_of_the_clock_are_noticed(tmp_path):
    run = write_run(tmp_path / "run")
    reader, metrics = PageReader([run], references=False), run / "metrics.jsonl"
    time, before = metrics.stat().st_mtime_ns, reader.stamp()
    with open(metrics, "a") as file:
        file.write(metrics.read_text().splitlines()[-1] + "\n")
    os.utime(metrics, ns=(time, time))
    assert reader.stamp() != before
