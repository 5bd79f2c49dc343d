"""One side of the comparison as a process: a JSON request a line, a JSON reply a line.

{"do": "decode", "context": n, "tokens": m} -> {"seconds": [of each token]}
{"do": "prefill", "tokens": n}              -> {"seconds": [of the whole]}
{"do": "bandwidth", "read_bytes": n}        -> {"seconds": [of each reading]}

What a side prints for itself goes to the error stream.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(answers: Mapping[str, Callable[..., list[float]]]) -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        seconds = answers[request.pop("do")](**request)
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)
