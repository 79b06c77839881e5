"""What the client sends, in SGLang's words: paths and fields of its HTTP API, without a server."""

import asyncio
import json

import msgspec
import numpy as np
import pytest

from exprl_megatron.errors import RequestRefused, ServerError, WeightsReplaced
from exprl_megatron.serving.client import SGLangClient

SAMPLED = {
    "text": "a",
    "output_ids": [7],
    "meta_info": {
        "finish_reason": {"type": "stop"},
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "output_token_logprobs": [[-0.5, 7, None]],
        "weight_versions": [{"version": "v1", "start": 0, "end": 1}],
    },
}


class Recorder(SGLangClient):
    """A client whose requests are kept and answered here: by path, or with success."""

    def __init__(self, **answers):
        super().__init__("http://nowhere", "policy-0")
        self.answers = {f"/{path}": answer for path, answer in answers.items()}
        self.sent = []

    async def _exchange(self, method, path, body, deadline_s, limit=0):
        self.sent.append((method, path, None if body is None else json.loads(msgspec.json.encode(body))))
        answer = self.answers.get(path, {"success": True})
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer).encode()


def sent(call, **answers):
    """The requests of `call(client)`."""
    client = Recorder(**answers)
    asyncio.run(call(client))
    return client.sent


SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 12, "stop_token_ids": [3]}


def test_every_sampling_setting_reaches_the_server_and_the_seed_is_the_samples_own():
    (request,) = sent(lambda c: c.generate(np.array([1, 2, 4], np.int32), seed=11, **SAMPLING), generate=SAMPLED)
    assert request == (
        "POST",
        "/generate",
        {
            "input_ids": [1, 2, 4],
            "sampling_params": SAMPLING | {"sampling_seed": 11},
            "return_logprob": True,
            "return_flat_raw_output_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        },
    )


def test_watched_ids_and_constraints_are_sent_and_log_probs_only_where_wanted():
    async def call(client):
        with pytest.raises(ServerError):
            await client.generate([1], seed=0, temperature=0.0, max_new_tokens=1, watched_ids=[5, 6], log_probs=False)
        await client.generate([1], seed=0, temperature=0.0, max_new_tokens=1, regex="a+", log_probs=False)
        await client.generate([1], seed=0, temperature=0.0, max_new_tokens=1, json_schema="{}", log_probs=False)

    watched, by_regex, by_schema = (body for *_, body in sent(call, generate=SAMPLED))
    assert (watched["return_logprob"], watched["token_ids_logprob"]) == (True, [5, 6])
    assert (by_regex["return_logprob"], by_regex["sampling_params"]["regex"]) == (False, "a+")
    assert watched["return_flat_raw_top_logprobs_b64"] and not any("flat" in name for name in by_regex)
    assert by_schema["sampling_params"]["json_schema"] == "{}" and "regex" not in by_schema["sampling_params"]


def test_several_prompts_have_each_their_own_seed_and_the_same_settings():
    async def call(client):
        found = await client.generate_all([[1, 2], [1, 2]], [11, 12], **SAMPLING)
        assert len(found) == 2

    ((_, path, body),) = sent(call, generate=[SAMPLED, SAMPLED])
    assert (path, body["input_ids"], body["return_logprob"]) == ("/generate", [[1, 2], [1, 2]], True)
    assert body["sampling_params"] == [SAMPLING | {"sampling_seed": seed} for seed in (11, 12)]


def test_to_read_a_prompt_nothing_is_sampled():
    (request,) = sent(lambda c: c.prefill([1, 2]), generate=SAMPLED)
    assert request == ("POST", "/generate", {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 0}})


def test_the_log_probs_of_a_response_are_those_of_its_tokens_and_start_one_place_before_it():
    """SGLang gives the log-prob of each token from `logprob_start_len` on, and none of that first one."""
    logged = [[None, 4, None], [-0.25, 5, None], [-0.75, 6, None]]
    meta = SAMPLED["meta_info"] | {"input_token_logprobs": logged, "output_token_logprobs": [], "weight_version": "v1"}

    async def call(client):
        scores = await client.score(np.array([1, 2, 4, 5, 6], np.int32), 3)
        assert scores.log_probs.tolist() == [-0.25, -0.75] and scores.weight_version == "v1"

    ((_, _, body),) = sent(call, generate={"text": "", "output_ids": [], "meta_info": meta})
    assert body == {
        "input_ids": [1, 2, 4, 5, 6],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 2,
    }


