"""Models of ten families served side by side: log-probs, stretched positions, checksums, weight updates, failures."""

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers.forking import starter
from helpers.processes import wait_until
from helpers.tiny_models import QWEN3_5, write_tiny_model, write_tiny_vision_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from exprl_megatron.config.serving import SCORED_BELOW_ROOM, ServerConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.routing import Routing
from exprl_megatron.serving.checksums import checksums, differing
from exprl_megatron.serving.flat_log_probs import FLAT_REQUESTED
from exprl_megatron.serving.server_process import start_servers, stop_servers
from exprl_megatron.serving.server_spec import ServerSpec

pytestmark = pytest.mark.slow

YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 2.0,
    "mscale_all_dim": 0.5,
}
"""Prompts and responses end far past the original length."""
MODELS = {
    "llama": {"vocab_size": 131, "tied": False},
    "qwen2": {"vocab_size": 131, "tied": True, "rope": YARN},
    "qwen3": {"vocab_size": 128, "tied": False},
    "qwen3-moe": {"vocab_size": 128, "tied": False, "rope": {"rope_type": "linear", "factor": 4.0}},
    "seed-oss": {"vocab_size": 131, "tied": False},
    "mistral": {"vocab_size": 128, "tied": False},
    # With a layer of multi-token prediction, which servers leave out.
    "glm4-moe": {"vocab_size": 131, "tied": False, "mtp": True},
    # Windows and an original length that prompts are far past.
    "olmo3": {"vocab_size": 131, "tied": False},
    "qwen3.5": {"vocab_size": 131, "tied": False},
    "qwen3.5-moe": {"vocab_size": 131, "tied": False},
}
EXPERTS = 4
PROMPT = list(range(3, 100))


@pytest.fixture(scope="module")
def served_form(tmp_path_factory):
    """`served_form(name, directory)`: the model as servers get it, for Qwen3.5 as it is published.

    What is compared with it is its language model alone.
    """
    written: dict[Path, Path] = {}

    def get(name: str, directory: Path) -> Path:
        if name not in QWEN3_5:
            return directory
        if directory not in written:
            written[directory] = write_tiny_vision_model(tmp_path_factory.mktemp("vision"), directory)
        return written[directory]

    return get


@pytest.fixture(scope="module")
def servers(tiny_model, served_form, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    models = {name: served_form(name, tiny_model(name, **settings)) for name, settings in MODELS.items()}
    specs = [ServerSpec(f"{name}-0", model, _config(name), logs) for name, model in models.items()]
    started = start_servers(specs, starter())
    yield dict(zip(MODELS, started, strict=True))
    stop_servers(started)


def _config(name):
    extra_args: tuple[str, ...] = ()
    if name.endswith("-moe"):
        extra_args += ("--enable-return-routed-experts",)
    if name in QWEN3_5:
        # Prompts are computed in pieces, each of which begins with the states that the one before it left.
        extra_args += ("--chunked-prefill-size", "64")
    return ServerConfig(request_deadline_s=60, extra_args=extra_args)


def on(server, ask):
    """The result of `await ask(client)` with a client of `server`."""

    async def run():
        async with server.client() as client:
            return await ask(client)

    return asyncio.run(run())


def server_group(server):
    """The process group of the server proper, the one child of its supervisor."""
    (child,) = psutil.Process(server.pid).children()
    return child.pid


async def long_request(client, seed):
    """The task of a request for 900 tokens, some of which are sampled: another that was sent with it has ended."""
    settings = {"temperature": 1.0, "regex": "[a-z ]{2000}"}
    # The server compiles the expression's grammar before it takes the first request with it.
    await client.generate(PROMPT[:3], max_new_tokens=1, seed=seed, **settings)
    running = asyncio.create_task(client.generate(PROMPT[:3], max_new_tokens=900, seed=seed, **settings))
    await client.generate(PROMPT, temperature=1.0, max_new_tokens=60, seed=seed)
    return running


def sampled(server, count=4, temperature=0.7):
    async def ask(client):
        return await asyncio.gather(
            *(
                client.generate(PROMPT[: 40 + 19 * i], temperature=temperature, max_new_tokens=40, seed=100 + i)
                for i in range(count)
            )
        )

    return on(server, ask)


def chosen_by_transformers(directory, prompt, generation) -> list:
    """[tokens - 1][layers with experts][top_k]: the sorted experts of prompt and response."""
    model, chosen = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda gate, inputs, output: chosen.append(output[2]))
    with torch.no_grad():
        model(torch.tensor([[*prompt, *generation.token_ids]]))
    return torch.stack(chosen, dim=1)[:-1].sort().values.tolist()


