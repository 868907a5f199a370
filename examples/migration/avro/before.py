from confluent_kafka import Producer
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

SCHEMA = """{"type": "record", "name": "Order", "fields": [
    {"name": "id", "type": "string"}, {"name": "customer", "type": "string"}, {"name": "quantity", "type": "long"}]}"""


def send_orders(config, orders, registry):
    to_avro = AvroSerializer(registry, SCHEMA)
    context = SerializationContext("orders", MessageField.VALUE)
    producer = Producer(config)
    for order in orders:
        producer.produce("orders", to_avro(order, context), order["id"])
        producer.poll(0)
    producer.flush()
