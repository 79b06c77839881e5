"""Assignment of this machine's GPUs to the trainer and the servers that the run starts."""

from collections.abc import Sequence

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.serving.router_spec import RouterSpec
from exprl_megatron.serving.server_spec import ServerSpec, side_by_side


def assign_gpus(specs: Sequence[ServerSpec], config: RunConfig, gpus: int) -> list[ServerSpec]:
    """Assign GPUs of this machine to servers: in order, after the trainer's GPUs.

    Sampling servers that take turns with the trainer share its GPUs.

    Args:
        specs: the servers.
        config: the config of the run.
        gpus: number of GPUs of this machine; without any the servers are returned unchanged.

    Returns:
        The servers, each with its first GPU.

    Raises:
        UserError: there are too few GPUs.
    """
    if gpus == 0:
        return list(specs)
    ranks = config.policy.layout.world_size
    computing = [spec for spec in specs if not isinstance(spec, RouterSpec)]
    turns = [spec for spec in computing if config.placement.kind == "colocated" and spec.name.startswith("policy-")]
    others = [spec for spec in computing if spec not in turns]
    behind = side_by_side(others, max(ranks, sum(spec.config.tp for spec in turns)))
    found = {spec.name: spec for spec in (*side_by_side(turns), *behind)}
    needed = max([ranks, *(spec.first_gpu + spec.config.tp for spec in found.values())])
    if needed > gpus:
        servers = ", ".join(f"{spec.name} {spec.config.tp}" for spec in computing)
        raise UserError(
            f"The trainer needs {ranks} GPUs of this machine and the servers need more ({servers}): {needed} in total, "
            f"of {gpus}; reduce policy.layout or the servers' count or tp, let them take turns (placement.kind: "
            "colocated), or start servers on other machines (`exprl serve`)."
        )
    return [found.get(spec.name, spec) for spec in specs]
