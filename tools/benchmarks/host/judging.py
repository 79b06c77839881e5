"""Traces judged by ten beginnings each: segments, prompts, tokens, requests, verdicts, store; answers are prepared."""

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.host.station import Station
from benchmarks.host.workload import Workload
from benchmarks.judging_load import JUDGE_DELAY_S, Load, judged, paced_server


def prepare(workload: Workload) -> Callable[[], object]:
    """Judges all traces at once; the judge that sends the answers is another process."""
    model, stack = str(workload.model), ExitStack()
    load = Load(workload.traces, workload.mean_tokens, AutoTokenizer.from_pretrained(model))
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    url = stack.enter_context(paced_server(load.replies(), "--delay", str(JUDGE_DELAY_S)))

    def judge() -> dict[str, float]:
        with stack:
            return asyncio.run(judged(load, model, url, None, Path(directory) / "s.sqlite"))

    return judge


STATION = Station("judging by prefixes", blocks=False, prepare=prepare)
