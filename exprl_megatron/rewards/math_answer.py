"""Verification of mathematical answers by math-verify in worker processes, with a hard time limit for each call."""

import asyncio
import queue
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rewards.extraction import extract_answer, extract_boxed_tail
from exprl_megatron.rewards.prime_answer import extract_prime_answer
from exprl_megatron.rewards.worker_process import WorkerProcess

START_DEADLINE_S = 120.0
DEADLINE_S = 5.0
CODE_DEADLINE_S = 1.0

MathVariant = Literal["recommended", "prime", "code"]
"""`code` is the released code's stage-2 reward: only a `\\boxed` counts, math-verify reads the text from it on, and
every failure (unreadable, empty, overlong, later than a second) scores 0 instead of an abstention.
`prime` is the reward of its first stage (prime_answer.py), in which every failure scores 0 too."""
EXTRACTION = {"recommended": extract_answer, "prime": extract_prime_answer, "code": extract_boxed_tail}


class MathVerifier:
    """Compares answers in `workers` processes that are kept running; a process that hangs is killed and replaced.

    It works from any event loop. The processes end with `close` or with this process.

    Args:
        workers: number of processes.
        variant: how answers are extracted and compared.
    """

    def __init__(self, workers: int = 1, variant: MathVariant = "recommended"):
        self._variant = variant
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="math-verifier")
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(_start())

    async def verify(self, answer: str, trace_text: str, deadline_s: float = DEADLINE_S) -> Judgement:
        """Score 1.0 where the trace's final answer equals `answer`, else 0.0; the evidence is the answer found.

        A trace without an answer scores 0; one that the length limit cut off after a right answer scores 1. Where
        math-verify fails, hangs or crashes on the answer, the trace scores 0 if `answer` alone can be read within
        `deadline_s` seconds; otherwise the verifier abstains with `verifier-timeout` or `verifier-error`.

        Raises:
            RuntimeError: no process can be started.
        """
        released = self._variant != "recommended"
        found = EXTRACTION[self._variant](trace_text)
        if found is None:
            return Scored(0.0, "no answer")
        if self._variant == "code":
            deadline_s = min(deadline_s, CODE_DEADLINE_S)
        request = {"gold": answer, "answer": found, "limit_s": deadline_s, "variant": self._variant}
        reply = await asyncio.get_running_loop().run_in_executor(self._threads, self._compare_with_retry, request)
        if "equal" in reply:
            return Scored(float(reply["equal"]), reply.get("evidence", found))
        evidence = f"{found}: {reply['error']}"
        return Scored(0.0, evidence) if released else Abstained(reply["reason"], evidence)

    def close(self) -> None:
        """End the processes after the running comparisons."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().kill()

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compare_with_retry(self, request: dict) -> dict:
        """Return the reply to `request`; if there is none in time, find out whether the trace's answer is the cause."""
        reply = self._compare(request)
        if "equal" in reply or request["variant"] != "recommended" or not reply.pop("lost", False):
            return reply
        if reply["reason"] == "verifier-error":
            # The process died. If it dies again, this answer is the cause.
            again = self._compare(request)
            if not again.pop("lost", False):
                return again
        if "equal" in self._compare(request | {"answer": None}):
            return {"equal": False, "evidence": f"{request['answer']}: {reply['error']}"}
        return reply

    def _compare(self, request: dict) -> dict:
        worker = self._idle.get()
        try:
            worker.wait_until_ready(START_DEADLINE_S)
            return worker.ask(request, request["limit_s"])
        except TimeoutError:
            worker.kill()
            error = f"not compared within {request['limit_s']:g} s"
            return {"reason": "verifier-timeout", "error": error, "lost": True}
        except EOFError as error:
            worker.kill()
            return {"reason": "verifier-error", "error": str(error), "lost": True}
        finally:
            self._idle.put(worker if worker.alive else _start())


def _start() -> WorkerProcess:
    """Start a process, which loads math-verify in the background."""
    return WorkerProcess([sys.executable, "-m", "exprl_megatron.rewards.math_worker"])
