"""What judge failures do to the expected gradient, by exact enumeration: every group of traces, every pattern of
failures, through the code that trains (scores, estimator, padded batch, objective, denominator).

The policy writes one of three traces of one or two tokens. Failures are independent of the traces, with probability
FAILURE each. What holds, and is tested:

* given which n of K traces were judged, a group counts exactly as one of n traces without failures (any estimator);
* so leave-one-out has the expected gradient of no failures exactly wherever a comparison was possible (n >= 2);
* mean-centring has it up to the factor E[1 - 1/n] / (1 - 1/K): its length, not its direction;
* the group-normalized one has it only nearly, as its std depends on n, and the better the larger K is;
* "failure = reward 0" has 1 - FAILURE of it, or less, at any K, and invents a gradient where failures depend on the
  trace.
"""

import itertools
import math

import pytest
import torch

from exprl_megatron.algorithms.advantages import advantage_fn
from exprl_megatron.algorithms.aggregation import denominator_of
from exprl_megatron.algorithms.batch import TrainSample, pad
from exprl_megatron.algorithms.objective import policy_objective
from exprl_megatron.algorithms.scores import group_scores
from exprl_megatron.config.losses import Aggregation, LossConfig
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored

FAILURE = 0.2
TRACES = ((0,), (1, 0), (1, 1))
SCORES = (0.25, 1.0, 0.5)
K = 3
PER_GROUP = ("group-normalized", "mean-centered", "leave-one-out")


def _logits() -> torch.Tensor:
    """Of the first token, and of the second after a 1."""
    return torch.tensor([[0.4, -0.3], [-0.2, 0.5]], dtype=torch.float64, requires_grad=True)


def _log_prob(logits: torch.Tensor, trace: tuple[int, ...]) -> torch.Tensor:
    return logits.log_softmax(-1)[range(len(trace)), trace].sum()


def _true_gradient(scores=SCORES) -> torch.Tensor:
    """Of the expected score."""
    logits = _logits()
    expected = sum(score * _log_prob(logits, trace).exp() for score, trace in zip(scores, TRACES, strict=True))
    return torch.autograd.grad(expected, logits)[0]


def _loss(
    logits: torch.Tensor,
    groups: list[list[tuple[int, Judgement]]],
    name: str,
    aggregation: Aggregation = "sequence-sum",
) -> torch.Tensor | float:
    """What an update minimizes: groups of (index of a trace, judgement), all of one size."""
    pairs = [group_scores([judgement for _, judgement in group], [False] * len(group)) for group in groups]
    advantages = advantage_fn(name)(*(torch.stack(tensors) for tensors in zip(*pairs, strict=True)))
    sequences = [
        TrainSample((9,), TRACES[index], (advantage,) * len(TRACES[index]))
        for group, row in zip(groups, advantages.tolist(), strict=True)
        for (index, judgement), advantage in zip(group, row, strict=True)
        if isinstance(judgement, Scored)
    ]
    if not sequences:
        return 0.0
    micro = pad(sequences, 3)
    table = logits.log_softmax(-1)
    log_probs = torch.stack([table[:, 0], table[:, 1]])[micro.targets[:, :2], torch.arange(2)]
    objective = policy_objective(LossConfig(kl_coefficient=0.0, aggregation=aggregation))
    loss, _ = objective(torch.nn.functional.pad(log_probs, (0, 1)), torch.zeros(micro.mask.shape), micro)
    return loss / denominator_of(aggregation, sequences, 2)


def _verdicts(indices, failed, scores=SCORES, as_zero=False) -> list[tuple[int, Judgement]]:
    lost = Scored(0.0) if as_zero else Abstained("timeout")
    return [(index, lost if fails else Scored(scores[index])) for index, fails in zip(indices, failed, strict=True)]


