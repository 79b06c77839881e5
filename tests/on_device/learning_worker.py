"""Run by learning.py's learn_in_layout in as many processes as the layout has ranks."""

from dataclasses import asdict

from helpers.ranks import Ranks

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig
from on_device.learning import REFERENCE_STEPS, learn, policy_of


def main() -> None:
    ranks = Ranks()
    layout, precision = Layout(**ranks.arguments["layout"]), PrecisionConfig(kind=ranks.arguments["precision"])

    def work(world) -> dict:
        return asdict(learn(precision, REFERENCE_STEPS, policy_of(precision, layout)))

    ranks.within(layout, work, "learned")
    ranks.finish()


if __name__ == "__main__":
    main()
