import json

from confluent_kafka import Producer


def send_orders(config, orders):
    failed = []

    def on_delivery(error, message):
        if error is not None:
            failed.append((message.key().decode(), error.name()))

    producer = Producer(config)
    for order in orders:
        producer.poll(0)
        producer.produce("orders", json.dumps(order).encode(), order["id"], on_delivery=on_delivery)
    producer.flush()
    return failed
