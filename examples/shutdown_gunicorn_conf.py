"""gunicorn's configuration for shutdown_gunicorn.py: the last thing that a worker does is to close its sender.

Requests that are under way and `CLOSE_TIMEOUT_S` have to fit into `graceful_timeout`, after which the master kills.
"""

import os

workers = 2
threads = 4
graceful_timeout = 30
timeout = 30  # a worker that is replaced while gunicorn goes on may close its sender for no longer than this
CLOSE_TIMEOUT_S = float(os.environ.get("CLOSE_TIMEOUT_S", "20"))


def worker_exit(server, worker):
    from kbatch import UndeliveredError
    from shutdown_gunicorn import sender

    server.log.info("Closing the sender, %d envelopes to go", len(sender))
    try:
        sender.close(timeout=CLOSE_TIMEOUT_S)
    except UndeliveredError as error:
        server.log.error("%d envelopes were not sent", error.count)