def test_a_bucket_of_a_broadcast_is_named_in_the_order_in_which_it_is_sent():
    async def call(client):
        bucket = (["b", "a"], ["bfloat16", "float32"], [(2, 3), (4,)])
        await client.update_from_distributed(*bucket, group="g", version=None, flush_cache=False, flattened=True)
        await client.update_from_distributed(*bucket, group="g", version="v3", flush_cache=True)

    (_, path, first), (_, _, last) = sent(call)
    shared = {"names": ["b", "a"], "dtypes": ["bfloat16", "float32"], "shapes": [[2, 3], [4]], "group_name": "g"}
    assert path == "/update_weights_from_distributed"
    assert first == shared | {"flush_cache": False, "load_format": "flattened_bucket"}
    assert last == shared | {"flush_cache": True, "weight_version": "v3"}


def test_requests_that_are_held_in_place_keep_their_cache_until_they_continue():
    async def update(client):
        await client.update_from_distributed([], [], [], group="g", version="v3", flush_cache=True)
        await client.update_from_tensor([], version="v3", flush_cache=True)
        await client.update_from_disk("d", "v3")

    async def call(client):
        await client.pause("in_place")
        await update(client)
        await client.continue_()
        await update(client)
        await client.pause("retract")
        await update(client)

    flushed = [body["flush_cache"] for _, path, body in sent(call) if path.startswith("/update")]
    assert flushed == [False] * 3 + [True] * 6


def test_weights_from_a_disk_are_plain_files_under_a_version_which_all_ranks_have_read_at_the_end():
    async def call(client):
        await client.update_from_disk("models/a", "v3")
        assert client.source == "models/a"

    assert sent(call) == [
        (
            "POST",
            "/update_weights_from_disk",
            {"model_path": "models/a", "load_format": "auto", "weight_version": "v3", "flush_cache": True},
        ),
        # SGLang gathers the answer to this from all ranks, without the checksum of any tensor.
        ("POST", "/weights_checker", {"action": "checksum", "skip_tensor_list": [""]}),
    ]


def test_orders_to_a_loader_are_signed_for_this_start_of_the_server_and_no_two_are_alike():
    async def call(client):
        client.headers = {"Authorization": "Bearer secret"}
        for _ in range(2):
            await client.update_from_tensor([{"order": "begin"}], version="v3", flush_cache=False, loader="loader")

    requests = sent(call, server_info={"random_seed": 5, "custom_weight_loader": ["loader"]})
    assert [path for _, path, _ in requests] == ["/server_info", *["/update_weights_from_tensor"] * 2]
    first, second = (body for *_, body in requests[1:])
    assert (first["load_format"], first["weight_version"], first["flush_cache"]) == ("loader", "v3", False)
    assert first["serialized_named_tensors"] != second["serialized_named_tensors"]


def test_a_client_that_takes_a_server_over_ends_what_another_left_there_and_knows_where_its_weights_are_from():
    async def call(client):
        await client.reset(deadline_s=1)
        assert client.source == "m"

    refusal = RequestRefused("refused", "no weight-update session is open")
    requests = sent(call, end_weight_update=refusal, model_info={"weight_version": "v1", "model_path": "m"})
    assert [(path, body) for _, path, body in requests] == [
        ("/continue_generation", {}),
        ("/end_weight_update", {}),
        ("/pause_generation", {"mode": "abort"}),
        ("/continue_generation", {}),
        ("/model_info", None),
    ]


def test_another_refusal_while_taking_over_is_an_error():
    with pytest.raises(RequestRefused):
        sent(lambda c: c.reset(deadline_s=1), end_weight_update=RequestRefused("refused", "busy"))


@pytest.mark.parametrize(
    ("version", "path", "wrong"), [("v2", "ours", "weight_version 'v1'"), ("v1", "theirs", "model_path 'ours'")]
)
def test_other_weights_than_ours_are_named(version, path, wrong):
    async def call(client):
        client.source = path
        await client.check_served(version)

    with pytest.raises(WeightsReplaced, match=f"serves weights of {wrong}, not '"):
        sent(call, model_info={"weight_version": "v1", "model_path": "ours"})


def test_memory_is_released_and_resumed_by_tags():
    async def call(client):
        await client.sleep(["kv_cache"])
        await client.wake(["weights"])

    assert sent(call) == [
        ("POST", "/release_memory_occupation", {"tags": ["kv_cache"]}),
        ("POST", "/resume_memory_occupation", {"tags": ["weights"]}),
    ]


def test_the_weights_group_is_joined_with_the_trainer_as_rank_0():
    settings = {"master_address": "h", "master_port": 9, "rank_offset": 1, "world_size": 3, "backend": "gloo"}
    (request,) = sent(lambda c: c.init_weights_group(group="g", **settings))
    assert request == ("POST", "/init_weights_update_group", settings | {"group_name": "g"})


@pytest.mark.parametrize("answer", [{"success": False, "message": "no"}, {"message": "no"}, "fine"])
def test_an_order_that_does_not_succeed_is_an_error(answer):
    with pytest.raises(ServerError, match="refused"):
        sent(lambda c: c.begin_weight_update(), begin_weight_update=answer)
