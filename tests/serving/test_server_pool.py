"""Servers that register, fail, recover and leave: which receive requests and weights, and which are restarted."""

import asyncio
import re
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import ServerError, WeightsReplaced
from exprl_megatron.serving.keys import ensure_key
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.server_pool import ServerPool
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.serving.server_supervisor import ServerSupervisor
from exprl_megatron.serving.shared_judge import JUDGE_VERSION, SharedJudgeClient

CONFIG = {"start_deadline_s": 120, "request_deadline_s": 120, "answer_deadline_s": 60}


class Backend:
    """Answers everything with its name, while it is `well`; else with its `status`, or never."""

    def __init__(self, name):
        self.name = name
        self.well = True
        self.status = None
        self.asked = []
        self.slow: dict[str, asyncio.Event] = {}
        """Paths that are answered when their event is set."""
        self.version, self.model_path = "v0", "started-with"

    async def answer(self, request):
        self.asked.append(request.path)
        if not self.well and self.status is None:
            await asyncio.sleep(600)
        if not self.well:
            return web.json_response({"error": {"message": "unwell"}}, status=self.status)
        if request.path in self.slow:
            await self.slow[request.path].wait()
        if request.path == "/end_weight_update":
            return web.json_response({"success": False, "message": "no weight-update session is open"}, status=400)
        if request.path == "/generate":
            return web.json_response(self.written())
        served = {"weight_version": self.version, "model_path": self.model_path}
        return web.json_response({"name": self.name, "success": True} | served)

    def written(self):
        """An answer of one token under the weights that it says it has."""
        meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 1, "cached_tokens": 0}
        meta["output_token_logprobs"] = [[-0.5, 7, None]]
        meta["weight_versions"] = [{"version": self.version, "start": 0, "end": 1}]
        return {"text": self.name, "output_ids": [7], "meta_info": meta}

    def registered(self, instance_id="a"):
        return RegisteredServer("policy", self.name, self.url, "", instance_id)


@asynccontextmanager
async def opened(registry, *names, log=print, through=None, **config):
    """A pool of two usually, and the servers behind it, which have registered and got the weights `v0`.

    `through` is its router.
    """
    backends, runners = [Backend(name) for name in names], []
    for backend in backends:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", backend.answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        backend.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
        registry.register(backend.registered())
    pool = ServerPool(registry, ServerConfig(count=len(names), **CONFIG | config), router=through, log=log)
    try:
        await pool.open()
        assert await pool.prepare("v0")
        await pool.commit("v0")
        yield (pool, *backends)
    finally:
        await pool.close()
        for runner in runners:
            await runner.cleanup()


class RouterList:
    """In place of the client of a router: keeps the servers that it is given."""

    def __init__(self):
        self.given = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def route_to(self, urls, deadline_s):
        self.given.append(urls)


async def who(pool, home=0):
    return (await pool.ask(home, lambda client: client.info()))["name"]


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)


def names(pool):
    return [client.name for client in pool.clients]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """The pool looks at its registry and at its servers a dozen times as often as in a run."""
    monkeypatch.setattr("exprl_megatron.serving.pool_members._POLL_S", 0.02)
    monkeypatch.setattr("exprl_megatron.serving.server_pool._RETRY_S", 0.02)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "servers")


@pytest.fixture
def can_sleep(monkeypatch):
    """Servers give up their memory, as they can on CUDA."""
    monkeypatch.setattr("exprl_megatron.serving.server_pool.uses_cuda", lambda: True)


def test_each_request_has_a_home_and_a_version_is_pushed_once(registry):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, *_):
            assert [await who(pool, home) for home in range(4)] == ["policy-0", "policy-1"] * 2
            assert not await pool.prepare("v0")
            assert await pool.prepare("v1")

    asyncio.run(run())


def test_servers_that_slept_have_lost_their_weights_and_get_the_same_version_again(registry, can_sleep):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, *_):
            assert await pool.sleep()
            await pool.wake("weights")
            assert await pool.prepare("v0") and names(pool) == ["policy-0", "policy-1"]
            await pool.commit("v0")
            await pool.wake("kv_cache")
            assert not await pool.prepare("v0"), "they hold it until they sleep again"

    asyncio.run(run())


