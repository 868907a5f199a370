"""A program of its own, as a container runs it: reads lines, sends them, and ends in order when it is told to.

    KAFKA=localhost:9092 python examples/shutdown_worker.py < events.jsonl

Process 1 of a container ignores SIGTERM unless it handles it, and kbatch handles no signals: without the handler
Kubernetes waits for terminationGracePeriodSeconds and kills, and what is buffered is lost.
"""

import logging
import os
import signal
import sys

import kbatch

topic = kbatch.KafkaTopic("events", kbatch.SenderMode.BUFFERED, config={"bootstrap.servers": os.environ["KAFKA"]})
logging.basicConfig(level=logging.INFO)
log = logging.getLogger("worker")


def stop(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one does not break off the closing
    sys.exit()


def main():
    sender = topic.create_sender()
    signal.signal(signal.SIGTERM, stop)
    try:
        for line in sys.stdin.buffer:
            sender.send(kbatch.Envelope(data=line.rstrip()))
    finally:
        log.info("Closing the sender, %d envelopes to go", len(sender))
        try:
            sender.close(timeout=float(os.environ.get("CLOSE_TIMEOUT_S", "20")))
        except kbatch.UndeliveredError as error:
            log.error("%d envelopes were not sent", error.count)
            sys.exit(1)


if __name__ == "__main__":
    main()
