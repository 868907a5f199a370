"""Each process of a prefork worker sends orders with a producer of its own.

KAFKA=localhost:9092 CELERY_BROKER=redis://localhost celery --workdir examples/migration/celery -A before worker
"""

import json
import os

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown
from confluent_kafka import KafkaException, Producer

app = Celery("orders", broker=os.environ["CELERY_BROKER"])
app.conf.broker_transport_options = json.loads(os.environ.get("CELERY_BROKER_OPTIONS", "{}"))


@worker_process_init.connect
def open_producer(**_):
    global producer
    producer = Producer({"bootstrap.servers": os.environ["KAFKA"]})


@worker_process_shutdown.connect
def close_producer(**_):
    producer.flush()


@app.task(name="send_order", acks_late=True, autoretry_for=(KafkaException,), retry_backoff=True)
def send_order(order):
    errors = []
    value = json.dumps(order).encode()
    producer.produce("orders", value, order["id"], on_delivery=lambda error, _: errors.append(error))
    producer.flush()
    if errors[0] is not None:
        raise KafkaException(errors[0])