def test_a_router_is_given_the_servers_that_have_the_weights_and_the_others_when_one_of_them_has_left(registry):
    async def run():
        router = RouterList()
        async with opened(registry, "policy-0", "policy-1", through=router) as (_, one, two):
            assert router.given == [{one.url, two.url}]
            registry.withdraw("policy-0")
            await until(lambda: router.given[-1] == {two.url})

    asyncio.run(run())


def slept(backend):
    return backend.asked.count("/release_memory_occupation")


def test_a_server_that_joins_while_the_others_sleep_is_put_to_sleep_too_and_wakes_with_them(registry, can_sleep):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, two):
            await pool.sleep()
            registry.register(two.registered("b"))
            await until(lambda: len(pool._members.in_state("pending")) == 1)
            assert (slept(one), slept(two)) == (1, 2)
            await pool.sleep()
            assert (slept(one), slept(two)) == (1, 2), "SGLang dies where memory is given up twice"
            for tag in ("weights", "kv_cache"):
                await pool.wake(tag)
            assert two.asked.count("/resume_memory_occupation") == 2
            registry.register(one.registered("b"))
            await until(lambda: len(pool._members.in_state("pending")) == 2)
            assert slept(one) == 1, "the others are awake"

    asyncio.run(run())


def woken(backend):
    return backend.asked.count("/resume_memory_occupation")


def test_a_server_that_goes_to_sleep_while_the_others_wake_wakes_too_before_it_gets_weights(registry, can_sleep):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, _, two):
            await pool.sleep()
            two.slow["/release_memory_occupation"] = asyncio.Event()
            registry.register(two.registered("b"))
            await until(lambda: slept(two) == 2)
            await pool.wake("weights")
            assert await pool.prepare("v0") and names(pool) == ["policy-0"]
            two.slow["/release_memory_occupation"].set()
            await until(lambda: len(pool._members.in_state("pending")) == 1)
            assert pool._members._replicas["policy-1"].asleep == {"kv_cache"} and woken(two) == 1
            await pool.commit("v0")
            await pool.wake("kv_cache")
            assert pool._members._replicas["policy-1"].asleep == set() and woken(two) == 2

    asyncio.run(run())


def test_the_trainer_does_not_take_memory_before_every_server_has_given_its_up_and_none_starts(registry, can_sleep):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, two):
            one.well, one.status = False, 500
            assert await who(pool) == "policy-1"
            assert registry.try_start("policy-2")
            sleeping = asyncio.create_task(pool.sleep())
            await until(lambda: slept(two))
            one.well = True
            await until(lambda: slept(one))
            await asyncio.sleep(0.5)
            assert not sleeping.done(), "policy-2 may take memory at any time"
            registry.register(RegisteredServer("policy", "policy-2", two.url, "", "c"))
            assert await sleeping
            assert all(replica.asleep == {"kv_cache", "weights"} for replica in pool._members._replicas.values())
            assert not registry.try_start("policy-1") and registry.starting_servers("policy") == []
            assert registry.try_start("judge-0"), "it has devices of its own"
            await pool.wake("weights")
            assert not registry.try_start("policy-1"), "the trainer's weights are still there"
            await pool.wake("kv_cache")
            assert registry.try_start("policy-1")

    asyncio.run(run())


def test_a_server_that_does_not_give_up_its_memory_ends_the_run_and_is_named(registry, can_sleep):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, _):
            one.well, one.status = False, 500
            pool._members._config = ServerConfig(start_deadline_s=1)
            await pool.sleep()

    with pytest.raises(ServerError, match=r"^policy-0 did not release memory for the trainer within .* \(1 s\)"):
        asyncio.run(run())


def test_where_the_last_server_dies_in_its_sleep_the_wait_for_it_begins_when_it_may_start(registry, can_sleep):
    async def run():
        async with opened(registry, "policy-0") as (pool, one):
            await pool.sleep()
            registry.withdraw("policy-0")
            await until(lambda: not pool._members._replicas)
            pool._members._no_server_since -= 1000
            await pool.wake("weights")
            assert registry.starts_held("policy")
            preparing = asyncio.create_task(pool.prepare("v0"))
            await until(lambda: not registry.starts_held("policy"))
            registry.register(one.registered("b"))
            assert await preparing and pool._members._replicas["policy-0"].asleep == {"kv_cache"}

    asyncio.run(run())