def _expected_step(
    name, size, patterns, scores=SCORES, as_zero=False, fails_with=None, aggregation="sequence-sum"
) -> torch.Tensor:
    """Minus the expected gradient of the loss: all groups of `size` traces, under the given patterns of failures.

    A pattern is weighed by its probability; `fails_with(trace index)` makes that depend on the trace.
    """
    logits = _logits()
    prior = [_log_prob(logits, trace).exp().item() for trace in TRACES]
    probability = fails_with or (lambda index: FAILURE)
    total, weight = 0.0, 0.0
    for indices in itertools.product(range(len(TRACES)), repeat=size):
        for failed in patterns:
            chances = [
                probability(i) if fails else 1 - probability(i) for i, fails in zip(indices, failed, strict=True)
            ]
            chance = math.prod(prior[i] for i in indices) * math.prod(chances)
            if chance:
                total = total + chance * _loss(logits, [_verdicts(indices, failed, scores, as_zero)], name, aggregation)
                weight += chance
    return -torch.autograd.grad(total, logits)[0] / weight


def _patterns(size: int, judged=None) -> list[tuple[bool, ...]]:
    """All patterns of failures, or those that leave so many traces judged."""
    patterns = itertools.product((False, True), repeat=size)
    return [pattern for pattern in patterns if judged is None or size - sum(pattern) in judged]


def _chance_of(judged: int, size: int) -> float:
    return math.comb(size, judged) * (1 - FAILURE) ** judged * FAILURE ** (size - judged)


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # The micro-batch is float32.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PER_GROUP)
def test_a_group_with_failures_is_a_smaller_group_without(name):
    _close(_expected_step(name, K, _patterns(K, [2])), _expected_step(name, 2, [(False,) * 2]))


def test_with_leave_one_out_the_expected_gradient_is_that_without_failures():
    _close(_expected_step("leave-one-out", K, [(False,) * K]), _true_gradient())
    _close(_expected_step("leave-one-out", K, _patterns(K, range(2, K + 1))), _true_gradient())
    # Groups with one trace judged or none have no gradient; of sixteen traces that is as good as never.
    comparable = sum(_chance_of(n, K) for n in range(2, K + 1))
    _close(_expected_step("leave-one-out", K, _patterns(K)), comparable * _true_gradient())
    assert sum(_chance_of(n, 16) for n in (0, 1)) < 1e-9


@pytest.mark.parametrize(
    ("aggregation", "exact"), [("sequence-mean", True), ("constant-length", True), ("token-mean", False)]
)
def test_what_divides_by_sequences_keeps_the_expected_gradient_and_the_token_mean_nearly(aggregation, exact):
    without = _expected_step("leave-one-out", K, [(False,) * K], aggregation=aggregation)
    comparable = _patterns(K, range(2, K + 1))
    found = _expected_step("leave-one-out", K, comparable, aggregation=aggregation)
    error = float((found - without).norm() / without.norm())
    assert error < 1e-5 if exact else 1e-3 < error < 0.05


def test_mean_centring_changes_its_length_by_a_known_factor_and_never_its_direction():
    _close(_expected_step("mean-centered", K, [(False,) * K]), (1 - 1 / K) * _true_gradient())
    factor = sum(_chance_of(n, K) * (1 - 1 / n) for n in range(1, K + 1))
    _close(_expected_step("mean-centered", K, _patterns(K)), factor * _true_gradient())
    of_sixteen = sum(_chance_of(n, 16) * (1 - 1 / n) for n in range(1, 17)) / (1 - 1 / 16)
    assert 0.98 < of_sixteen < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean-centered", "leave-one-out"])
def test_problems_keep_their_equal_weight_where_failures_thin_their_groups_unequally(name):
    logits, scores = _logits(), (SCORES, (1.0, 0.0, 0.75))
    prior = [_log_prob(logits, trace).exp().item() for trace in TRACES]
    total = 0.0
    for indices in itertools.product(range(len(TRACES)), repeat=4):
        for failed in _patterns(4):
            chance = math.prod(prior[i] for i in indices)
            chance *= math.prod(FAILURE if fails else 1 - FAILURE for fails in failed)
            halves = (slice(0, 2), slice(2, 4))
            groups = [_verdicts(indices[h], failed[h], s) for h, s in zip(halves, scores, strict=True)]
            total = total + chance * _loss(logits, groups, name)
    found = -torch.autograd.grad(total, logits)[0]
    mean = (_true_gradient(scores[0]) + _true_gradient(scores[1])) / 2
    _close(found / found.norm(), mean / mean.norm())


