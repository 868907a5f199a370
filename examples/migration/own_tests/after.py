import json

from confluent_kafka import Consumer

import kbatch


def publish(producer, order):
    envelope = kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"])
    producer.send_batch("orders", [envelope]).raise_for_errors()


def test_publish(kafka_cluster):
    servers = {"bootstrap.servers": kafka_cluster.bootstrap_servers}
    with kbatch.Producer(servers, wire="raw") as producer:
        publish(producer, {"id": "order-1"})
    consumer = Consumer({**servers, "group.id": "test", "auto.offset.reset": "earliest"})
    consumer.subscribe(["orders"])
    message = consumer.poll(30)
    assert (message.key(), message.value()) == (b"order-1", b'{"id": "order-1"}')
    consumer.close()
