from confluent_kafka.schema_registry.avro import AvroSerializer

import kbatch

SCHEMA = """{"type": "record", "name": "Order", "fields": [
    {"name": "id", "type": "string"}, {"name": "customer", "type": "string"}, {"name": "quantity", "type": "long"}]}"""


def send_orders(config, orders, registry):
    with kbatch.Producer(config, wire="raw", encoder=AvroSerializer(registry, SCHEMA)) as producer:
        envelopes = [kbatch.Envelope(order, key=order["id"]) for order in orders]
        producer.send_batch("orders", envelopes).raise_for_errors()
