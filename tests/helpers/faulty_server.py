"""A server that listens, speaks SGLang's and OpenAI's forms, and fails as requested."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

from aiohttp import web

from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint
from helpers.clock import pass_time
from helpers.judge_parts import UNKNOWN

VERDICT = "Score: 4"


class FaultyServer:
    """Does with its requests, in turn, what `script` says, and then answers `Score: 4` (nothing, to a request for
    no tokens).

    A number is an HTTP status to refuse with, a string the answer (to each question, where several are asked at once),
    a list the answers to several, bytes the whole reply, a tuple the text, status and headers of one, "drop" cuts the
    connection, "hang" never answers, "late" neither, and deadlines
    of at most 10 s pass. `counts` has `requests`, `running`, `most-running` and `abandoned` (the client
    hung up), and `questions` and `most-questions`, which are in flight.
    """

    def __init__(self, *script, well=True):
        self.script = list(script)
        self.well = well
        self.counts = Counter()
        self.bodies, self.headers = [], []
        self.url = None

    async def generate(self, request):
        return await self._answered(request, self._generation)

    async def chat(self, request):
        return await self._answered(request, self._completion)

    async def health(self, request):
        return web.Response(status=200 if self.well else 503)

    async def _answered(self, request, form):
        body = await request.json()
        several = len(body["input_ids"]) if isinstance(body.get("sampling_params"), list) else None
        self.bodies.append(body)
        self.counts["questions"] += several or 1
        self.counts["most-questions"] = max(self.counts["most-questions"], self.counts["questions"])
        self.headers.append(request.headers)
        self.counts["requests"] += 1
        self.counts["running"] += 1
        self.counts["most-running"] = max(self.counts["most-running"], self.counts["running"])
        try:
            await asyncio.sleep(0.02)
            nothing = several is None and body.get("sampling_params", {}).get("max_new_tokens") == 0
            act = self.script.pop(0) if self.script else "" if nothing else VERDICT
            if act == "late":
                pass_time()
            if act in ("hang", "late"):
                await asyncio.sleep(60)
            if act == "drop":
                request.transport.abort()
            if isinstance(act, bytes):
                return web.Response(body=act, content_type="application/json")
            if isinstance(act, tuple):
                return web.Response(text=act[0], status=act[1], headers=act[2] if len(act) > 2 else None)
            if isinstance(act, int):
                return web.json_response({"error": {"message": f"status {act}"}}, status=act)
            if several is not None and not isinstance(act, dict):
                acts = act if isinstance(act, list) else [act] * several
                return web.json_response([each if isinstance(each, dict) else form(str(each)) for each in acts])
            return web.json_response(act if isinstance(act, dict) else form(str(act)))
        except asyncio.CancelledError:
            self.counts["abandoned"] += 1
            raise
        finally:
            self.counts["running"] -= 1
            self.counts["questions"] -= several or 1

    @staticmethod
    def _generation(text):
        meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 5, "cached_tokens": 0}
        ids = [UNKNOWN] if text else []
        return {
            "text": text,
            "output_ids": ids,
            "meta_info": meta
            | {
                "output_token_logprobs": [[-0.5, token, None] for token in ids],
                "weight_versions": [{"version": "v0", "start": 0, "end": len(ids)}],
            },
        }

    @staticmethod
    def _completion(text):
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


@asynccontextmanager
async def listening(*servers):
    """Starts them; each has its `url` then."""
    runners = []
    for server in servers:
        app = web.Application()
        app.router.add_post("/generate", server.generate)
        app.router.add_post("/v1/chat/completions", server.chat)
        app.router.add_get("/health", server.health)
        app.router.add_get("/v1/models", server.health)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


def sglang_client(server, name="judge-0"):
    return SGLangClient(server.url, name, deadline_s=30)


def endpoint(server, name="judge-0", api_key=None):
    return OpenAIEndpoint(f"{server.url}/v1", "the-model", name, api_key=api_key, deadline_s=30)
