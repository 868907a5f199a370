import json

from confluent_kafka import Producer


def send_orders(config, orders):
    producer = Producer(config)
    for order in orders:
        headers = [("customer", order["customer"]), ("seen", None), ("seen", b"\x01")]
        if order["quantity"] == 0:  # withdrawn: a tombstone
            producer.produce("orders", None, order["id"], headers=headers)
        else:
            producer.produce(
                "orders",
                json.dumps(order).encode(),
                order["id"],
                partition=order["shop"],
                timestamp=order["placed_ms"],
                headers=headers,
            )
        producer.poll(0)
    producer.flush()