def test_servers_may_start_that_a_run_before_this_one_kept_from_it(registry):
    registry.hold_starts("policy")

    async def run():
        async with opened(registry, "policy-0"):
            assert not registry.starts_held("policy")

    asyncio.run(run())


@pytest.mark.parametrize(("exported", "reported"), [("1", True), ("0", False), (None, False)])
def test_a_server_whose_nccl_variables_are_not_the_trainer_s_is_reported(registry, monkeypatch, exported, reported):
    monkeypatch.setattr("exprl_megatron.serving.shared_environment.uses_cuda", lambda: True)
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    server = SimpleNamespace(
        name="policy-0", url="http://there:1", log_file="", instance_id="a", key_file=registry.key_file, first_gpu=0
    )
    ensure_key(registry.key_file)
    spec = ServerSpec("policy-0", Path("model"), ServerConfig(), Path("logs"))
    with monkeypatch.context() as there:
        if exported:
            there.setenv("NCCL_CUMEM_ENABLE", exported)
        registered = ServerSupervisor([spec], registry)._registration(spec, server)
    said = []

    async def run():
        pool = ServerPool(registry, ServerConfig(), log=said.append)
        await pool._members._follow_registry({"policy-0": registered})
        await pool._members._follow_registry({"policy-0": registered})
        for replica in pool._members._replicas.values():
            await replica.client.__aexit__()

    asyncio.run(run())
    assert len(said) == reported
    assert not reported or all(part in said[0] for part in ("NCCL_CUMEM_ENABLE=1", "NCCL_CUMEM_ENABLE=0", "policy-0"))


def test_shared_weights_are_held_once_and_until_others_are_pushed(registry):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, two):
            two.well, two.status = False, 500
            for _ in range(2):
                await pool.load_judge_weights(Path("judge"), "judge", 5.0)
            assert one.asked.count("/update_weights_from_disk") == 1
            assert [await who(pool, home) for home in range(2)] == ["policy-0"] * 2
            assert await pool.prepare("v0")

    asyncio.run(run())


def test_a_server_that_has_others_than_the_shared_weights_does_not_judge(registry):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, _, two):
            two.version = JUDGE_VERSION
            shared = SharedJudgeClient(pool, Path("judge"), 0, 5.0)
            assert (await shared.generate([1], temperature=0.0, max_new_tokens=1, seed=0)).text == "policy-1"
            assert [await who(pool, home) for home in range(2)] == ["policy-1"] * 2

    asyncio.run(run())


@pytest.mark.parametrize("status", [500, 503])
def test_what_a_server_fails_at_another_does_and_it_gets_weights_before_it_is_asked_again(registry, status):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, _):
            one.well, one.status = False, status
            assert await who(pool) == "policy-1"
            assert pool.take_metrics() == {"servers/serving": 1.0, "servers/lost": 1.0}
            one.well, one.asked = True, []
            await until(lambda: "/continue_generation" in one.asked[1:])
            assert await who(pool) == "policy-1"
            assert await pool.prepare("v0") and names(pool) == ["policy-0", "policy-1"]
            assert "/get_model_info" not in one.asked, "asked before it had the weights"
            await pool.commit("v0")
            assert await who(pool) == "policy-0"
            assert pool.take_metrics() == {"servers/serving": 2.0, "servers/lost": 0.0}

    asyncio.run(run())