def returned(generation, dense_layers=0) -> list:
    return torch.tensor(generation.routed_experts[:, dense_layers:]).sort().values.tolist()


ROUTING = Routing(layers=2, top_k=2, experts=EXPERTS)
MIXTURES = {"qwen3-moe": 0, "glm4-moe": 1, "qwen3.5-moe": 0}
"""And their dense layers."""


@pytest.mark.parametrize(
    ("name", "dense_layers", "cached"), [("qwen3-moe", 0, 96), ("glm4-moe", 1, 96), ("qwen3.5-moe", 0, 64)]
)
def test_the_experts_returned_are_those_that_transformers_chooses(servers, tiny_model, name, dense_layers, cached):
    """For one request, for several by one, and where the cache had the prompt from a request that wanted none.

    `cached`: so much of it; of gated delta nets up to the end of a piece, where their states were kept.
    """
    routing = replace(ROUTING, dense_layers=dense_layers)

    async def ask(client):
        await client.prefill(PROMPT)
        one = await client.generate(PROMPT, temperature=1.0, max_new_tokens=30, seed=1, routing=routing)
        prompts = [PROMPT[5:40], PROMPT[:97]]
        several = await client.generate_all(prompts, [2, 3], temperature=1.0, max_new_tokens=20, routing=routing)
        plain = await client.generate(PROMPT, temperature=1.0, max_new_tokens=5, seed=4)
        return zip([PROMPT, *prompts, PROMPT], [one, *several, plain], strict=True)

    *routed, (_, plain) = on(servers[name], ask)
    assert plain.routed_experts is None and routed[0][1].cached_tokens == cached
    for prompt, generation in routed:
        expected = chosen_by_transformers(tiny_model(name, **MODELS[name]), prompt, generation)
        assert returned(generation, dense_layers) == expected


@pytest.mark.parametrize("name", MIXTURES)
def test_after_an_update_the_experts_of_all_tokens_are_those_of_the_new_weights(
    servers, tiny_model, served_form, tmp_path, name
):
    """Of a prompt that was in the cache, and of a trace that was held: its cache is computed again."""
    dense = MIXTURES[name]
    original = tiny_model(name, **MODELS[name])
    other = write_tiny_model(tmp_path / "other", name, **MODELS[name], seed=5)
    settings = {"temperature": 1.0, "seed": 1, "routing": replace(ROUTING, dense_layers=dense)}

    async def ask(client):
        long = client.generate(PROMPT[:3], max_new_tokens=900, regex="[a-z ]{2000}", **settings)
        running = asyncio.create_task(long)
        await client.generate(PROMPT, max_new_tokens=20, **settings)
        await client.pause("retract")
        await client.update_from_disk(served_form(name, other), "other")
        await client.continue_()
        again = await client.generate(PROMPT, max_new_tokens=20, **settings)
        held = await running
        await client.update_from_disk(served_form(name, original), "initial")
        return again, held

    again, held = on(servers[name], ask)
    assert returned(again, dense) == chosen_by_transformers(other, PROMPT, again)
    assert [version for version, _, _ in held.weight_versions] == ["initial", "other"]
    assert returned(held, dense) == chosen_by_transformers(other, PROMPT[:3], held)


