"""Tasks that do not wait for Kafka; a process of the pool that ends sends first what it has buffered.

    KAFKA=localhost:9092 CELERY_BROKER=redis://localhost celery --workdir examples -A shutdown_celery worker

A task is done before its events have reached Kafka: a process that is killed (a hard time limit, no memory) loses what
it has buffered. A task that must not be acknowledged before calls `flush`, as `record_safely` does.
"""

import json
import os

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown
from celery.utils.log import get_task_logger

import kbatch

app = Celery("events", broker=os.environ["CELERY_BROKER"])
app.conf.broker_transport_options = json.loads(os.environ.get("CELERY_BROKER_OPTIONS", "{}"))
topic = kbatch.KafkaTopic("events", kbatch.SenderMode.BUFFERED, config={"bootstrap.servers": os.environ["KAFKA"]})
log = get_task_logger(__name__)
sender = None


@worker_process_init.connect
def open_sender(**_):
    global sender
    sender = topic.create_sender()


@worker_process_shutdown.connect
def close_sender(**_):
    log.info("Closing the sender, %d envelopes to go", len(sender))
    try:
        sender.close(timeout=float(os.environ.get("CLOSE_TIMEOUT_S", "20")))
    except kbatch.UndeliveredError as error:
        log.error("%d envelopes were not sent", error.count)


@app.task
def record(events):
    for event in events:
        sender.send(kbatch.Envelope(event), timeout=5)


@app.task(acks_late=True, autoretry_for=(kbatch.KbatchError,), retry_backoff=True)
def record_safely(events):
    """Done when Kafka has the events; tried again when it has not, so that some may be there twice.

    `flush` raises UndeliveredError for what was given up, also for what another task of this process has sent.
    """
    record(events)
    if sender.flush(timeout=30):
        raise kbatch.SenderError("not everything was acknowledged within 30 s")
