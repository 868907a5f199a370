import json

from confluent_kafka import Producer


def send_orders(config, orders):
    producer = Producer(config)
    for order in orders:
        while True:
            try:
                producer.produce("orders", json.dumps(order).encode(), order["id"])
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    producer.flush()
