"""Is the final answer of a trace right? math-verify in processes of its own, each call with a hard time limit."""

import asyncio
import json
import os
import queue
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rewards.extraction import extract_answer

START_DEADLINE_S = 120.0
DEADLINE_S = 5.0


class MathVerifier:
    """Compares answers in `workers` warm processes; a process that hangs is killed and replaced.

    Works from any event loop; `close` ends the processes, and so does the end of this process.
    """

    def __init__(self, workers: int = 1):
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="math-verifier")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker())

    async def verify(self, answer: str, trace_text: str, deadline_s: float = DEADLINE_S) -> Judgement:
        """1.0 where the trace's final answer equals `answer`, else 0.0; the evidence is the answer found.

        A trace without an answer gets 0; one that the length limit cut off after a right answer gets 1.
        Abstains with `verifier-timeout` where the comparison takes longer than `deadline_s`, and with
        `verifier-error` where math-verify fails. Raises RuntimeError where no process can be started.
        """
        found = extract_answer(trace_text)
        if found is None:
            return Scored(0.0, "no answer")
        loop = asyncio.get_running_loop()
        reply = await loop.run_in_executor(self._threads, self._compare, answer, found, deadline_s)
        if "equal" in reply:
            return Scored(float(reply["equal"]), found)
        return Abstained(reply["reason"], f"{found}: {reply['error']}")

    def close(self) -> None:
        """End the processes; comparisons under way are finished first."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().kill()

    def __enter__(self) -> "MathVerifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _compare(self, gold: str, answer: str, deadline_s: float) -> dict:
        worker = self._idle.get()
        try:
            worker.wait_until_warm()
            return worker.ask({"gold": gold, "answer": answer, "limit_s": deadline_s}, deadline_s)
        except TimeoutError:
            worker.kill()
            return {"reason": "verifier-timeout", "error": f"not compared within {deadline_s:g} s"}
        except EOFError as error:
            worker.kill()
            return {"reason": "verifier-error", "error": str(error)}
        finally:
            self._idle.put(worker if worker.alive else _Worker())


class _Worker:
    """One process of `rewards.math_worker`; it warms up while nobody waits for it."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "exprl_megatron.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._unread = b""
        self._warm = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_warm(self) -> None:
        if self._warm:
            return
        try:
            self._warm = bool(self._reply(START_DEADLINE_S)["ready"])
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise RuntimeError(f"the answer verifier's process did not start: {error}") from error

    def ask(self, request: dict, deadline_s: float) -> dict:
        """The reply to `request`; TimeoutError past the deadline, EOFError where the process died."""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:
            raise EOFError("the verifier's process died") from error
        return self._reply(deadline_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _reply(self, deadline_s: float) -> dict:
        end = time.monotonic() + deadline_s
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no reply within {deadline_s:g} s")
            piece = os.read(pipe, 65536)
            if not piece:
                raise EOFError("the verifier's process died")
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)
