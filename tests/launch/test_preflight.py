"""What a run refuses before it starts a process; the sentences themselves are shown in tests/test_cli.py."""

import json
import re
import socket

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.errors import UserError
from exprl_megatron.launch.launcher import required_servers
from exprl_megatron.launch.model_checks import model_violations
from exprl_megatron.launch.preflight import check_inputs, dry_run, required_problem_sets
from exprl_megatron.launch.prompt_checks import check_prompts
from exprl_megatron.runs.directory import RunDirectory


@pytest.fixture
def converted(tiny_model, tmp_path):
    """A model whose weights are in Megatron's form."""
    convert_to_megatron(tiny_model("qwen3"), tmp_path / "converted")
    return tmp_path / "converted"


def run(tmp_path, model, kind="sft", **policy):
    """One step of `kind` that starts from `model`."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"id": "a", "problem": "1 + 1?", "reference": "It is 2.", "answer": "2"}) + "\n")
    stage = {"kind": kind, "name": "a", "steps": 1, "problems": {"source": str(problems)}}
    if kind != "sft":
        stage |= {"sampling": {"max_new_tokens": 16}, "loss": {"kl_coefficient": 0.1}}
    policy = {"model": str(model), "max_tokens": 128} | policy
    tree = {"directory": str(tmp_path / "run"), "policy": policy, "server": {"max_total_tokens": 512}}
    return check_config(tree | {"stages": [stage]}, "test")


def test_sft_may_start_from_megatrons_files(tmp_path, converted):
    check_inputs(run(tmp_path, converted))


def test_a_dry_run_refuses_a_directory_that_cannot_be_one(tmp_path, converted):
    config = run(tmp_path, converted)
    assert dry_run(config) is None and not (tmp_path / "run").exists()
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run is a file; choose a path whose parts are directories"):
        dry_run(config)


def test_what_samples_may_not(tmp_path, converted):
    with pytest.raises(UserError, match=r"converted, whose weights .*, which the sampling servers cannot .* to-hf"):
        check_inputs(run(tmp_path, converted, "sparse-rl"))


@pytest.mark.parametrize(
    ("file", "sentence"), [(".metadata", "megatron holds no complete Megatron files"), ("*.distcp", r"\.distcp")]
)
def test_megatrons_files_must_be_whole(tmp_path, converted, file, sentence):
    next((converted / "megatron").glob(file)).unlink()
    with pytest.raises(UserError, match=sentence):
        check_inputs(run(tmp_path, converted))


@pytest.mark.parametrize(
    ("longest", "sentence"),
    [
        (1018, r"is 1018 but the server .* at most 1017 tokens \(7 fewer than the model's positions, 1024\); lower"),
        (506, r"is 506 but the server .* at most 505 tokens \(7 fewer than server\.max_total_tokens, 512\); lower"),
        (505, None),
    ],
)
def test_traces_longer_than_a_server_scores_are_refused_where_it_shall(tmp_path, tiny_model, longest, sentence):
    model = tiny_model("qwen3")
    check_inputs(run(tmp_path, model, "sparse-rl", max_tokens=longest))
    config = run(tmp_path, model, "sparse-rl", max_tokens=longest, ref_policy="server")
    if sentence is None:
        check_inputs(config)
        return
    with pytest.raises(UserError, match=sentence):
        check_inputs(config)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("longest", "rope", "sentence"),
    [
        (1024, YARN, None),
        (1025, None, r"1025, more than the 1024 positions that \S+ was made for; lower it\.$"),
        (4096, YARN, r"for; lower it, or set max_position_embeddings .* to 4096: YaRN stretches"),
        (4097, YARN, r"for; lower it\.$"),
        (1025, YARN | {"factor": 1.0}, r"for; lower it\.$"),
    ],
)
def test_traces_may_be_as_long_as_max_position_embeddings_whatever_stretches_positions(
    tmp_path, tiny_model, longest, rope, sentence
):
    found = model_violations(run(tmp_path, tiny_model("qwen3", rope=rope), max_tokens=longest))
    assert len(found) == (sentence is not None) and all(re.search(sentence, each) for each in found)


@pytest.mark.parametrize(
    ("family", "rope", "refused"), [("qwen3-moe", YARN, True), ("qwen3-moe", None, False), ("qwen3", YARN, False)]
)
def test_sglangs_fused_rotation_is_refused_for_experts_with_stretched_positions(
    tmp_path, tiny_model, family, rope, refused
):
    config = run(tmp_path, tiny_model(family, rope=rope), "sparse-rl")
    server = config.server.model_copy(update={"extra_args": ("--enable-fused-qk-norm-rope",)})
    found = model_violations(config.model_copy(update={"server": server}))
    assert [sentence.split(",")[0] for sentence in found] == [
        "server.extra_args has --enable-fused-qk-norm-rope"
    ] * refused


@pytest.mark.parametrize(
    "argument",
    [
        ("--json-model-override-args", '{"rope_theta": 5.0}'),
        ('--json-model-override-args={"rope_theta": 5.0}',),
        ("--model-path", "other"),
        ("--model", "other"),
        ("--model-impl=transformers",),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3", "qwen3.5"])
def test_arguments_with_which_servers_compute_another_model_are_refused(tmp_path, tiny_model, family, argument):
    config = run(tmp_path, tiny_model(family), "sparse-rl")
    server = config.server.model_copy(update={"extra_args": ("--log-level", "info", *argument)})
    (found,) = model_violations(config.model_copy(update={"server": server}))
    assert found.startswith(
        f"server.extra_args has {argument[0].partition('=')[0]}, with which servers compute another"
    )


@pytest.mark.parametrize(
    ("family", "tp", "refused"),
    [
        ("olmo3", 4, True),
        ("olmo3", 3, True),
        ("olmo3", 2, False),
        ("mixtral", 4, True),
        ("mixtral", 2, False),
        ("qwen3", 4, False),
        ("qwen3", 3, False),
    ],
)
def test_families_that_sglang_computes_wrongly_with_padded_heads_are_served_by_ranks_that_divide_their_kv_groups(
    tmp_path, tiny_model, family, tp, refused
):
    config = run(tmp_path, tiny_model(family), "sparse-rl")
    found = model_violations(config.model_copy(update={"server": config.server.model_copy(update={"tp": tp})}))
    begin = f"server.tp is {tp}, which does not divide the 2 KV groups"
    assert [sentence.split(" of ")[0] for sentence in found] == [begin] * refused


@pytest.mark.parametrize(
    ("family", "kind", "tp", "refused"),
    [
        ("qwen3.5", "sparse-rl", 3, ["2 key heads", "4 value heads"]),
        ("qwen3.5", "sparse-rl", 4, ["2 key heads"]),
        ("qwen3.5", "sparse-rl", 2, []),
        ("qwen3.5", "sft", 3, []),
        ("qwen3.5-moe", "sparse-rl", 4, ["2 key heads"]),
        ("qwen3.5-moe", "sparse-rl", 2, []),
    ],
)
def test_a_server_s_ranks_divide_the_heads_of_gated_delta_nets(tmp_path, tiny_model, family, kind, tp, refused):
    config = run(tmp_path, tiny_model(family), kind)
    found = model_violations(config.model_copy(update={"server": config.server.model_copy(update={"tp": tp})}))
    assert len(found) == len(refused)
    for sentence, heads in zip(found, refused, strict=True):
        assert sentence.startswith(f"server.tp is {tp}, which does not divide the {heads} of the gated delta nets of ")


BLOCKS = {"hidden": 512, "heads": 4, "kv_heads": 2}
"""Heads of 128, and an MLP of 768 columns."""


@pytest.mark.parametrize(
    ("family", "settings", "tp", "sentences"),
    [
        ("qwen3.5", {}, 1, ["gated delta nets, as "]),
        ("qwen3.5-moe", {}, 1, ["gated delta nets, as "]),
        ("qwen3", BLOCKS, 2, []),
        ("qwen3", BLOCKS, 4, ["4 ranks (server.tp) have 192 each of the 768 MLP columns of "]),
        ("qwen3", {}, 1, [f"1 ranks (server.tp) have {n} each of the {n} " for n in (64, 32, 96)]),
        ("glm4-moe", BLOCKS | {"moe_intermediate_size": 256}, 2, []),
        (
            "glm4-moe",
            BLOCKS | {"moe_intermediate_size": 128},
            2,
            [
                f"2 ranks (server.tp) have 64 each of the 128 columns of {what} of "
                for what in ("an expert", "the shared expert")
            ],
        ),
        ("olmo3", BLOCKS, 2, []),
    ],
)
def test_what_servers_in_fp8_cannot_hold_is_refused(tmp_path, tiny_model, family, settings, tp, sentences):
    config = run(tmp_path, tiny_model(family, **settings), "sparse-rl")
    changes = {"sync": {"fp8": True}, "server": {"tp": tp}}
    config = config.model_copy(
        update={key: getattr(config, key).model_copy(update=each) for key, each in changes.items()}
    )
    found = model_violations(config)
    assert len(found) == len(sentences)
    for sentence, begin in zip(found, sentences, strict=True):
        assert sentence.startswith(f"sync.fp8 is true, but {begin}")


@pytest.mark.parametrize(
    ("family", "router", "sentence"),
    [
        ("mixtral", False, None),
        ("qwen3-moe", False, None),
        ("qwen3", False, r"^policy.router_replay is true, but \S+ has no experts; set it to false, or leave it out.$"),
        ("qwen3-moe", True, r"^policy.router_replay is true, but sglang-router \(server.router\) forwards no request "),
    ],
)
def test_routing_is_replayed_where_there_is_some_and_the_servers_return_it(
    tmp_path, tiny_model, family, router, sentence
):
    config = run(tmp_path, tiny_model(family), "sparse-rl", router_replay=True)
    config = config.model_copy(update={"server": config.server.model_copy(update={"router": router})})
    found = model_violations(config)
    assert len(found) == (sentence is not None) and all(re.search(sentence, each) for each in found)
    undecided = config.policy.model_copy(update={"router_replay": None})
    assert model_violations(config.model_copy(update={"policy": undecided})) == []


@pytest.mark.parametrize(("family", "returned"), [("mixtral", 1), ("qwen3", 0)])
def test_sampling_servers_of_a_mixture_alone_return_their_choice(tmp_path, tiny_model, family, returned):
    config = run(tmp_path, tiny_model(family), "sparse-rl")
    servers = required_servers(config, RunDirectory(tmp_path / "run"))
    assert [spec.name for spec in servers] == ["policy-0"]
    assert servers[0].command(1).count("--enable-return-routed-experts") == returned
    off = config.model_copy(update={"policy": config.policy.model_copy(update={"router_replay": False})})
    assert "--enable-return-routed-experts" not in required_servers(off, RunDirectory(tmp_path))[0].command(1)


@pytest.mark.parametrize(
    ("precision", "kind", "sentences"),
    [("fp32", "sparse-rl", 1), ("fp32", "sft", 0), ("bf16", "sparse-rl", 0), ("auto", "sparse-rl", 0)],
)
def test_what_cannot_be_served_on_cuda_is_refused_before_anything_starts(
    tmp_path, tiny_model, monkeypatch, precision, kind, sentences
):
    for module in ("launch.model_checks", "config.precision"):
        monkeypatch.setattr(f"exprl_megatron.{module}.uses_cuda", lambda: True)
    model = tiny_model("qwen3")
    found = model_violations(run(tmp_path, model, kind, precision=precision))
    assert len(found) == sentences and all("choose bf16" in sentence for sentence in found)


def test_a_file_of_problems_is_read_once_by_all_checks(tmp_path, tiny_model, monkeypatch):
    from exprl_megatron.launch.input_hashes import hash_inputs
    from exprl_megatron.problems import sources

    read, rows = [], sources._rows
    monkeypatch.setattr(sources, "_rows", lambda problems: read.append(problems.source) or rows(problems))
    custom = "from exprl_megatron.api import Scored\none = lambda *_: 1.0\nright = lambda *_: Scored(1.0)\n"
    (tmp_path / "custom_terms.py").write_text(custom)
    config = run(tmp_path, tiny_model("qwen3"), "sparse-rl")
    evaluation = {"problems": config.stages[0].problems.model_dump(), "samples": 1, "k": [1]}
    evaluation["sampling"] = {"max_new_tokens": 16}
    tree = config.model_dump(mode="json") | {"plugin_path": [str(tmp_path)], "evaluation": evaluation}
    tree["stages"] *= 2
    tree["stages"][1] = tree["stages"][1] | {"name": "b", "reward": [{"term": "custom_terms:one"}]}
    tree["verifier"] |= {"domains": {"math": "custom_terms:right"}}
    config = check_config(tree, "test")
    with sources.cached_sources():
        check_inputs(config)
        hash_inputs(config)
    assert read == [config.stages[0].problems.source]
    check_inputs(config)
    assert len(read) == 2


def test_steps_that_another_run_kept_need_nothing_that_grading_or_an_evaluation_needs(tmp_path):
    kinds = {"a": "exprl-outcome", "b": "self-distill", "c": "sparse-rl"}
    stages = [{"kind": kind, "name": name, "steps": 1, "problems": {"source": name}} for name, kind in kinds.items()]
    evaluation = {"problems": {"source": "h", "domains": ["maps"]}, "samples": 1, "k": [1]}
    tree = {"directory": str(tmp_path), "policy": {"model": "m"}, "judge": {"model": "j"}, "evaluation": evaluation}
    tree |= {"stages": stages, "debug": {"only": "learning", "rollouts": "other"}}
    config = check_config(tree, "test")
    assert {problems.source: needs for problems, needs in required_problem_sets(config).items()} == {"b": {"reference"}}
    assert [problems.source for problems in config.problem_sets()] == ["a", "b", "c"]
    assert "maps" in config.domains


def test_problems_must_have_what_is_asked_about_them_by_any_stage_or_evaluation(tmp_path):
    kinds = {"a": ["exprl-outcome"], "b": ["self-distill"], "c": ["sparse-rl"], "d": ["exprl-process", "sparse-rl"]}
    stages = [
        {"kind": kind, "name": f"{source}{number}", "steps": 1, "problems": {"source": source}}
        for source, of_source in kinds.items()
        for number, kind in enumerate(of_source)
    ]
    evaluation = {"problems": {"source": "h"}, "samples": 1, "k": [1]}
    tree = {"directory": str(tmp_path), "policy": {"model": "m"}, "judge": {"model": "j"}, "evaluation": evaluation}
    found = {
        problems.source: needs
        for problems, needs in required_problem_sets(check_config(tree | {"stages": stages}, "t")).items()
    }
    judged, verified = {"reference"}, {"verification"}
    assert found == {"a": judged, "b": judged, "c": verified, "d": judged | verified, "h": verified}


def test_the_gates_traces_may_have_domains_of_the_runs_own_where_a_prompt_is_for_them(tmp_path, tiny_model):
    model = tiny_model("qwen3")
    of_sparse = run(tmp_path, model, "sparse-rl").model_dump(mode="json")
    traces = [
        {"problem_id": name, "problem": "?", "reference": "r", "trace": "t", "correct": name == "a", "domain": "own"}
        for name in "ab"
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    problems = {"source": str(tmp_path / "problems.jsonl"), "domains": ["own"]}
    stage = {"kind": "exprl-outcome", "steps": 1, "problems": problems, "sampling": {"max_new_tokens": 16}}
    (tmp_path / "prompt.md").write_text("## user\n\n{problem} {trace}\n")
    judge = {"model": str(model), "max_new_tokens": 8, "gate": {"traces": str(tmp_path / "traces.jsonl")}}
    judge |= {"prompt": str(tmp_path / "prompt.md")}
    of_judged = {**of_sparse, "stages": [stage], "judge": judge}
    check_prompts(check_config(of_judged, "test"))
    with pytest.raises(UserError, match=r"No shipped judge prompt is for the domain 'own'; set judge\.prompt"):
        check_prompts(check_config({**of_judged, "judge": {**judge, "prompt": None}}, "test"))


def test_the_process_that_checks_the_inputs_reads_their_problems_once_for_checks_and_hashes(
    tmp_path, tiny_model, monkeypatch
):
    from exprl_megatron.launch import input_checks
    from exprl_megatron.problems import sources

    read, rows = [], sources._rows
    monkeypatch.setattr(sources, "_rows", lambda problems: read.append(problems.source) or rows(problems))
    monkeypatch.setattr(input_checks, "die_with_parent", lambda parent: None)
    ours, theirs = socket.socketpair()
    monkeypatch.setenv("EXPRL_INPUT_CHECKS", str(theirs.detach()))
    monkeypatch.setenv("EXPRL_INPUT_CHECKS_PARENT", "0")
    config = run(tmp_path, tiny_model("qwen3"), "sparse-rl")
    with ours:
        ours.sendall(config.model_dump_json().encode())
        ours.shutdown(socket.SHUT_WR)
        input_checks.main()
        assert {"policy.model", "stages.0.problems"} <= json.loads(ours.recv(2**20))["contents"].keys()
    assert read == [config.stages[0].problems.source]
