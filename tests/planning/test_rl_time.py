"""The model of a reinforcement-learning step: NeMo-RL's published steps, and closed forms of its parts."""

from statistics import median

import pytest
from validate_planner import architecture_of, published_rows, step_comparisons, weight_bytes

from exprl_megatron.errors import UserError
from exprl_megatron.planning.hardware import GPUS
from exprl_megatron.planning.rl_time import (
    PlannedStepTime,
    host_swap_time,
    judging_tail,
    judging_time,
    sampling_time,
    save_time,
)
from exprl_megatron.planning.serving_time import LengthDistribution, ServerHardware, iteration_seconds, prefill_seconds
from exprl_megatron.planning.targets import find_architecture

MODELS = published_rows()["models"]
LLAMA_8B, LLAMA_70B = architecture_of(MODELS["llama3-8b"]), architecture_of(MODELS["llama3-70b"])
H100 = GPUS["h100"]
SERVERS = ServerHardware(8, 1, H100)


@pytest.mark.parametrize(("model", "times"), [("qwen3-32b", 1), ("qwen3.5-27b", 16)])
def test_a_prompt_is_read_once_for_a_group_but_by_gated_delta_nets_once_for_each_trace(model, times):
    architecture = find_architecture(model)[0]
    servers, answers = ServerHardware(2, 4, H100), LengthDistribution(500, 4096)
    given = {"problems": 8, "prompt_tokens": 300}
    group = sampling_time(architecture, servers, traces=16, answers=answers, **given)
    assert group.prefill_s == pytest.approx(times * prefill_seconds(architecture, servers, 8 * 300 / 2, 300))
    judged = {"problems": 8, "judgements": 16, "shared_tokens": 300, "own_tokens": 0}
    assert judging_time(architecture, servers, answers=answers, **judged).prefill_s == pytest.approx(group.prefill_s)


def sample(servers=SERVERS, problems=64, traces=16, mean=1000, bound=4096):
    return sampling_time(
        LLAMA_8B, servers, problems=problems, traces=traces, prompt_tokens=200, answers=LengthDistribution(mean, bound)
    )


def judge(cached=True, problems=64, judgements=16):
    return judging_time(
        LLAMA_8B,
        SERVERS,
        problems=problems,
        judgements=judgements,
        shared_tokens=3000,
        own_tokens=1000,
        answers=LengthDistribution(20, 64),
        cached=cached,
    )


def test_published_steps_on_h100_are_met_within_a_third():
    found = [c for c in step_comparisons() if c.row["gpu"] == "h100"]
    assert sum(c.row["set"] == "calibration" for c in found) == 2
    others = [abs(c.error) for c in found if c.row["set"] != "calibration"]
    assert len(others) == 8
    assert median(others) <= 0.15
    assert max(others) <= 0.33


@pytest.mark.parametrize(("mean", "bound"), [(100, 4096), (2048, 4096), (3500, 4096)])
def test_lengths_have_the_mean_that_was_asked_for(mean, bound):
    """The mean of a length is the integral of the share that is longer."""
    lengths, pieces = LengthDistribution(mean, bound), 4096
    integral = sum(lengths.share_longer((i + 0.5) * bound / pieces) for i in range(pieces)) * bound / pieces
    assert integral == pytest.approx(mean, rel=1e-3)
    assert lengths.share_longer(lengths.expected_longest(1000)) == pytest.approx(1e-3, rel=1e-3)


def test_a_mean_beyond_the_bound_is_refused():
    with pytest.raises(UserError, match="mean length 5000"):
        sample(mean=5000)


def test_a_lone_answer_is_bound_by_reading_the_weights():
    """8B weights in BF16 over 3.35 TB/s: 4.8 ms at the full rate; fixed costs and the share of it come on top."""
    floor = weight_bytes(LLAMA_8B) / H100.hbm_bytes_per_s
    assert floor < iteration_seconds(LLAMA_8B, SERVERS, 1, 1) < 4 * floor


def test_the_number_of_iterations_is_the_longest_answer():
    few = sample(problems=8)
    assert few.concurrent == few.requests
    assert few.iterations == pytest.approx(LengthDistribution(1000, 4096).expected_longest(128))


def test_answers_that_do_not_fit_at_once_take_turns():
    crowded = sample(ServerHardware(1, 1, H100), problems=256)
    assert crowded.concurrent < crowded.requests
    turns, tail = 4096 * 1000 / crowded.concurrent, LengthDistribution(1000, 4096).expected_longest(4096) - 1000
    assert crowded.iterations == pytest.approx(turns + tail, rel=0.01)


def test_a_server_without_room_is_refused():
    with pytest.raises(UserError, match="weights do not fit"):
        sampling_time(
            LLAMA_70B,
            ServerHardware(8, 1, H100),
            problems=1,
            traces=1,
            prompt_tokens=10,
            answers=LengthDistribution(10, 20),
        )


def test_shared_prefixes_are_read_once():
    """Tokens to read: 64 x 3,000 + 1,024 x 1,000 against 1,024 x 4,000."""
    ratio = judge(cached=False).prefill_s / judge().prefill_s
    assert ratio == pytest.approx(1024 * 4000 / (64 * 3000 + 1024 * 1000), rel=1e-6)


def test_a_judge_on_its_own_devices_hides_behind_sampling():
    sampling, judging = sample(), judge()
    assert judging_tail(sampling, judging, own_devices=False) == judging.total_s
    assert judging_tail(sampling, judging, own_devices=True) <= judging.total_s


def test_one_step_off_takes_the_slower_side_and_the_new_weights():
    phases = {"sampling_s": 50.0, "judging_s": 5.0, "log_probs_s": 10.0, "training_s": 30.0, "reshard_s": 2.0}
    assert PlannedStepTime(**phases).total_s == 97.0
    assert PlannedStepTime(**phases, one_step_off=True).total_s == 57.0


def test_weights_are_as_large_as_published():
    assert weight_bytes(LLAMA_70B) == pytest.approx(141e9, rel=0.01)


def test_saving_and_swapping_are_bytes_over_bandwidth():
    assert save_time(1e12, 20e9) == 50.0
    assert host_swap_time(51.2e9, H100) == pytest.approx(1.0)