REPLACED = {
    "version": ("weight_version 'v9', not 'v0'", {"version": "v9"}),
    "source": ("model_path 'elsewhere', not 'started-with'", {"model_path": "elsewhere"}),
    "no text": (r"/model_info: .*weight_version", {"version": None}),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_a_server_whose_weights_another_client_replaced_is_named_and_asked_no_more(registry, kind):
    message, changed = REPLACED[kind]

    async def run():
        told = []
        async with opened(registry, "policy-0", "policy-1", log=told.append) as (pool, one, two):
            await pool.check_served()
            assert not told and [await who(pool, home) for home in range(2)] == ["policy-0", "policy-1"]
            vars(one).update(changed)
            counts = [one.asked.count("/model_info"), two.asked.count("/model_info")]
            await pool.check_served()
            assert [one.asked.count("/model_info"), two.asked.count("/model_info")] == [count + 1 for count in counts]
            assert [await who(pool, home) for home in range(2)] == ["policy-1"] * 2
        return told

    (line,) = asyncio.run(run())
    assert line.startswith("policy-0 is unhealthy: ") and re.search(message, line)


def test_where_every_server_s_weights_were_replaced_the_run_stops(registry):
    async def run():
        async with opened(registry, "policy-0") as (pool, one):
            one.version = "v9"
            await pool.check_served()

    with pytest.raises(WeightsReplaced, match=r"policy-0 .*weight_version 'v9', not 'v0'.* No other server is left"):
        asyncio.run(run())


def test_weights_that_we_ordered_from_a_disk_are_ours_and_a_server_that_died_is_not_a_reason_to_stop(registry):
    async def run():
        async with opened(registry, "policy-0") as (pool, one):
            await pool.load_judge_weights(Path("judge"), JUDGE_VERSION, 5.0)
            one.version, one.model_path = JUDGE_VERSION, "judge"
            await pool.check_served()
            assert await who(pool) == "policy-0"
            one.well, one.status = False, 500
            await pool.check_served()
            assert not pool.has_healthy

    asyncio.run(run())


def test_requests_at_a_server_that_is_withdrawn_go_to_another_at_once(registry):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, _):
            one.well = False
            asked = asyncio.create_task(who(pool))
            await until(lambda: one.asked.count("/get_model_info") == 1)
            registry.withdraw("policy-0")
            assert await asked == "policy-1"

    asyncio.run(run())


def test_a_new_instance_and_a_new_server_get_weights_before_any_request(registry):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, two):
            registry.register(one.registered("b"))
            newcomer = RegisteredServer("policy", "policy-7", two.url, "", "c")
            registry.register(newcomer)
            await until(lambda: two.asked.count("/end_weight_update") == 2)
            await until(lambda: one.asked.count("/pause_generation") == 2)
            assert await who(pool) == await who(pool, 1) == "policy-1"
            await until(lambda: len(pool._members.in_state("pending")) == 2)
            assert await pool.prepare("v0") and names(pool) == ["policy-0", "policy-1", "policy-7"]

    asyncio.run(run())


def test_a_server_that_registers_again_while_it_is_reset_ends_no_run(registry):
    async def run():
        async with opened(registry, "policy-0") as (pool, one):
            replica = pool._members._replicas["policy-0"]
            registry.register(one.registered("b"))
            await until(lambda: pool._members._replicas.get("policy-0") not in (None, replica))
            assert not await pool._members._succeeds(replica, lambda client: client.reset(deadline_s=60))
            await until(lambda: pool._members.in_state("pending"))
            assert not pool._members._watcher.done()

    asyncio.run(run())


def test_where_no_server_is_left_requests_wait_until_one_has_the_weights(registry):
    async def run():
        async with opened(registry, "policy-0") as (pool, one):
            one.well, one.status = False, 500
            work = asyncio.run_coroutine_threadsafe(who(pool), asyncio.get_running_loop())
            await until(lambda: "/get_model_info" in one.asked)
            assert await pool.wait_for(work, 0.1) == "nothing"
            one.well = True
            assert await pool.wait_for(work, 120) == "weights"
            assert await pool.prepare("v0")
            await pool.commit("v0")
            assert await pool.wait_for(work, 120) == "done"
            assert work.result() == "policy-0"

    asyncio.run(run())