def test_traces_that_were_held_aborted_or_asked_for_again_have_the_experts_of_the_tokens_that_they_kept(
    servers, tiny_model
):
    """Held by `retract` they are prefilled again, as where the cache runs full; an aborted one is asked for again."""
    directory = tiny_model("qwen3-moe", **MODELS["qwen3-moe"])
    settings = {"temperature": 1.0, "regex": "[a-z ]{2000}", "max_new_tokens": 300, "routing": ROUTING}
    prompts = [PROMPT[:3], PROMPT[:50]]

    async def ask(client):
        async def held_by(mode):
            running = [
                asyncio.create_task(client.generate(prompt, seed=k, **settings)) for k, prompt in enumerate(prompts)
            ]
            await client.generate(PROMPT, temperature=1.0, max_new_tokens=20, seed=1)
            await client.pause(mode)
            await client.continue_()
            return await asyncio.gather(*running)

        aborted = await held_by("abort")
        again = [await client.generate(prompt, seed=k, **settings) for k, prompt in enumerate(prompts)]
        return aborted, again, await held_by("retract"), await held_by("in_place")

    aborted, *kept = on(servers["qwen3-moe"], ask)
    assert all(one.finish_reason == "abort" and one.routed_experts is None for one in aborted)
    assert all(0 < len(one.token_ids) < 300 for one in aborted)
    for generations in kept:
        for prompt, generation in zip(prompts, generations, strict=True):
            assert len(generation.token_ids) == 300
            assert returned(generation) == chosen_by_transformers(directory, prompt, generation)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_trace_that_continues_in_place_has_the_experts_of_the_weights_that_computed_each_token(
    servers, tiny_model, served_form, tmp_path, name
):
    """Until the update those of the old weights; then those of the new ones behind the old weights' cache."""
    dense, tokens = MIXTURES[name], 300
    original = tiny_model(name, **MODELS[name])
    other = write_tiny_model(tmp_path / "other", name, **MODELS[name], seed=5)
    prompt = PROMPT[:3]
    settings = {"temperature": 1.0, "seed": 1, "routing": replace(ROUTING, dense_layers=dense)}

    async def ask(client):
        long = client.generate(prompt, max_new_tokens=tokens, regex="[a-z ]{2000}", **settings)
        running = asyncio.create_task(long)
        await client.generate(PROMPT, temperature=1.0, max_new_tokens=20, seed=1)
        await client.pause("in_place")
        await client.update_from_disk(served_form(name, other), "other")
        await client.continue_()
        held = await running
        await client.update_from_disk(served_form(name, original), "initial")
        return held

    held = on(servers[name], ask)
    (_, _, switch), (version, _, _) = held.weight_versions
    assert version == "other" and 0 < switch < tokens
    # The last token under the old weights was read under the new ones, to sample the one behind it.
    read = len(prompt) + switch - 1
    ids, chosen, cache = torch.tensor([[*prompt, *held.token_ids]]), [], None
    # transformers continues from the states of gated delta nets one token at a time.
    steps = [ids[:, :read]], ids[:, read:].split(1, dim=1)
    for directory, parts in zip((original, other), steps, strict=True):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        layers = [[] for _ in range(ROUTING.layers - dense)]
        for layer, found in zip(model.model.layers[dense:], layers, strict=True):
            layer.mlp.gate.register_forward_hook(lambda gate, inputs, output, found=found: found.append(output[2]))
        with torch.no_grad():
            for part in parts:
                cache = model(part, past_key_values=cache, use_cache=True).past_key_values
        chosen.append(torch.stack([torch.cat(found) for found in layers], dim=1))
    assert returned(held, dense) == torch.cat(chosen)[:-1].sort().values.tolist()


def test_a_server_that_was_not_started_to_return_experts_is_asked_for_them_without_success(servers):
    ask = lambda client: client.generate(PROMPT, temperature=1.0, max_new_tokens=3, seed=1, routing=ROUTING)  # noqa: E731
    with pytest.raises(ServerError, match="routed_experts is missing; a server returns it with --enable-return-routed"):
        on(servers["qwen3"], ask)


