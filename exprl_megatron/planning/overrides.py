"""The part of a config that the planner chooses, as overrides for `exprl train` or another `exprl plan`."""

from exprl_megatron.config.policy import Layout
from exprl_megatron.planning.plan import Plan


def overrides(plan: Plan) -> list[str]:
    """Return `key.path=value` for layout, recomputation and servers."""
    config, plain = plan.config, Layout().model_dump()
    before = plan.given.policy.layout.model_dump()
    layout = config.policy.layout.model_dump()
    found = {f"policy.layout.{n}": value for n, value in layout.items() if (before[n], value) != (plain[n], plain[n])}
    found["policy.recompute"] = config.policy.recompute
    if plan.workload.sampled:
        found |= {"server.count": config.server.count, "server.tp": config.server.tp}
    if plan.workload.judgements and config.required_judge.has_servers:
        server = config.required_judge.server
        found |= {"judge.server.count": server.count, "judge.server.tp": server.tp}
    return [f"{name}={str(value).lower()}" for name, value in found.items()]


def layout_text(layout: Layout) -> str:
    """Return the sizes of a layout that are not 1, for example `TP4 PP4 VPP5 CP2 DP2`."""
    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    text = " ".join(f"{name.upper()}{size}" for name, size in sizes.items() if size > 1) or "one GPU"
    return text + (" +ends" if layout.embedding_as_layer or layout.head_as_layer else "")
