"""A producer that is used before the fork, here to tell of the start: each worker needs one of its own.

    export KAFKA=localhost:9092
    gunicorn --chdir examples --preload -c examples/gunicorn_post_fork_conf.py gunicorn_post_fork:app
    curl --data-binary @orders.jsonl http://localhost:8000

Without ``-c`` the workers have the master's producer, whose threads are not in their process: `kbatch.ForkError`.
"""

import os

import kbatch


def make_producer():
    return kbatch.Producer({"bootstrap.servers": os.environ["KAFKA"]})


def app(environ, start_response):
    lines = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).splitlines()
    try:
        report = producer.send_batch("orders", [kbatch.Envelope(data=line) for line in lines])
    except kbatch.ForkError as error:
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [f"process {os.getpid()}: {error}\n".encode()]
    start_response("200 OK" if report else "503 Service Unavailable", [("Content-Type", "text/plain")])
    return [f"process {os.getpid()}: {report.acked} of {len(lines)} acknowledged\n".encode()]


producer = make_producer()
producer.send_batch("starts", [kbatch.Envelope({"process": os.getpid()})]).raise_for_errors()