def largest_gap(directory, generations, temperature=0.7):
    """Largest |server - transformers| log-prob over all sampled tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    worst = 0.0
    for i, generation in enumerate(generations):
        prompt = PROMPT[: 40 + 19 * i]
        ids = torch.tensor([[*prompt, *generation.token_ids]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1] / temperature, dim=-1)
        expected = log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(generation.log_probs.tolist())).abs().max().item())
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_transformers(servers, tiny_model, name):
    generations = sampled(servers[name])
    assert largest_gap(tiny_model(name, **MODELS[name]), generations) < 1e-4
    assert len({g.token_ids.tobytes() for g in generations}) == len(generations)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_log_probs_of_transformers_at_temperature_1(servers, tiny_model, name):
    async def ask(client):
        return await asyncio.gather(*(client.score(PROMPT, first) for first in (1, 40, len(PROMPT))))

    model = AutoModelForCausalLM.from_pretrained(tiny_model(name, **MODELS[name]), dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    whole, part, nothing = on(servers[name], ask)
    assert (torch.tensor(whole.log_probs.tolist()) - log_probs).abs().max() < 1e-4
    assert part.log_probs == pytest.approx(whole.log_probs[39:], abs=1e-5)
    assert nothing.log_probs.tolist() == []
    assert whole.weight_version == "initial"


def test_the_longest_sequence_that_is_scored(servers):
    longest = 1024 - SCORED_BELOW_ROOM

    async def ask(client):
        return await client.score([5] * longest, 1)

    assert len(on(servers["qwen3"], ask).log_probs) == longest - 1
    with pytest.raises(ServerError, match=rf"refused with HTTP 400: Input length \({longest + 1} tokens\) exceeds"):
        on(servers["qwen3"], lambda client: client.score([5] * (longest + 1), 1))


def log_probs_of(directory, ids):
    """[tokens - 1]: of each token but the first one, as transformers has them at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(ids)[1:, None])[:, 0]


def test_the_states_of_a_gated_delta_net_are_of_one_request_alone(servers, tiny_model):
    """Of requests that join others in their middle, that are aborted, that come after these, and after a flush."""
    directory, settings = tiny_model("qwen3.5", **MODELS["qwen3.5"]), {"temperature": 1.0, "max_new_tokens": 30}
    prompts = [PROMPT[i : i + n] for i, n in enumerate((1, 2, 3, 5, 63, 64, 65, 90, 90, 90, 40, 7))]

    async def ask(client):
        long = client.generate(PROMPT[:3], temperature=1.0, max_new_tokens=900, seed=3, regex="[a-z ]{2000}")
        aborted = asyncio.create_task(long)
        first = await asyncio.gather(*(client.generate(p, seed=i, **settings) for i, p in enumerate(prompts)))
        await client.pause("abort")
        await client.continue_()
        await asyncio.gather(aborted, return_exceptions=True)
        again = await asyncio.gather(*(client.generate(p, seed=i, **settings) for i, p in enumerate(prompts)))
        await client.flush_cache()
        alone = [await client.generate(p, seed=i, **settings) for i, p in enumerate(prompts)]
        # The conversation continues: the states at the end of the response before are in the cache.
        follow = [*prompts[7], *alone[7].token_ids.tolist(), *PROMPT[:20]]
        return [*first, *again, *alone], follow, await client.generate(follow, seed=1, **settings)

    generations, follow, continued = on(servers["qwen3.5"], ask)
    for prompt, generation in zip([*prompts * 3, follow], [*generations, continued], strict=True):
        expected = log_probs_of(directory, [*prompt, *generation.token_ids])[len(prompt) - 1 :]
        assert (torch.tensor(generation.log_probs.tolist()) - expected).abs().max() < 1e-4
    assert continued.cached_tokens > len(prompts[7])
    assert all(generation.cached_tokens == 0 for generation in generations[-len(prompts) :])


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_what_an_update_makes_of_the_states_of_a_held_trace(servers, tiny_model, tmp_path, mode):
    """`retract` computes them again with the new weights; with `in_place` the trace continues from the old ones."""
    directory = tiny_model("qwen3.5", **MODELS["qwen3.5"])
    other = write_tiny_model(tmp_path / "other", "qwen3.5", **MODELS["qwen3.5"], seed=5)
    prompt = PROMPT[:70]

    async def ask(client):
        settings = {"temperature": 1.0, "max_new_tokens": 400}
        running = [asyncio.create_task(client.generate(prompt, seed=seed, **settings)) for seed in range(8)]
        await client.generate(prompt, temperature=1.0, max_new_tokens=8, seed=1)
        await client.pause(mode)
        await client.update_from_disk(other, "other")
        await client.continue_()
        traces = await asyncio.gather(*running)
        await client.update_from_disk(directory, "initial")
        return [trace for trace in traces if len(trace.weight_versions) == 2]

    old, new = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (directory, other))
    held = on(servers["qwen3.5"], ask)
    assert held
    for trace in held:
        ids = [*prompt, *trace.token_ids.tolist()]
        (_, _, count), _ = trace.weight_versions
        # The last token before the update is the first one that the new weights read.
        read = len(prompt) + count - 1
        with torch.no_grad():
            before = old(torch.tensor([ids[:read]]), use_cache=True)
            cache = before.past_key_values if mode == "in_place" else None
            after = new(torch.tensor([ids[read if cache else 0 : -1]]), past_key_values=cache)
        logits = torch.cat((before.logits[0, len(prompt) - 1 :], after.logits[0, -(len(ids) - 1 - read) :]))
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[len(prompt) :, None])[:, 0]
        assert (torch.tensor(trace.log_probs.tolist()) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_checksums_are_computed_from_hugging_face_tensors(servers, tiny_model, name):
    weights = load_file(tiny_model(name, **MODELS[name]) / "model.safetensors")
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("model.layers.2.")}
    (held,) = on(servers[name], lambda client: client.checksums())
    delta_net = read_architecture(tiny_model(name, **MODELS[name])).delta_net
    settings = {"tied": MODELS[name]["tied"], "experts": EXPERTS, "delta_net": delta_net}
    assert differing(held, checksums(weights.items(), **settings)) == []
    weights["model.layers.1.self_attn.v_proj.weight"][-1, -1] += 1e-3
    attention = "model.layers.1" if name in QWEN3_5 else "model.layers.1.self_attn"
    assert differing(held, checksums(weights.items(), **settings)) == [f"{attention}.qkv_proj.weight"]


