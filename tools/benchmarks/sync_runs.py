"""Weight syncs of a random model from trainer processes to running servers, each with its floor."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from safetensors.torch import save_file

from benchmarks.broadcast_floor import Floor
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.config.transport import TransportChoice
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.models.weight_readers import RandomWeights
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keys import authorization
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.messages import stage_messages
from exprl_megatron.weight_sync.sync import WeightSync
from exprl_megatron.weight_sync.transports import make_transport

GB = 1e9
_DEADLINE_S = 600.0
_HIDDEN, _FFN, _WORDS = 1024, 3072, 16384


@dataclass(frozen=True)
class Measured:
    """One layout's syncs to one kind of server, by one transport; medians over the repeats."""

    layout: str
    server_tp: int
    transport: str
    bucket_mb: float
    gb: float
    floor_s: float
    push_s: float
    parts: dict[str, float]
    """Seconds of the five parts of a sync: gather, quantization, send, load and check."""

    @property
    def share(self) -> float:
        """The floor's seconds over those of bringing the weights."""
        return self.floor_s / self.push_s


def write_model(directory: Path, size_bytes: float, seed: int = 0) -> Path:
    """Return a Qwen3 of about `size_bytes` in bf16 with random weights, no tokenizer."""
    layer = 2 * (2 * _HIDDEN * _HIDDEN + 2 * _HIDDEN * _HIDDEN // 2 + 3 * _HIDDEN * _FFN)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": _HIDDEN,
        "intermediate_size": _FFN,
        "num_hidden_layers": max(4, math.floor((size_bytes - 4 * _WORDS * _HIDDEN) / layer / 4) * 4),
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": _WORDS,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(directory)
    source = RandomWeights(architecture, seed)
    tensors = {name: source.read(name).bfloat16() for name in hf_shapes(architecture)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class Trainer:
    """A trainer's process in a world of `layout`, and its way to `servers` by the transport of `settings`."""

    def __init__(self, layout: Layout, model: Path, servers: list[dict], server_tp: int, settings: dict):
        self.world = enter_world(layout, timeout_s=_DEADLINE_S)
        self.policy = Policy(PolicyConfig(model=str(model), precision="bf16", layout=layout), seed=0)
        self.coordinator = RankCoordinator(2 * _DEADLINE_S)
        self._server_tp, self._bucket_mb = server_tp, settings["bucket_mb"]
        found = servers if self.world.rank == 0 else []
        self._clients = [
            SGLangClient(s["url"], s["name"], deadline_s=_DEADLINE_S, headers=authorization(s["key_file"]))
            for s in found
        ]
        for client in self._clients:
            self.coordinator.run(client.__aenter__())
        self._transport = make_transport(
            TransportChoice(settings["transport"], "measured"),
            self._clients,
            server_tp,
            self.policy.world,
            self.coordinator,
            _DEADLINE_S,
            directory=model.parent / "sync",
            model=model,
        )

    def sync(self, verify: bool) -> WeightSync:
        """Syncs of this trainer."""
        config = SyncConfig(bucket_mb=self._bucket_mb, verify=verify)
        members = StaticPool(self._clients)
        return WeightSync(config, self.policy, self.coordinator, members, self._transport, self._server_tp)

    def change(self) -> None:
        """Other weights than before, so that a sync that sends nothing is detected."""
        for chunk in self.policy.chunks:
            for parameter in chunk.parameters():
                parameter.data.neg_()

    def close(self, sync: WeightSync) -> None:
        """Leave servers and world; `sync` is any of this trainer's."""
        sync.close()
        for client in self._clients:
            self.coordinator.run(client.__aexit__())
        self.coordinator.close()
        leave_world()


def measure(
    layout: Layout, model: Path, servers: list[dict], server_tp: int, floor_port: int, settings: dict
) -> Measured | None:
    """Syncs and floors in turn, in a world of `layout`; on rank 0 what they took."""
    trainer = Trainer(layout, model, servers, server_tp, settings)
    floor = Floor(floor_port, server_tp * len(servers)) if trainer.world.rank == 0 else None
    sync = trainer.sync(settings["verify"])
    staged = stage_messages(trainer.policy.architecture, layout, "bfloat16", int(settings["bucket_mb"] * 2**20))
    sizes = [message.nbytes for messages in staged for message in messages]
    syncs, floors = [], []
    for number in range(settings["repeats"] + 1):
        trainer.change()
        floors.append(0.0 if floor is None else floor.seconds(sizes))
        syncs.append(sync.push_weights(f"{layout}-{time.monotonic_ns()}-{number}"))
    if floor is not None:
        floor.close()
    trainer.close(sync)
    # The first opens the groups.
    return _medians(layout, server_tp, settings, floors[1:], syncs[1:]) if floor is not None else None


def to_dict(measured: Measured) -> dict:
    """Return what goes into the JSON file."""
    return asdict(measured) | {"share": measured.share}


def _medians(
    layout: Layout, server_tp: int, settings: dict, floors: list[float], syncs: list[dict[str, float]]
) -> Measured:
    parts = {
        part: median(sync[f"sync/{part}"] for sync in syncs) for part in ("gather", "quantize", "send", "load", "check")
    }
    return Measured(
        layout=f"TP{layout.tp} x PP{layout.pp} x DP{layout.dp}",
        server_tp=server_tp,
        transport=settings["transport"],
        bucket_mb=settings["bucket_mb"],
        gb=syncs[0]["sync/gb"],
        floor_s=median(floors),
        push_s=median(sync["sync/seconds"] - sync["sync/check"] for sync in syncs),
        parts=parts,
    )
