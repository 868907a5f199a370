import json

from confluent_kafka import SerializingProducer
from confluent_kafka.serialization import IntegerSerializer


def to_json(order, context):
    return json.dumps(order).encode()


def send_orders(config, orders):
    producer = SerializingProducer({**config, "key.serializer": IntegerSerializer(), "value.serializer": to_json})
    for order in orders:
        producer.produce("orders", key=order["shop"], value=order)
        producer.poll(0)
    producer.flush()