def test_the_seed_decides_the_tokens(servers):
    async def ask(client):
        draws = [client.generate(PROMPT, temperature=1.0, max_new_tokens=20, seed=seed) for seed in (7, 7, 8)]
        return [(await draw).token_ids.tolist() for draw in draws]

    first, again, other = on(servers["qwen3"], ask)
    assert first == again != other


def test_log_probs_as_arrays_are_those_of_the_list_that_sglang_sends_without_our_plugin(servers):
    """One reply, a group's, one with watched ids, and one that is aborted; other requests are not affected."""
    sampling = {"temperature": 1.0, "max_new_tokens": 60}

    async def ask(client):
        replies = []
        exchange = client._exchange

        async def noted(*arguments):
            replies.append(await exchange(*arguments))
            return replies[-1]

        client._exchange = noted
        found = [await client.generate(PROMPT, seed=1, **sampling)]
        found += await client.generate_all([PROMPT, PROMPT], [2, 3], **sampling)
        found.append(await client.generate(PROMPT, seed=4, watched_ids=[5, 6], **sampling))
        running = await long_request(client, 5)
        await client.pause("abort")
        await client.continue_()
        found.append(await running)
        assert all(b"flat_b64" in reply for reply in replies if b"output_ids" in reply)
        params = [sampling | {"sampling_seed": seed} for seed in (1, 2, 3, 4)]
        request = {"input_ids": [PROMPT] * 4, "sampling_params": params, "return_logprob": True}
        own = json.loads(await exchange("POST", "/generate", request, None, 2**20))
        top = request | FLAT_REQUESTED | {"top_logprobs_num": 2}
        return found, own, json.loads(await exchange("POST", "/generate", top, None, 2**20))

    (*found, aborted), own, top = on(servers["qwen3"], ask)
    assert aborted.finish_reason == "abort" and 0 < len(aborted.log_probs) == len(aborted.token_ids) < 900
    for generation, listed, with_top in zip(found, own, top, strict=True):
        log_probs, ids, _ = zip(*listed["meta_info"]["output_token_logprobs"], strict=True)
        assert generation.token_ids.tolist() == list(ids) == listed["output_ids"]
        # Prompts that are computed together and alone may differ in their last bits.
        assert generation.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert with_top["meta_info"]["output_top_logprobs_shape"] == [len(ids), 2]
        assert len(with_top["meta_info"]["output_token_logprobs"]) == len(ids) == len(with_top["output_ids"])
    assert len(found[3].watched_log_probs) == len(found[3].token_ids)


