"""Each process of a prefork worker sends orders with a producer of its own.

KAFKA=localhost:9092 CELERY_BROKER=redis://localhost celery --workdir examples/migration/celery -A before worker
"""

import json
import os

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

import kbatch

app = Celery("orders", broker=os.environ["CELERY_BROKER"])
app.conf.broker_transport_options = json.loads(os.environ.get("CELERY_BROKER_OPTIONS", "{}"))


@worker_process_init.connect
def open_producer(**_):
    global producer
    producer = kbatch.Producer({"bootstrap.servers": os.environ["KAFKA"]}, wire="raw")


@worker_process_shutdown.connect
def close_producer(**_):
    producer.close()


@app.task(name="send_order", acks_late=True, autoretry_for=(kbatch.KbatchError,), retry_backoff=True)
def send_order(order):
    value = json.dumps(order).encode()
    producer.send_batch("orders", [kbatch.Envelope(data=value, key=order["id"])]).raise_for_errors()
