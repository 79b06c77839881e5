"""The arithmetic of a study, and its config: every arm resolves and draws as many samples as any other."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from ablation_tables import (
    SUCCESSES,
    Arm,
    Evaluated,
    paired_difference,
    pooled_pass_at_k,
    results,
    tables,
)
from scipy import stats
from study_picture import Measured, draw, draw_curves, read_tables

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "tools" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(arm: str, seed: int, right: int, wrong_groups: list[float]) -> Evaluated:
    """A run in which one problem of two has `right` of 16 samples right at the end, and none before."""
    metrics = [{"verifier/all_wrong_groups": share} for share in wrong_groups]
    steps = [{"stage": "prime", "step": step, "metrics": of_step} for step, of_step in enumerate(metrics, 1)]
    return Evaluated(arm, seed, {"a": [16, 0], "b": [16, 0]}, {"a": [16, right], "b": [16, 0]}, steps)


def test_pass_at_k_is_pooled_over_seeds_and_problems():
    counts = [{"a": [4, 4], "b": [4, 0]}, {"a": [4, 2], "b": [4, 0]}]
    pooled = pooled_pass_at_k(counts, 1)
    assert pooled.seeds == (0.5, 0.25)
    assert pooled.mean == 0.375
    assert pooled.low <= 0.375 <= pooled.high
    # Of 2 right and 2 wrong samples a pair is all wrong in one of six cases.
    assert pooled_pass_at_k(counts, 2).mean == pytest.approx((1 + 5 / 6) / 4)


@pytest.mark.parametrize(("right", "bounds"), [(0, (0, 0.306)), (16, (0.694, 1))])
def test_counts_that_are_all_zero_or_all_one_leave_the_doubt_of_so_many_problems(right, bounds):
    pooled = pooled_pass_at_k([{str(problem): [16, right] for problem in range(10)}] * 3, 1)
    # Clopper and Pearson's tables: 0 of 10 is [0, 30.8 %] (1 - 0.025 ** 0.1 = 0.3085).
    assert (pooled.low, pooled.high) == pytest.approx(bounds, abs=0.003)


def test_differences_are_paired_by_problem():
    # Problems differ far more from each other than the arms do: alone each interval spans half of [0, 1].
    second = [{str(p): [10, (p + shift) % 9] for p in range(9)} for shift in (0, 9)]
    first = [{name: [10, right + 1] for name, (_, right) in of_seed.items()} for of_seed in second]
    found = paired_difference(first, second, 1)
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1), abs=1e-6)
    alone = pooled_pass_at_k(first, 1)
    assert alone.high - alone.low > 0.3
    assert found.seeds == (2, 2)


def test_a_difference_of_few_seeds_has_the_t_interval_of_welch():
    # Every problem of a seed has the same share, so that only seeds vary; scipy computes Welch's interval.
    shares = ([30, 50, 70], [30, 35, 45])
    first, second = ([{p: [100, right] for p in map(str, range(40))} for right in arm] for arm in shares)
    found = paired_difference(first, second, 1)
    welch = stats.ttest_ind(*shares, equal_var=False).confidence_interval(0.95)
    assert (100 * found.low, 100 * found.high) == pytest.approx((welch.low, welch.high))


def test_seeds_with_other_problems_are_refused():
    with pytest.raises(ValueError, match="different problems"):
        pooled_pass_at_k([{"a": [4, 4]}, {"b": [4, 4]}], 1)
    with pytest.raises(ValueError, match="different problems"):
        paired_difference([{"a": [4, 4]}], [{"b": [4, 4]}], 1)


def test_groups_with_a_success_are_those_not_all_wrong():
    assert run("grpo", 1, 2, [1.0, 0.75]).curve("prime", SUCCESSES) == [0.0, 0.25]


def test_an_interrupted_seed_shortens_its_arms_curve():
    arm = Arm("grpo", [run("grpo", 1, 2, [1.0, 0.5, 0.5]), run("grpo", 2, 0, [1.0, 1.0])])
    assert arm.curve("prime", SUCCESSES).tolist() == [[0.0, 0.5], [0.0, 0.0]]


def test_tables_show_every_arm():
    arms = [
        Arm("sft", [run("sft", 1, 2, [])]),
        Arm("grpo", [run("grpo", seed, 2, [1.0, 0.5]) for seed in (1, 2)]),
        Arm("bonus", [run("bonus", 1, 16, [0.0])]),
    ]
    rivals, ablations = tables(arms, ("bonus",)).split("The ablations")
    # 0 of two problems: 1 - 0.025 ** 0.5.
    assert "| grpo | 2 | 25.0 | 0.0 [0.0, 84.2] |" in rivals
    assert "| grpo - sft | 2, 1 | +0.0 [" in rivals
    assert "Korn-Graubard" in rivals and "paired by problem" in rivals
    assert "bonus" not in rivals
    assert "| bonus | 1 |" in ablations
    assert "| bonus - sft | 1, 1 |" in ablations
    found = results(arms, ("bonus",), ks=(1, 4))
    assert found["arms"]["bonus"]["final"]["pass@4"]["mean"] == 0.5
    pairs = {(each["arm"], each["against"]) for each in found["differences"]}
    assert pairs == {("grpo", "sft"), ("bonus", "sft")}


def test_curves_have_a_panel_for_each_arm_with_a_line_for_each_seed_and_one_for_their_mean(tmp_path):
    names = ("sft", "grpo", "outcome", "process", "bonus")
    arms = [Arm(name, [run(name, seed, 2, [] if name == "sft" else [1.0, 0.5]) for seed in (1, 2)]) for name in names]
    draw_curves(arms, ("prime", "sparse"), tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text()
    # Five arms in two rows of four panels; three panels are not drawn.
    assert svg.count('<g id="axes_') == len(names)
    assert all(f"<!-- {name} -->" in svg for name in names)
    assert svg.count("stroke-opacity: 0.55") == 4 * 2, "the seeds of the arms that sampled"


def test_every_arm_draws_as_many_samples_as_any_other(study):
    settings = yaml.safe_load(study.STUDY.read_text())
    runs = study.study_runs(settings, "somewhere")
    assert len(runs) == len(settings["seeds"]) * (len(settings["arms"]) + len(settings["ablations"]))
    drawn = {}
    for one in runs:
        *prime, sparse = one.config.stages
        assert (sparse.kind, sparse.steps) == ("sparse-rl", 10)
        drawn[one.arm] = sum(s.steps * s.problems_per_step * s.group_size for s in prime if s.kind != "sft")
    assert {samples for arm, samples in drawn.items() if arm not in ("base", "sft")} == {12 * 16 * 16}


def test_the_picture_of_pass_at_1_has_the_cells_of_both_tables_once(tmp_path):
    page = (
        "| arm | seeds | stage 1 pass@1 | stage 2 pass@1 |\n| --- | --- | --- | --- |\n"
        "| sft | 3 | 0.0 [0.0, 2.8] | - |\n| process | 3 | 60.7 [47.2, 73.1] | 95.3 [87.2, 99.0] |\n\n"
        "| difference | seeds | stage 1 pass@1 | stage 2 pass@1 |\n"
        "| process - sft | 3, 3 | +60.7 [+50.6, +70.7] | - |\n\n"
        "| arm | seeds | x | stage 1 pass@1 |\n| process | 3 | - | 60.7 [47.2, 73.1] |\n"
    )
    measured = read_tables(page)
    assert measured == [
        Measured("sft", "stage 1 pass@1", 0.0, 0.0, 2.8),
        Measured("process", "stage 1 pass@1", 60.7, 47.2, 73.1),
        Measured("process", "stage 2 pass@1", 95.3, 87.2, 99.0),
    ]
    draw(measured, tmp_path / "pass.svg")
    assert (tmp_path / "pass.svg").read_text().startswith("<?xml")
