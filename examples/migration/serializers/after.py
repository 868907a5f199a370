import json

from confluent_kafka.serialization import IntegerSerializer

import kbatch


def to_json(order, context):
    return json.dumps(order).encode()


def send_orders(config, orders):
    to_key = IntegerSerializer()
    with kbatch.Producer(config, wire="raw", encoder=to_json) as producer:
        envelopes = [kbatch.Envelope(order, key=to_key(order["shop"])) for order in orders]
        producer.send_batch("orders", envelopes).raise_for_errors()
