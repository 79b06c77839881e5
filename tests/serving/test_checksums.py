"""Checksums from Hugging Face tensors; that they are SGLang's own is shown in test_real_servers."""

import hashlib
import os
import subprocess
import sys

import numpy
import pytest
import torch

import exprl_megatron.serving.weight_hash as weight_hash
from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.serving.checksums import ServerChecksums, checksums, differing, rank_checksums
from exprl_megatron.serving.server_command import server_environment
from exprl_megatron.serving.weight_layout import is_weight

# SGLang's own CUDA kernel, run by Triton's interpreter on the tensors of the file given as its first argument.
INTERPRETED = """
import sys, torch, triton
import sglang.kernels.ops.memory.gpu_tensor_hash as h
seed, mask = 0x243F6A88, 2**32 - 1
for tensor in torch.load(sys.argv[1]):
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = torch.cat([data, torch.zeros(-len(data) % 4, dtype=torch.uint8)]).view(torch.uint32)
    tiles = triton.cdiv(len(words), 8192)
    sums = torch.empty(tiles, dtype=torch.uint64)
    h.hash_tiles32_kernel_blocked[(tiles,)](
        words, sums, len(words), seed1=seed, seed2=(seed * 0x9E3779B1 ^ 0xDEADBEEF) & mask, FM_C1=h.FMIX32_C1,
        FM_C2=h.FMIX32_C2, POS_A=h.POS_C1, POS_B=h.POS_C2, TILE=8192, BLOCK=256, USE_CG=True)
    print(f"{h._final_splitmix64(sum(sums.tolist())):016x}")
"""
ATTENTION = "model.layers.0.self_attn"


def sha(*arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).digest()[:8].hex()


def tensors(*names, rows=2):
    return {name: torch.randn(rows + i, 3) for i, name in enumerate(names)}


def test_projections_are_joined_whatever_their_order():
    parts = tensors(*(f"{ATTENTION}.{part}_proj.weight" for part in "qkv"))
    expected = {f"{ATTENTION}.qkv_proj.weight": sha(*(t.numpy() for t in parts.values()))}
    assert checksums(parts.items(), tied=False) == expected
    assert checksums(reversed(parts.items()), tied=False) == expected


def test_the_vocabulary_is_padded_with_zero_rows_and_a_tied_head_left_out():
    weights = tensors("model.embed_tokens.weight", "lm_head.weight", rows=130)
    embedding, head = (t.numpy() for t in weights.values())
    padded = numpy.concatenate([embedding, numpy.zeros((62, 3), numpy.float32)])
    untied = checksums(weights.items(), tied=False)
    assert untied["model.embed_tokens.weight"] == sha(padded)
    assert untied["lm_head.weight"] == sha(numpy.concatenate([head, numpy.zeros((61, 3), numpy.float32)]))
    assert checksums(weights.items(), tied=True).keys() == {"model.embed_tokens.weight"}


def test_tensors_are_hashed_in_the_server_s_dtype():
    norm = {"model.norm.weight": torch.tensor([1.0, 2.5, -3.0])}
    bits = numpy.array([0x3F80, 0x4020, 0xC040], dtype="<u2")
    assert checksums(norm.items(), tied=False, dtype=torch.bfloat16) == {"model.norm.weight": sha(bits)}


@pytest.mark.slow
def test_the_hash_of_a_cuda_server_is_that_of_sglang_s_kernel(tmp_path, monkeypatch):
    given = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.randn(300, 70), -torch.ones(1)]
    torch.save(given, tmp_path / "tensors.pt")
    environment = server_environment(os.environ, cuda=False) | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path / "tensors.pt")]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    ours = [checksums([("w", tensor)], tied=False, server="cuda")["w"] for tensor in given]
    assert printed.split() == ours
    # Inside other memory, and not at the start of a word.
    aside = torch.cat([torch.zeros(1, dtype=torch.bfloat16), torch.arange(20_000).bfloat16()])[1:]
    assert checksums([("w", aside)], tied=False, server="cuda") == checksums(
        [("w", aside.clone())], tied=False, server="cuda"
    )
    monkeypatch.setattr(weight_hash, "_TILES_AT_ONCE", 2)
    assert [checksums([("w", tensor)], tied=False, server="cuda")["w"] for tensor in given] == ours


