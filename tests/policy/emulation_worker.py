"""Run by test_emulation.py on two processes: one MLP, rounded in every recipe, and a whole model, in three layouts."""

import torch
import torch.distributed as dist
from helpers.layout_learning import learn
from helpers.ranks import Ranks
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.policy.policy import Policy

LAYOUTS = {"TP1": Layout(), "TP2": Layout(tp=2), "TP2+SP": Layout(tp=2, sequence_parallel=True)}
KINDS = ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8")


def through_mlp(model: str, layout: Layout, kind: str) -> dict[str, torch.Tensor]:
    """Of the first layer's MLP in its second pass: output, gradient of the input, squared norms of the weights'."""
    precision = PrecisionConfig(kind=kind, emulate=True)
    policy = Policy(PolicyConfig(model=model, layout=layout, precision=precision), seed=0)
    mlp = policy.chunks[0].decoder.layers[0].mlp
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(70, 2, policy.architecture.hidden, generator=generator)
    outer = torch.randn(hidden.shape, generator=generator)
    for _ in range(2):
        mlp.zero_grad()
        whole = hidden.clone().requires_grad_()
        mine = scatter_to_sequence_parallel_region(whole) if layout.sequence_parallel else whole
        output, _ = mlp(mine)
        if layout.sequence_parallel:
            output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
        output.backward(outer)
    linears = (mlp.linear_fc1, mlp.linear_fc2)
    squares = torch.stack([linear.weight.grad.double().square().sum() for linear in linears])
    dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
    return {"output": output.detach(), "input": whole.grad, "weights": squares}


def distances(result: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """|result - reference| / |reference|."""
    return {name: float((result[name] - value).norm() / value.norm()) for name, value in reference.items()}


def main() -> None:
    ranks = Ranks()
    model = ranks.arguments["model"]
    references: dict[str, dict[str, torch.Tensor]] = {}

    def mlps(layout: Layout) -> dict[str, dict[str, float]]:
        found = {kind: through_mlp(model, layout, kind) for kind in KINDS}
        # The second process has none: it was in no world of one.
        references.update(found if layout == Layout() else {})
        return {kind: distances(found[kind], references[kind]) for kind in references}

    for name, layout in LAYOUTS.items():
        ranks.within(layout, lambda _, la=layout: mlps(la), f"mlp {name}")
        settings = {"precision": {"kind": "fp8-blockwise", "emulate": True}}
        ranks.within(layout, lambda _, la=layout, s=settings: learn(model, la, s, {}), f"policy {name}")
    ranks.finish()


if __name__ == "__main__":
    main()
