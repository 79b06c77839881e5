"""Every large recipe at every scale: its config is sound, its processes fit, and its model can be built."""

import fiddle as fdl
import pytest
from helpers.meta import meta_chunks, pretend_world

from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.models.architecture import layout_violations
from exprl_megatron.planning.hardware import find_gpu
from exprl_megatron.planning.parameters import rank_counts
from exprl_megatron.planning.plan import Plan, plan
from exprl_megatron.planning.targets import find_architecture
from exprl_megatron.planning.workload import workload_of
from recipes.catalog import MODELS
from recipes.places import components
from recipes.time_limits import LEAD_S
from recipes.trees import as_run_config

H100 = find_gpu("h100")
STAGES = ("exprl", "sparse_rl", "sft", "self_distill")
SCALES = [
    (name, nodes) for name, module in MODELS.items() if hasattr(module, "JUDGED") for nodes in sorted(module.JUDGED)
]
# Transformer Engine's layers have the same parameters, and are not in the environment without a GPU.
BF16 = PrecisionConfig(kind="bf16")
SEVENTIES = ("llama3p3_70b", "qwen2p5_72b")


def recipe(name: str, stage: str, nodes: int):
    made = getattr(MODELS[name], stage)(nodes=nodes)
    return as_run_config(made.config, name), fdl.build(made.nodes)


def planned(config: RunConfig):
    return plan(config, config.stages[0], workload_of(config, config.stages[0], None, None), H100)


def checkpoint_s(found: Plan, config: RunConfig) -> float:
    """The seconds to write one checkpoint, of which a step has its share."""
    return config.checkpoint.every_steps * sum(phase.seconds for phase in found.phases if phase.name == "save")


def test_the_70b_recipes_have_layouts_for_8_16_and_32_nodes():
    assert {(name, nodes) for name, nodes in SCALES if name in SEVENTIES} == {
        (name, nodes) for name in SEVENTIES for nodes in (8, 16, 32)
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "nodes"), SCALES)
def test_a_recipe_s_processes_fit_on_its_nodes(name, nodes, stage):
    config, placed = recipe(name, stage, nodes)
    parts = components(config, placed)
    own = {part.allocation: part.nodes for part in parts}
    assert sum(own.values()) == nodes, "as many nodes are asked for as the recipe is called with"
    assert layout_violations(find_architecture(config.policy.model)[0], config.policy.layout) == []
    # fine-tuning on references, which the planner does not know, learns with self-distillation's layout
    found = planned(config if stage != "sft" else recipe(name, "self_distill", nodes)[0])
    assert not found.faults
    assert 0 < found.step_s < 1000
    # From Slurm's signal to the time limit the run finishes its step and writes a checkpoint.
    assert 1.5 * (found.step_s + checkpoint_s(found, config)) <= LEAD_S
    twice = found.gpus["policy server"] if config.placement.kind == "colocated" else 0
    assert sum(found.gpus.values()) - twice <= 8 * nodes


def test_the_planner_is_not_content_with_anything():
    config, _ = recipe("llama3p3_70b", "exprl", 8)
    layout = config.policy.layout.model_copy(update={"cp": 1})
    assert planned(config.model_copy(update={"policy": config.policy.model_copy(update={"layout": layout})})).faults


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVENTIES)
def test_every_pipeline_stage_of_a_70b_is_built_on_the_meta_device_with_the_parameters_that_were_planned(name):
    policies = {recipe(name, stage, nodes)[0].policy for stage in ("exprl", "sparse_rl") for nodes in (8, 16, 32)}
    assert len({policy.layout for policy in policies}) == 4
    for policy in policies:
        architecture, layout = find_architecture(policy.model)[0], policy.layout
        of_a_stage = layout.world_size // layout.pp
        for pp_rank in range(layout.pp):
            with pretend_world(layout, pp_rank * of_a_stage) as world:
                chunks = meta_chunks(architecture, policy.model_copy(update={"precision": BF16}), world)
                built = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
            assert world.pp_rank == pp_rank and len(chunks) == layout.vpp
            assert built == rank_counts(architecture, layout, pp_rank).total
