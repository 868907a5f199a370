import json

import kbatch


def publish(producer, order):
    envelope = kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"])
    producer.send_batch("orders", [envelope]).raise_for_errors()


def send_orders(config, orders):
    with kbatch.Producer(config, wire="raw") as producer:
        for order in orders:
            publish(producer, order)
