"""One producer for all workers of a preloaded WSGI application: made before the fork, used after it.

    KAFKA=localhost:9092 gunicorn --chdir examples --preload --workers 2 --threads 4 gunicorn_preload:app
    curl --data-binary @orders.jsonl http://localhost:8000

With ``--preload`` this module is imported once, before the workers are forked. A producer starts at its first use, so
each worker has threads and connections of its own. A worker that ends sends what is in flight first. Whoever must use a
producer at import, or in a hook that runs in the master, looks at gunicorn_post_fork.py.
"""

import os

import kbatch

producer = kbatch.Producer({"bootstrap.servers": os.environ["KAFKA"]})


def app(environ, start_response):
    lines = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).splitlines()
    report = producer.send_batch("orders", [kbatch.Envelope(data=line) for line in lines])
    start_response("200 OK" if report else "503 Service Unavailable", [("Content-Type", "text/plain")])
    return [f"process {os.getpid()}: {report.acked} of {len(lines)} acknowledged\n".encode()]
