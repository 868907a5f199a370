import json

from confluent_kafka import Producer


def send_orders(config, orders, timeout_s=10):
    producer = Producer(config)
    try:
        for order in orders:
            producer.produce("orders", json.dumps(order).encode(), order["id"])
            producer.poll(0)
    finally:
        left = producer.flush(timeout_s)
    if left:
        raise RuntimeError(f"{left} messages were not delivered")