def test_a_thousand_requests_at_once(servers):
    async def ask(client):
        return await asyncio.gather(
            *(client.generate(PROMPT[:20], temperature=1.0, max_new_tokens=4, seed=i) for i in range(1000))
        )

    generations = on(servers["qwen3"], ask)
    assert len(generations) == 1000
    assert all(g.prompt_tokens == 20 and 1 <= len(g.token_ids) <= 4 for g in generations)


def test_a_regex_binds_the_text(servers):
    async def ask(client):
        return await client.generate(PROMPT, temperature=1.0, max_new_tokens=30, seed=1, regex="Score: [1-5]")

    generated = on(servers["qwen3"], ask)
    assert generated.text in {f"Score: {i}" for i in range(1, 6)}
    assert generated.finish_reason == "stop"


def test_a_shared_prefix_is_computed_once(servers):
    async def ask(client):
        await client.flush_cache()
        return [await client.generate(PROMPT, temperature=1.0, max_new_tokens=2, seed=s) for s in (1, 2)]

    first, second = on(servers["qwen3"], ask)
    assert (first.cached_tokens, second.cached_tokens) == (0, len(PROMPT) - 1)


def test_an_update_from_disk_changes_weights_and_version(servers, tiny_model, tmp_path):
    original = tiny_model("qwen3", **MODELS["qwen3"])
    other = write_tiny_model(tmp_path / "other", "qwen3", vocab_size=128, seed=5)
    on(servers["qwen3"], lambda client: client.update_from_disk(other, "v1"))
    generations = sampled(servers["qwen3"])
    assert largest_gap(other, generations) < 1e-4
    assert all(g.weight_versions == (("v1", 0, len(g.token_ids)),) for g in generations)
    on(servers["qwen3"], lambda client: client.update_from_disk(original, "initial"))
    assert on(servers["qwen3"], lambda client: client.info())["weight_version"] == "initial"


def test_a_trace_held_during_an_update_names_both_weight_versions(servers, tiny_model):
    directory = tiny_model("qwen3", **MODELS["qwen3"])

    async def ask(client):
        running = await long_request(client, 3)
        await client.pause("retract")
        await client.update_from_disk(directory, "later")
        await client.continue_()
        generation = await running
        await client.update_from_disk(directory, "initial")
        return generation

    generation = on(servers["qwen3"], ask)
    first, second = generation.weight_versions
    assert first == ("initial", 0, first[2])
    assert second == ("later", first[2], len(generation.token_ids))
    assert len(generation.token_ids) == 900 and generation.finish_reason == "length"


def test_a_refusal_carries_sglang_s_words(servers):
    with pytest.raises(ServerError, match=r"qwen3-0 .*/generate: refused with HTTP 400: .*longer than"):
        on(servers["qwen3"], lambda client: client.generate([5] * 2000, temperature=1.0, max_new_tokens=4, seed=1))
    with pytest.raises(ServerError, match=r"/end_weight_update: refused .*begin_weight_update"):
        on(servers["qwen3"], lambda client: client.end_weight_update())


def test_a_server_that_hangs_is_an_error_within_the_deadline(servers):
    server = servers["llama"]
    group = server_group(server)
    os.killpg(group, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        with pytest.raises(ServerError, match=r"llama-0 .*/generate: no answer within 2 s[^$]*llama-0.log; its last"):
            on(
                server,
                lambda client: client.generate(PROMPT, temperature=1.0, max_new_tokens=4, seed=1, deadline_s=2),
            )
        assert time.monotonic() - begun < 30
    finally:
        os.killpg(group, signal.SIGCONT)


def test_a_server_that_dies_is_an_error_at_once_and_leaves_nothing_in_shared_memory(servers):
    server = servers["llama"]
    processes = psutil.Process(server.pid).children(recursive=True)
    shared = {Path(m.path) for process in processes for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
    assert shared

    async def ask(client):
        running = await long_request(client, 3)
        os.killpg(server_group(server), signal.SIGKILL)
        await running

    with pytest.raises(ServerError, match=r"llama-0 .*died or is not reachable"):
        on(server, ask)
    with pytest.raises(ServerError, match=r"llama-0 .*died or is not reachable"):
        on(server, lambda client: client.health())
    wait_until(lambda: not any(path.exists() for path in shared), 120)
