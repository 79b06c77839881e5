"""Run by test_context_parallel.py on four processes: the same work packed, padded, and cut by context parallelism."""

from helpers.layout_learning import learn
from helpers.ranks import Ranks

from exprl_megatron.config.policy import Layout

LAYOUTS = {
    "TP1": Layout(),
    "CP2": Layout(cp=2),
    "CP4": Layout(cp=4),
    "CP2xTP2+SP": Layout(cp=2, tp=2, sequence_parallel=True),
    "CP2xPP2": Layout(cp=2, pp=2),
    "CP2xDP2": Layout(cp=2, dp=2),
}
OTHERS = {
    "CP2 recompute full": (Layout(cp=2), {"recompute": "full"}, {}),
    "CP2 recompute selective": (Layout(cp=2), {"recompute": "selective"}, {}),
    "CP2xPP2xVPP2": (Layout(cp=2, pp=2, vpp=2), {}, {}),
    "CP2xTP2": (Layout(cp=2, tp=2), {}, {}),
    "CP2xDP2 not distributed": (Layout(cp=2, dp=2), {}, {"distributed": False}),
    "CP2 one by one": (Layout(cp=2), {"micro_batch_tokens": 1, "log_prob_chunk": None}, {}),
}


def main() -> None:
    ranks = Ranks()
    models = ranks.arguments["models"]
    for packing in (True, False):
        for name, layout in LAYOUTS.items():
            work = lambda _, la=layout, p=packing: learn(models["qwen3"], la, {"packing": p}, {})  # noqa: E731
            ranks.within(layout, work, f"qwen3 {name} {'packed' if packing else 'padded'}")
    for name, (layout, settings, optimizer) in OTHERS.items():
        work = lambda _, la=layout, s=settings, o=optimizer: learn(models["qwen3"], la, s, o)  # noqa: E731
        ranks.within(layout, work, f"qwen3 {name}")
    export = ranks.out / "llama"
    ranks.within(Layout(cp=2), lambda _: learn(models["llama"], Layout(cp=2), {}, {}, export), "llama CP2")
    ranks.finish()


if __name__ == "__main__":
    main()
