"""Takes events without waiting for Kafka; a worker that ends sends first what it has buffered.

    KAFKA=localhost:9092 gunicorn --chdir examples -c examples/shutdown_gunicorn_conf.py shutdown_gunicorn:app
    curl --data-binary @events.jsonl http://localhost:8000

Works with and without ``--preload``: a sender starts at its first use, so one that is made before the fork is each
worker's own after it. Whoever sends in the master too has to make another one in ``post_fork``.
"""

import os

import kbatch

topic = kbatch.KafkaTopic("events", kbatch.SenderMode.BUFFERED, config={"bootstrap.servers": os.environ["KAFKA"]})
sender = topic.create_sender()


def app(environ, start_response):
    lines = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).splitlines()
    try:
        for line in lines:
            sender.send(kbatch.Envelope(data=line), timeout=5)
    except kbatch.SenderError as error:  # full, since Kafka does not keep up, or closed
        start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
        return [f"process {os.getpid()}: {error}\n".encode()]
    start_response("202 Accepted", [("Content-Type", "text/plain")])
    return [f"process {os.getpid()}: {len(lines)} accepted\n".encode()]