def test_a_missing_part_is_an_error_that_names_the_parameter():
    parts = tensors("model.layers.3.mlp.gate_proj.weight")
    with pytest.raises(ValueError, match=r"missing: model.layers.3.mlp.gate_up_proj.weight \(has gate_proj\)"):
        checksums(parts.items(), tied=False)


def experts_of_a_layer(rows=64, columns=48):
    """Of three experts of 48 inner numbers: the tensors, in the order in which they are sent."""
    mlp = "model.layers.0.mlp.experts"
    return {
        f"{mlp}.{expert}.{part}_proj.weight": torch.randn(*((rows, columns) if part == "down" else (columns, rows)))
        for expert in range(3)
        for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("server", ["cpu", "cuda"])
def test_a_layer_s_experts_are_hashed_as_two_tensors_whatever_comes_first(server):
    weights = experts_of_a_layer()
    gate, up, down = (
        [tensor for name, tensor in weights.items() if f".{part}_proj" in name] for part in ("gate", "up", "down")
    )
    second = slice(24, 48) if server == "cuda" else slice(32, 48)
    w13 = torch.stack([torch.cat([g[second], u[second]]) for g, u in zip(gate, up, strict=True)])
    w2 = torch.stack([d[:, second] for d in down])
    if server == "cpu":
        w13 = torch.stack([torch.cat([_padded(g[second]), _padded(u[second])]) for g, u in zip(gate, up, strict=True)])
        w2 = torch.stack([_padded(d[:, second].T).T for d in down])
    whole = checksums([("w13", w13), ("w2", w2)], tied=False, server=server)
    expected = {f"model.layers.0.mlp.experts.{name}_weight": value for name, value in whole.items()}
    settings = {"tp": 2, "kv_heads": 2, "experts": 3, "tied": False, "server": server}
    assert rank_checksums(weights.items(), **settings)[1] == expected
    found, shuffled = ServerChecksums(**settings), list(reversed(weights.items()))
    for named in (shuffled[:4], shuffled[4:]):
        memory = [(name, tensor.clone()) for name, tensor in named]
        found.add(memory)
        for _, tensor in memory:
            tensor.zero_()
    assert found.result()[1] == expected


def _padded(rows):
    """To 32."""
    return torch.nn.functional.pad(rows, (0, 0, 0, 32 - len(rows)))


def test_a_missing_expert_is_an_error_that_names_the_parameter():
    weights = dict(list(experts_of_a_layer().items())[:-1])
    with pytest.raises(ValueError, match=r"missing: model.layers.0.mlp.experts.w2_weight \(has 2 of 3 parts\)"):
        checksums(weights.items(), tied=False, experts=3)


def test_differences_name_changed_missing_and_surplus_parameters():
    assert differing({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == ["b", "c", "d"]


def test_ranks_hold_their_heads_their_columns_and_their_words():
    weights = {
        f"{ATTENTION}.q_proj.weight": torch.randn(8, 3),
        f"{ATTENTION}.k_proj.weight": torch.randn(4, 3),
        f"{ATTENTION}.v_proj.weight": torch.randn(4, 3),
        f"{ATTENTION}.o_proj.weight": torch.randn(3, 8),
        "model.norm.weight": torch.randn(3),
        "lm_head.weight": torch.randn(64, 3),
    }
    q, k, v, o, norm, head = (tensor.numpy() for tensor in weights.values())
    second = rank_checksums(weights.items(), tp=2, kv_heads=2, tied=False)[1]
    assert second == {
        f"{ATTENTION}.qkv_proj.weight": sha(q[4:], k[2:], v[2:]),
        f"{ATTENTION}.o_proj.weight": sha(numpy.ascontiguousarray(o[:, 4:])),
        "model.norm.weight": sha(norm),
        "lm_head.weight": sha(head[32:]),
    }


def test_ranks_without_a_kv_head_have_zeros_on_a_cpu_and_share_one_on_cuda():
    """Two KV heads of two numbers, each with two heads of queries, among four ranks, and among three."""
    names = [f"{ATTENTION}.{part}_proj.weight" for part in "qkvo"]
    q, k, v, o = torch.randn(8, 3), torch.randn(4, 3), torch.randn(4, 3), torch.randn(3, 8)
    weights = dict(zip(names, (q, k, v, o), strict=True))
    weights |= {name.replace("weight", "bias"): tensor[:, 0].contiguous() for name, tensor in list(weights.items())[:3]}
    for tp in (3, 4):
        found = rank_checksums(weights.items(), tp=tp, kv_heads=2, tied=False)
        assert found[1] == {
            f"{ATTENTION}.qkv_proj.weight": sha(q[4:].numpy(), k[2:].numpy(), v[2:].numpy()),
            f"{ATTENTION}.qkv_proj.bias": sha(*(part[:, 0].numpy() for part in (q[4:], k[2:], v[2:]))),
            f"{ATTENTION}.o_proj.weight": sha(o[:, 4:].contiguous().numpy()),
        }
        for padded in found[2:]:
            assert padded == {
                f"{ATTENTION}.qkv_proj.weight": sha(numpy.zeros((8, 3), numpy.float32)),
                f"{ATTENTION}.qkv_proj.bias": sha(numpy.zeros(8, numpy.float32)),
                f"{ATTENTION}.o_proj.weight": sha(numpy.zeros((3, 4), numpy.float32)),
            }
    third = rank_checksums(list(weights.items())[:3], tp=4, kv_heads=2, tied=False, server="cuda")[2]
    joined = checksums([("joined", torch.cat([q[4:6], k[2:], v[2:]]))], tied=False, server="cuda")
    assert [*third.values()] == [*joined.values()]


@pytest.mark.parametrize(("tp", "rows"), [(1, 192), (2, 96), (3, 64), (5, 64)])
def test_a_vocabulary_is_padded_to_multiples_of_64_that_ranks_divide(tp, rows):
    """As VocabParallelEmbedding: 131 to 192, which five ranks do not divide, and so to 320."""
    embedding = torch.randn(131, 3)
    whole = torch.cat([embedding, torch.zeros(320 - 131, 3)])
    found = rank_checksums([("model.embed_tokens.weight", embedding)], tp=tp, kv_heads=1, tied=False)
    assert [each["model.embed_tokens.weight"] for each in found] == [
        sha(whole[rank * rows : (rank + 1) * rows].numpy()) for rank in range(tp)
    ]


def test_on_a_cpu_ranks_hold_a_multiple_of_32_of_an_mlp():
    gate, up, down = torch.randn(96, 3), torch.randn(96, 3), torch.randn(3, 96)
    mlp = "model.layers.0.mlp"
    weights = {f"{mlp}.gate_proj.weight": gate, f"{mlp}.up_proj.weight": up, f"{mlp}.down_proj.weight": down}
    zeros = numpy.zeros((32, 3), numpy.float32)
    second = rank_checksums(weights.items(), tp=2, kv_heads=2, tied=False)[1]
    assert second == {
        f"{mlp}.gate_up_proj.weight": sha(gate[64:].numpy(), zeros, up[64:].numpy(), zeros),
        f"{mlp}.down_proj.weight": sha(numpy.concatenate([down[:, 64:].numpy(), zeros.T], axis=1)),
    }
    on_cuda = rank_checksums(weights.items(), tp=2, kv_heads=2, tied=False, server="cuda")[1]
    cut = {name: tensor[48:] for name, tensor in weights.items() if "down" not in name}
    cut[f"{mlp}.down_proj.weight"] = down[:, 48:]
    assert on_cuda == checksums(cut.items(), tied=False, server="cuda")


NET = DeltaNet(key_heads=2, value_heads=4, key_dim=3, value_dim=2, kernel=4)
LINEAR = "model.language_model.layers.0.linear_attn"


def test_a_norm_that_adds_one_has_a_second_copy_in_models_with_gated_delta_nets():
    """Which a transport that writes into parameters alone would leave as it was."""
    names = ("layers.1.self_attn.q_norm", "layers.0.input_layernorm", "norm", "layers.0.linear_attn.norm")
    norms = {f"model.language_model.{name}.weight": torch.randn(5).bfloat16() for name in names}
    found = checksums(norms.items(), tied=False, delta_net=NET)
    served = dict(zip(("layers.1.q_norm", *names[1:]), norms.values(), strict=True))
    assert found == {f"model.{name}.weight": sha(norm.view(torch.uint16).numpy()) for name, norm in served.items()} | {
        f"model.{name}.gemma_weight": sha((1 + norm).view(torch.uint16).numpy())
        for name, norm in served.items()
        if "linear_attn" not in name
    }
    assert len(checksums(norms.items(), tied=False)) == len(norms)


def test_queries_keys_and_values_of_a_gated_delta_net_are_each_cut_by_heads():
    """Rows of a tensor are numbered, so that what a rank of two holds can be read off."""
    rows = {"in_proj_qkv.weight": 20, "in_proj_z.weight": 8, "in_proj_b.weight": 4, "in_proj_a.weight": 4}
    weights = {
        name: (100 * place + torch.arange(float(count)))[:, None].expand(-1, 3).contiguous()
        for place, (name, count) in enumerate(rows.items())
    }
    weights |= {"A_log": torch.arange(4.0), "dt_bias": 10 + torch.arange(4.0), "out_proj.weight": torch.randn(3, 8)}
    weights["conv1d.weight"] = torch.arange(20.0)[:, None, None].expand(-1, 1, 4).contiguous()
    second = rank_checksums(
        ((f"{LINEAR}.{name}", tensor) for name, tensor in weights.items()), tp=2, kv_heads=2, tied=False, delta_net=NET
    )[1]
    qkv = [3, 4, 5, 9, 10, 11, 16, 17, 18, 19]
    expected = {
        "in_proj_qkvz.weight": (weights["in_proj_qkv.weight"][qkv], weights["in_proj_z.weight"][4:]),
        "in_proj_ba.weight": (weights["in_proj_b.weight"][2:], weights["in_proj_a.weight"][2:]),
        "conv1d.weight": (weights["conv1d.weight"][qkv],),
        "A_log": (weights["A_log"][2:],),
        "dt_bias": (weights["dt_bias"][2:],),
        "out_proj.weight": (weights["out_proj.weight"][:, 4:].contiguous(),),
    }
    served = LINEAR.replace("language_model.", "")
    assert second == {f"{served}.{name}": sha(*(t.numpy() for t in parts)) for name, parts in expected.items()}


def test_a_mixture_s_shared_expert_is_a_parameter_of_its_own_and_its_gate_whole_on_every_rank():
    """Routed experts are joined in order; the second of two ranks has the second half of each matrix's width."""
    mlp, numbers = "model.language_model.layers.0.mlp", torch.Generator().manual_seed(0)
    shapes = {f"experts.{e}": (64, 3) for e in (1, 0)} | {"shared_expert": (128, 3)}
    weights = {
        f"{mlp}.{name}.{part}_proj.weight": torch.randn(shape[::-1] if part == "down" else shape, generator=numbers)
        for name, shape in shapes.items()
        for part in ("down", "up", "gate")
    }
    router, gate = torch.randn(2, 3, generator=numbers), torch.randn(1, 3, generator=numbers)
    weights |= {f"{mlp}.gate.weight": router, f"{mlp}.shared_expert_gate.weight": gate}

    def half(name, part):
        whole = weights[f"{mlp}.{name}.{part}_proj.weight"]
        return whole.chunk(2, dim=1 if part == "down" else 0)[1].contiguous().numpy()

    second = rank_checksums(weights.items(), tp=2, kv_heads=2, tied=False, experts=2, delta_net=NET)[1]
    experts, served = ("experts.0", "experts.1"), "model.layers.0.mlp"
    assert second == {
        f"{served}.experts.w13_weight": sha(*(half(name, part) for name in experts for part in ("gate", "up"))),
        f"{served}.experts.w2_weight": sha(*(half(name, "down") for name in experts)),
        f"{served}.shared_expert.gate_up_proj.weight": sha(half("shared_expert", "gate"), half("shared_expert", "up")),
        f"{served}.shared_expert.down_proj.weight": sha(half("shared_expert", "down")),
        f"{served}.gate.weight": sha(router.numpy()),
        f"{served}.shared_expert_gate.weight": sha(gate.numpy()),
    }


def test_a_buffer_that_follows_from_the_config_is_not_a_weight():
    assert is_weight("model.norm.gemma_weight") and not is_weight("model.layers.3.rotary_emb.axis_map")
