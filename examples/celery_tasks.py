"""One producer for all processes of a Celery worker with the prefork pool: made before the fork, used after it.

    KAFKA=localhost:9092 CELERY_BROKER=redis://localhost celery --workdir examples -A celery_tasks worker

A producer starts at its first use, so each process of the pool has threads and connections of its own. Celery ends
these processes without Python's atexit functions: whoever uses `submit` closes the producer in a signal's handler.
"""

import json
import os

from celery import Celery
from celery.signals import worker_process_shutdown

import kbatch

app = Celery("orders", broker=os.environ["CELERY_BROKER"])
app.conf.broker_transport_options = json.loads(os.environ.get("CELERY_BROKER_OPTIONS", "{}"))
producer = kbatch.Producer({"bootstrap.servers": os.environ["KAFKA"]})


@app.task(acks_late=True, autoretry_for=(kbatch.KbatchError,), retry_backoff=True)
def send_orders(orders):
    """Done when Kafka has the orders; tried again when it has not, so that some may be there twice."""
    producer.send_batch("orders", [kbatch.Envelope(order, key=str(order["id"])) for order in orders]).raise_for_errors()


@app.task
def note(events):
    """Does not wait. What is still in flight is sent when the process ends."""
    producer.submit("events", [kbatch.Envelope(event) for event in events])


@worker_process_shutdown.connect
def close_producer(**_):
    producer.close()
