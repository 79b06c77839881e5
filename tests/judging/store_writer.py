"""A process that keeps judgements until it is killed or done: `store_writer.py FILE FIRST LAST SCORE`.

It prints each key after `add_judgement` has returned.
"""

import sys
from pathlib import Path

from exprl_megatron.judging.content_key import content_key
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.judging.store import JudgementStore


def key_of(number: int) -> str:
    return content_key("judgement", number=number)


if __name__ == "__main__":
    file, first, last, score = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    with JudgementStore(file) as store:
        for number in range(first, last):
            store.add_judgement(key_of(number), {"text": f"trace {number} " * 40}, f"by {score}", Scored(score))
            print(key_of(number), flush=True)
