import json

from confluent_kafka import KafkaException, Producer


def publish(producer, order):
    errors = []
    value = json.dumps(order).encode()
    producer.produce("orders", value, order["id"], on_delivery=lambda error, _: errors.append(error))
    producer.flush()
    if errors[0] is not None:
        raise KafkaException(errors[0])


def send_orders(config, orders):
    producer = Producer(config)
    for order in orders:
        publish(producer, order)
