"""The process behind ``MockCluster(process=True)``: ``python -m kbatch.testing._server BROKERS``.

Reads calls from standard input and answers them on standard output, a line of JSON each; `ProcessBackend` describes
them. Ends at the end of its input.
"""

import gc
import json
import os
import sys
from typing import Any

from kbatch.testing._errors import MockClusterError


def _error(error: Exception) -> list[Any]:
    if isinstance(error, MockClusterError):
        return [MockClusterError.__name__, [str(error), error.code, error.name]]
    if type(error) in (OverflowError, TypeError, ValueError):
        return [type(error).__name__, error.args]
    kind = ValueError if isinstance(error, ValueError) else MockClusterError
    return [kind.__name__, [f"{type(error).__name__}: {error}"]]


def main() -> None:
    gc.freeze()  # what is imported stays: its end does not search it for garbage
    # Replies have a descriptor to themselves: whatever else prints, goes to standard error.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def reply(request_id: int, **result: Any) -> None:
        replies.write(json.dumps({"id": request_id, **result}).encode() + b"\n")
        replies.flush()

    try:
        from kbatch.testing._mock import Cluster

        cluster = Cluster(int(sys.argv[1]))
    except Exception as error:
        reply(0, error=_error(error))
        return
    try:
        reply(0, result=None)
        for line in sys.stdin.buffer:
            request = json.loads(line)
            try:
                result = getattr(cluster, request["call"])(*request["args"])
            except Exception as error:
                reply(request["id"], error=_error(error))
            else:
                reply(request["id"], result=result)
    except BrokenPipeError:  # nobody is left to answer
        pass
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
