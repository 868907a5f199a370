import json
import threading

from confluent_kafka import Producer


def send_orders(config, orders):  # config has stats_cb, error_cb, throttle_cb, oauth_cb or logger
    producer = Producer(config)
    stopped = threading.Event()

    def poll():
        while not stopped.is_set():
            producer.poll(0.1)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        for order in orders:
            producer.produce("orders", json.dumps(order).encode(), order["id"])
        producer.flush()
    finally:
        stopped.set()
        poller.join()
