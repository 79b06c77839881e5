"""What the server of the reference policy is asked, and under which weights its answers count."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.errors import ServerError
from exprl_megatron.training.ref_scorer import RefScorer

SAMPLES = [TrainSample((1, 2), (3, 4, 5)), TrainSample((1,), (6,))]


class Client:
    """Scores under the weights of the last push; the later request is answered first."""

    name, url = "ref-0", "http://nowhere"

    def __init__(self):
        self.version, self.asked = None, []

    async def score(self, token_ids, first):
        self.asked.append((token_ids.tolist(), first))
        for _ in range(len(token_ids)):
            await asyncio.sleep(0)
        return SimpleNamespace(weight_version=self.version, log_probs=-token_ids[first:].astype(np.float32))


def scorer_of(client):
    def push(version):
        client.version = version

    coordinator = SimpleNamespace(broadcast_run=lambda start: asyncio.run(start()))
    return RefScorer(client, SimpleNamespace(push_weights=push), coordinator, 1.0)


def test_each_response_is_scored_behind_its_prompt_and_the_answers_are_in_the_order_of_the_samples():
    client = Client()
    scorer = scorer_of(client)
    scorer.begin_stage("prime")
    assert [found.tolist() for found in scorer.log_probs(SAMPLES)] == [[-3, -4, -5], [-6]]
    assert client.asked == [([1, 2, 3, 4, 5], 2), ([1, 6], 1)]
    assert client.version == "ref-prime"


def test_answers_under_the_weights_of_an_earlier_stage_are_refused():
    client = Client()
    scorer = scorer_of(client)
    scorer.begin_stage("prime")
    scorer.begin_stage("sparse")
    client.version = "ref-prime"
    with pytest.raises(ServerError, match=r"ref-0 .* scored under weight version ref-prime, not ref-sparse"):
        scorer.log_probs(SAMPLES)
