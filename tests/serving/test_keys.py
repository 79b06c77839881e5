"""Nobody without the run's key may use its servers, and the key shows nowhere but in its file."""

import asyncio
import json
import os
import socket
import stat
import threading
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keys import Key, authorization, ensure_key, read_key, renew_key
from exprl_megatron.serving.loader_commands import LOADER, payload, signed
from exprl_megatron.utils.ports import EVERYWHERE, interface

# What somebody on the same machine could do to servers without a key, and what must be closed to them.
ROUTES = {
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/v1/chat/completions": {"model": "default", "messages": [{"role": "user", "content": "a"}]},
    "/configure_logging": {"log_requests": True, "log_requests_level": 3, "dump_requests_folder": "/tmp/exprl-dump"},
    "/update_weights_from_disk": {"model_path": "/nowhere", "weight_version": "v9"},
    "/begin_weight_update": {},
    "/update_weights_from_tensor": {"serialized_named_tensors": ["AA=="]},
    "/update_weight_version": {"new_version": "v9"},
    "/init_weights_update_group": {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2},
    "/pause_generation": {"mode": "abort"},
    "/continue_generation": {},
    "/abort_request": {"abort_all": True},
    "/flush_cache": {},
    "/release_memory_occupation": {},
    "/start_profile": {"output_dir": "/tmp/exprl-profile"},
    "/set_internal_state": {"server_args": {}},
    "/weights_checker": {"action": "checksum"},
    "/get_weights_by_name": {"name": "model.norm.weight"},
    "/server_info": None,
    "/get_model_info": None,
    "/v1/models": None,
    "/v1/loads": None,
}


def test_a_key_is_its_owners_alone_and_another_each_time(tmp_path):
    path = tmp_path / "servers" / "key"
    ensure_key(path)
    first = read_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(first) >= 40
    ensure_key(path)
    assert read_key(path) == first
    renew_key(path)
    assert read_key(path) != first
    assert [file.name for file in path.parent.iterdir()] == ["key"]


def test_of_many_that_make_the_key_at_once_all_read_the_same(tmp_path):
    path, found = tmp_path / "key", []

    def make() -> None:
        ensure_key(path)
        found.append(read_key(path))

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(found)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_a_key_does_not_show_where_arguments_are_printed():
    key = Key("secret")
    assert "secret" not in f"{ {'api_key': key} } {[key]!r}"
    assert f"Bearer {key}" == "Bearer secret" and key == "secret"


def test_a_key_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(ServerError, match=r"key of the run's servers cannot be read from .*/key \("):
        authorization(tmp_path / "key")
    assert authorization(None) == authorization("") == {}


def test_servers_listen_at_the_interface_by_which_others_know_the_machine(monkeypatch):
    names = {"node": "10.1.2.3", "debian": "127.0.1.1"}
    monkeypatch.setattr("socket.gethostbyname", lambda name: names.get(name) or (_ for _ in ()).throw(OSError()))
    assert [interface(name) for name in ("node", "debian", "unknown")] == ["10.1.2.3", EVERYWHERE, EVERYWHERE]


def test_where_loopback_is_asked_for_nothing_listens_elsewhere():
    assert [interface(name) for name in ("127.0.0.1", "localhost", "127.0.0.2")] == ["127.0.0.1"] * 2 + ["127.0.0.2"]


def status(url: str, body: dict | None, **headers: str) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json", **headers})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_a_server_refuses_everything_to_clients_without_the_key(qwen3_server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        answers = {route: status(qwen3_server.url + route, body, **headers) for route, body in ROUTES.items()}
        assert set(answers.values()) == {401}, answers
    assert status(qwen3_server.url + "/health", None) == 200

    async def with_key() -> tuple[int, ...]:
        async with qwen3_server.client() as client:
            return (await client.generate([5, 6], temperature=1.0, max_new_tokens=2, seed=0)).token_ids

    assert len(asyncio.run(with_key())) == 2

    async def without_key() -> None:
        async with SGLangClient(qwen3_server.url, "policy-0") as client:
            await client.generate([5, 6], temperature=1.0, max_new_tokens=2, seed=0)

    with pytest.raises(ServerError, match="refused with HTTP 401"):
        asyncio.run(without_key())


@pytest.mark.slow
def test_the_key_of_a_server_is_in_no_process_list_no_environment_and_no_log(qwen3_server):
    key = read_key(qwen3_server.key_file)
    supervisor = psutil.Process(qwen3_server.pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    assert len(processes) >= 3
    for process in processes:
        assert key not in " ".join(process.cmdline())
        assert key not in str(process.environ())
    log = qwen3_server.log_file.read_text(errors="replace")
    assert "api_key" in log and key not in log
    assert os.stat(qwen3_server.key_file).st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_server_for_this_machine_listens_on_loopback_alone(qwen3_server):
    """Also where its own ranks meet, and where its groups with the trainer are connected."""
    supervisor = psutil.Process(qwen3_server.pid)
    connections = [c for p in supervisor.children(recursive=True) for c in p.net_connections("inet")]
    listening = {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", int(qwen3_server.url.rpartition(":")[2])) in listening and len(listening) >= 3
    assert {ip for ip, _ in listening} == {"127.0.0.1"}


@pytest.mark.slow
def test_the_loader_of_a_server_connects_to_nobody_who_has_only_the_key_of_its_requests(qwen3_server):
    """An order needs its own code: here it has none, or one of another key."""
    key = read_key(qwen3_server.key_file)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        order = {"do": "join", "address": "127.0.0.1", "port": listener.getsockname()[1], "rank": 1}
        order |= {"group": "g", "answer": "a", "deadline_s": 1.0, "secret": "s"}
        for text in (json.dumps(order), signed(order, "guessed", 0, 1), signed(order, key, 0, 1)):
            body = {"serialized_named_tensors": [payload(text)], "load_format": LOADER, "flush_cache": False}
            headers = {"Authorization": f"Bearer {key}"}
            url = qwen3_server.url
            assert status(f"{url}/begin_weight_update", {}, **headers) == 200
            assert status(f"{url}/update_weights_from_tensor", body, **headers) == 200
            assert status(f"{url}/end_weight_update", {}, **headers) == 200
        listener.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            listener.accept()
    log = qwen3_server.log_file.read_text(errors="replace")
    assert log.count("a command to the weight loader is refused: it has no authentication code") >= 2
    assert "a command to the weight loader is refused: it is for another start of this server" in log
    assert status(f"{qwen3_server.url}/health", None) == 200


@pytest.mark.slow
def test_no_file_was_made_by_requests_without_the_key(qwen3_server):
    assert not any(Path(name).exists() for name in ("/tmp/exprl-dump", "/tmp/exprl-profile"))
