"""Run by test_smollm.py on three processes: log-probs of real text under real weights."""

from helpers.ranks import Ranks

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.policy.policy import Policy

LAYOUTS = {"TP1": Layout(), "TP3": Layout(tp=3), "PP2": Layout(pp=2)}


def main() -> None:
    ranks = Ranks()
    batch = [TrainSample(tuple(prompt), tuple(response)) for prompt, response in ranks.arguments["batch"]]
    for name, layout in LAYOUTS.items():

        def work(_, layout=layout):
            config = PolicyConfig(model=ranks.arguments["model"], layout=layout, log_prob_chunk=32)
            return [row.tolist() for row in Policy(config, seed=0).log_probs(batch, 1.0)]

        ranks.within(layout, work, name)
    ranks.finish()


if __name__ == "__main__":
    main()