@pytest.fixture
def impatient(monkeypatch):
    """A pool that tries again almost at once."""
    monkeypatch.setattr("exprl_megatron.serving.pool_members._LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr("exprl_megatron.serving.pool_members._POLL_S", 0.01)


def test_a_server_that_fails_again_and_again_is_to_be_restarted_and_none_at_all_is_an_error(registry, impatient):
    async def run():
        async with opened(registry, "policy-0", start_deadline_s=4) as (pool, one):
            one.well, one.status = False, 500
            with pytest.raises(ServerError, match=r"no policy server for start_deadline_s \(4 s\); .*HTTP 500"):
                await who(pool)
            assert registry.requested_restart("policy-0") == "a"

    asyncio.run(run())


def test_a_server_that_fails_now_and_then_and_answers_in_between_is_not_started_again(registry, impatient):
    async def run():
        async with opened(registry, "policy-0") as (pool, one):
            for _ in range(4):
                one.well, one.status = False, 500
                asked = asyncio.create_task(who(pool))
                await until(lambda: not pool.has_healthy)
                one.well = True
                await until(lambda: pool._members.in_state("pending"))
                assert await pool.prepare("v0")
                await pool.commit("v0")
                assert await asked == "policy-0"
            assert registry.requested_restart("policy-0") is None

    asyncio.run(run())


def test_a_request_that_every_server_fails_at_is_an_error_after_a_while(registry, impatient):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, *_):
            failures = 0

            async def fail(client):
                nonlocal failures
                failures += 1
                raise ServerError(f"poison {failures}")

            async def load_weights():
                while True:
                    if await pool.prepare("v0"):
                        await pool.commit("v0")
                    await asyncio.sleep(0.02)

            bringing = asyncio.create_task(load_weights())
            with pytest.raises(ServerError, match="poison 10"):
                async with asyncio.timeout(120):
                    await pool.ask(0, fail)
            bringing.cancel()

    asyncio.run(run())


def test_while_requests_are_held_none_is_sent(registry):
    async def run():
        async with opened(registry, "policy-0") as (pool, one):
            await pool.pause_generation("retract")
            asked = asyncio.create_task(who(pool))
            await asyncio.sleep(0.2)
            assert "/get_model_info" not in one.asked and one.asked[-1] == "/pause_generation"
            await pool.continue_generation()
            assert await asked == "policy-0"

    asyncio.run(run())


def test_weights_that_did_not_arrive_are_pushed_to_who_is_left_and_a_failure_without_a_culprit_is_raised_once_more(
    registry,
):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, one, _):
            assert await pool.prepare("v1")
            one.well, one.status = False, 500
            await pool.abort(ServerError("policy-0 broke."))
            assert pool.version is None, "nobody knows what the servers hold now"
            assert await pool.prepare("v1") and names(pool) == ["policy-1"]
            await pool.abort(ServerError("nobody knows."))
            with pytest.raises(ServerError, match=r"nobody knows\."):
                await pool.abort(ServerError("nobody knows."))

    asyncio.run(run())


def test_a_server_that_fails_while_weights_are_pushed_is_not_asked_although_the_others_have_them(registry):
    async def run():
        async with opened(registry, "policy-0", "policy-1") as (pool, _, other):
            assert await pool.prepare("v1")
            other.well, other.status = False, 500
            assert await who(pool, 1) == "policy-0", "asked again of the server that is left"
            await pool.commit("v1")
            asked = other.asked.count("/get_model_info")
            assert [await who(pool, home) for home in range(2)] == ["policy-0"] * 2
            assert other.asked.count("/get_model_info") == asked == 1
            other.well = True
            await until(lambda: pool._members.in_state("pending"))
            assert await pool.prepare("v1"), "it needs the weights first"

    asyncio.run(run())


def test_a_registration_that_cannot_be_read_is_reported_once_and_others_are_seen_all_the_same(registry):
    async def run():
        told = []
        async with opened(registry, "policy-0", log=told.append) as (pool, one):
            (registry.directory / "policy-5.json").write_text("{")
            await until(lambda: told)
            registry.register(RegisteredServer("policy", "policy-1", one.url, "", "b"))
            await until(lambda: len(pool._members._replicas) == 2)
            return told

    told = asyncio.run(run())
    assert [line for line in told if "policy-5.json is skipped" in line] == told[:1]


def test_a_watch_that_died_is_heard_of_at_the_next_request_though_servers_serve(registry, monkeypatch):
    async def run():
        async with opened(registry, "policy-0") as (pool, _):
            monkeypatch.setattr(registry, "all", lambda: 1 / 0)
            await until(pool._members._watcher.done)
            await who(pool)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())
