"""Terms of a reward: `reward: [{term: judge}, {term: examples.reward_terms:FUNCTION, weight: 0.2}]` of a stage."""

from exprl_megatron.api import Problem, Trace


def boxed(problem: Problem, trace: Trace) -> float:
    """Return 1 where the trace states exactly one final answer in a box, else 0."""
    return float(trace.text.count("\\boxed{") == 1)


def repeated_lines(problem: Problem, trace: Trace) -> float:
    """Return the share of the trace's lines that repeat an earlier one; give it a negative weight."""
    lines = [line.strip() for line in trace.text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0