@pytest.mark.parametrize("name", PER_GROUP)
def test_failure_as_reward_zero_does_not_have_the_gradient_without_failures(name):
    without = _expected_step(name, K, [(False,) * K])
    as_zero = _expected_step(name, K, _patterns(K), as_zero=True)
    assert (as_zero - without).norm() > 0.15 * without.norm()


def test_failure_as_reward_zero_shrinks_an_unscaled_gradient_by_the_share_of_failures():
    _close(_expected_step("leave-one-out", K, _patterns(K), as_zero=True), (1 - FAILURE) * _true_gradient())


@pytest.mark.slow
def test_the_larger_the_group_the_less_failures_matter_to_grpo_and_as_reward_zero_they_always_do():
    errors = {}
    for size in (4, 8, 16):
        without = _expected_by_counts("group-normalized", size, failure=0.0)
        for as_zero in (False, True):
            found = _expected_by_counts("group-normalized", size, FAILURE, as_zero)
            errors[size, as_zero] = float((found - without).norm() / without.norm())
    assert errors[4, False] > errors[8, False] > errors[16, False]
    assert errors[16, False] < 0.04
    assert min(errors[size, True] for size in (4, 8, 16)) > 0.3


@pytest.mark.slow
def test_both_ways_to_enumerate_agree():
    for as_zero in (False, True):
        found = _expected_step("group-normalized", K, _patterns(K), as_zero=as_zero)
        _close(_expected_by_counts("group-normalized", K, FAILURE, as_zero), found)


@pytest.mark.parametrize("name", PER_GROUP)
def test_where_long_traces_fail_more_often_reward_zero_teaches_shortness_and_abstaining_teaches_nothing(name):
    equal = (0.5,) * len(TRACES)

    def fails_with(index: int) -> float:
        return FAILURE * len(TRACES[index])

    abstained = _expected_step(name, K, _patterns(K), equal, fails_with=fails_with)
    as_zero = _expected_step(name, K, _patterns(K), equal, as_zero=True, fails_with=fails_with)
    _close(abstained, torch.zeros(2, 2, dtype=torch.float64))
    shorter = as_zero[0, 0] - as_zero[0, 1]
    assert shorter > 0.02


def _expected_by_counts(name: str, size: int, failure: float, as_zero: bool = False) -> torch.Tensor:
    """As _expected_step, for groups too large to list: by how often each trace comes, judged and not."""
    logits, kinds = _logits(), 2 * len(TRACES)
    log_probs = [_log_prob(logits, trace) for trace in TRACES]
    gradients = torch.stack([torch.autograd.grad(value, logits, retain_graph=True)[0] for value in log_probs])
    prior = torch.stack(log_probs).exp().detach()
    chances = torch.cat([prior * (1 - failure), prior * failure])
    bars = itertools.combinations(range(size + kinds - 1), kinds - 1)
    counts = [[b - a - 1 for a, b in itertools.pairwise((-1, *places, size + kinds - 1))] for places in bars]
    kind = torch.stack([torch.arange(kinds).repeat_interleave(torch.tensor(row)) for row in counts])
    orders = torch.tensor([math.factorial(size) / math.prod(map(math.factorial, row)) for row in counts])
    weight = orders * chances[kind].prod(-1)
    trace, failed = kind % len(TRACES), kind >= len(TRACES)
    values = torch.tensor(SCORES, dtype=torch.float64)[trace].masked_fill(failed, 0.0)
    valid = torch.ones_like(failed) if as_zero else ~failed
    advantages = advantage_fn(name)(values, valid)
    share = weight / valid.sum(-1).clamp(min=1)
    return torch.einsum("g,gk,gkxy->xy", share, advantages, gradients[trace])
