"""Every metric that a run writes, and what it means; docs/metrics.md is metrics_page.md and this table."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """A metric, or several of one form: parts in capital letters stand for others."""

    name: str
    meaning: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names that it stands for."""
        return re.compile("/".join(re.sub(r"[A-Z]+", r"[^/]+", part) for part in self.name.split("/")))


@dataclass(frozen=True)
class Section:
    """Metrics of one kind, with a line about when they are written."""

    title: str
    when: str
    metrics: tuple[Metric, ...]


SECTIONS = (
    Section(
        "Reward",
        "of stages that sample; shares are of all traces or groups of the step",
        (
            Metric(
                "reward/mean",
                "mean of the judge's or verifier's scores in [0, 1], or of the sums of a mixture (`reward`)",
            ),
            Metric("reward/mixed_groups", "share of groups whose traces have different rewards: only these teach"),
            Metric("reward/groups_with_success", "share of groups with a trace of score 1"),
            Metric("reward/abstained", "share of traces without a reward, which are out of the loss"),
            Metric("reward/term/NAME", "mean of the term of this name, where a stage mixes several (`reward`)"),
            Metric("reward/overlong_punishment", "mean penalty for length (`overlong_penalty`), at most 0"),
            Metric("abstained/REASON", "share of traces without a score for this reason, such as `too-long`"),
        ),
    ),
    Section(
        "Your own",
        "of stages that sample, where the config has `step_metrics`",
        (Metric("custom/NAME", "the result of a function of `step_metrics` under this name"),),
    ),
    Section(
        "Verifier",
        "of answers, also where a judge grades: where a policy games its judge, only the reward rises",
        (
            Metric("verifier/right", "share of right answers among those that were verified"),
            Metric("verifier/abstained", "share of traces that the verifier could not decide"),
            Metric("verifier/all_right_groups", "share of groups with only right answers"),
            Metric("verifier/all_wrong_groups", "share of groups without a right answer"),
        ),
    ),
    Section(
        "Judge",
        "of stages with a judge; a judgement is of a whole trace or of a segment",
        (
            Metric("judge/auroc", "how well scores order right above wrong answers; 0.5 is chance, 1 is perfect"),
            Metric("judge/asked", "questions that were sent to the judge"),
            Metric("judge/reasked", "questions that were sent again because the answer had no score"),
            Metric("judge/retried", "questions that were sent again because a server failed"),
            Metric("judge/hedged", "questions that a second server got because the first was slow"),
            Metric("judge/hedge-won", "hedged questions that the second server answered first"),
            Metric("judge/stored", "judgements that were in the store already"),
            Metric("judge/rubric_fallbacks", "problems judged without a rubric, because none could be built"),
            Metric("gate/misplacement_ARM", "of the judge's check before the step: share of pairs in the wrong order"),
            Metric("gate/separation", "of that check: how much the wrong reference costs"),
            Metric("gate/auroc", "of that check: how well scores order right above wrong traces"),
            Metric("gate/abstained", "of that check: share of traces without a score"),
            Metric("score/units", "number of judgements"),
            Metric("score/abstained", "share of judgements without a score"),
            Metric("score/mean", "mean score of the judgements that have one"),
            Metric("score/std_within_prompt", "mean over groups of the standard deviation of their scores"),
            Metric("score/GRADE", "share of the scores of grade 1, 2, 3, 4 or 5"),
            Metric("segments/mean", "judged segments of a trace"),
            Metric("segments/single_share", "share of traces with one segment"),
            Metric("segments/count_N", "share of traces with N segments, up to 10"),
            Metric("segments/count_over_N", "share of traces with more"),
            Metric("segments/first_token_share", "share of the tokens that are in first segments"),
        ),
    ),
    Section(
        "Length",
        "in tokens of the response",
        (
            Metric("length/mean", "mean"),
            Metric("length/max", "maximum"),
            Metric("length/overlong", "share of traces that the length limit cut off"),
            Metric("length/punished", "share of traces with an overlong punishment"),
            Metric("prompt/cached", "share of prompt tokens that servers had in their prefix cache"),
        ),
    ),
    Section(
        "Update",
        "means over response tokens, of the step's last update; in trackers the group is `update`",
        (
            Metric("loss", "the whole loss, divided as `loss.aggregation` says; of SFT the negative log-likelihood"),
            Metric("loss/policy", "its policy-gradient part"),
            Metric("entropy", "of the next token's distribution, in nats"),
            Metric("ratio", "of new and old probability"),
            Metric("clip_share", "share of tokens whose ratio was clipped"),
            Metric("grad_norm", "norm of the whole gradient before clipping"),
            Metric("learning_rate", "of the update"),
            Metric("tokens", "number of response tokens"),
            Metric("update_skipped", "1 where the gradient was not finite and was left out"),
            Metric("kl/old", "estimate (k3) of the KL divergence from the policy before the step, nats a token"),
            Metric("kl/ref", "the same from the policy at the stage's start (the reference policy)"),
            Metric("kl/teacher", "of self-distillation: from the teacher, which reads the reference solution"),
            Metric("rejected", "share of tokens that `loss.rejection` takes out of the loss"),
            Metric(
                "accepted/tokens", "tokens that are not rejected, where rejected ones do not count in the denominator"
            ),
            Metric("accepted/sequences", "traces with such tokens"),
            Metric("correction/weight", "mean importance weight of `loss.correction`"),
            Metric("correction/bounded", "share of tokens whose weight was bounded or set to 0"),
            Metric("correction/ratio/max", "largest ratio of trainer and sampler before that"),
            Metric("correction/effective", "share of tokens that equal weights of the same variance would need (Kish)"),
            Metric("padding/padded", "share of padding if samples were padded to the longest of their micro-batch"),
            Metric("padding/packed", "share of padding if samples were packed"),
        ),
    ),
    Section(
        "Trainer against sampler",
        "log-probs of the same tokens under the same weights; `sync.max_log_prob_gap` bounds the mean",
        (
            Metric("sampler_gap/mean", "mean absolute difference, nats a token"),
            Metric("sampler_gap/max", "largest difference"),
            Metric("sampler_gap/k3", "estimate of the KL divergence of trainer from sampler"),
            Metric("sampler_gap/tokens", "tokens that were compared, where the weights did not sample all"),
            Metric("staleness/mean", "of sampled tokens: optimizer steps since their weights (`max_staleness`)"),
            Metric("staleness/max", "the largest"),
            Metric("staleness/mixed", "share of traces whose weights changed in mid-generation"),
        ),
    ),
    Section(
        "Evaluation",
        "of the held-out problems, in the record of the step whose weights are measured; step 0 is the start",
        (
            Metric("evaluation/pass@K", "estimate of pass@K"),
            Metric("evaluation/pass@K/low", "lower end of its interval (`evaluation.confidence`)"),
            Metric("evaluation/pass@K/high", "upper end"),
            Metric("evaluation/length/mean", "mean length of the answers, tokens"),
            Metric("evaluation/length/overlong", "share of answers that the length limit cut off"),
            Metric("evaluation/abstained", "share of answers that the verifier could not decide"),
            Metric("evaluation/seconds", "how long it took"),
        ),
    ),
    Section(
        "Time",
        "in seconds as rank 0 sees them; `exprl waterfall` makes a table of them",
        (
            Metric("seconds/step", "the whole step, without its checkpoint"),
            Metric("seconds/sync", "new weights to the servers"),
            Metric("seconds/sample_and_grade", "waiting for traces and their scores"),
            Metric("seconds/log_probs", "log-probs of the reference and old policy"),
            Metric("seconds/train", "forward and backward passes, optimizer"),
            Metric("servers/serving", "sampling servers that serve at the step's end"),
            Metric("servers/lost", "sampling servers that were lost in the step"),
            Metric("loop/lag_max_s", "longest time that the loop which talks to servers was kept from it"),
            Metric("sync/seconds", "the whole weight sync"),
            Metric("sync/gather", "joining shards into buckets; parts overlap"),
            Metric("sync/quantize", "rounding to FP8 blocks (`sync.fp8`)"),
            Metric("sync/send", "sending"),
            Metric("sync/load", "loading into the servers' models, after sending"),
            Metric("sync/check", "checksums after the last bucket"),
            Metric("sync/gb", "size of the weights as they are sent, GB"),
            Metric("sync/moved_gb", "what crossed to each server, GB"),
            Metric("sync/gb_per_s", "`sync/gb` by the time without the check"),
        ),
    ),
    Section(
        "Memory",
        "of colocated runs, in GiB on a device of rank 0 at the start of a phase, `sampling` or `learning`",
        (
            Metric("memory/PHASE/PART", "of the trainer's `weights`, `gradients` or `optimizer`"),
            Metric("memory/PHASE/asleep", "of the side that is asleep"),
            Metric("memory/servers_slept", "1 where the servers released their memory"),
        ),
    ),
)


def undocumented(names: Iterable[str]) -> list[str]:
    """Return those of `names` that no entry stands for."""
    patterns = [metric.pattern for section in SECTIONS for metric in section.metrics]
    return sorted({name for name in names if not any(pattern.fullmatch(name) for pattern in patterns)})


def page() -> str:
    """Return the page as Markdown."""
    lines = [(Path(__file__).parent / "metrics_page.md").read_text(encoding="utf-8")]
    for section in SECTIONS:
        lines += [f"## {section.title}", "", f"{section.when[0].upper()}{section.when[1:]}.", ""]
        lines += ["| metric | meaning |", "|---|---|"]
        lines += [f"| `{metric.name}` | {metric.meaning} |" for metric in section.metrics]
        lines.append("")
    return "\n".join(lines)
