import json
from unittest import mock

from confluent_kafka import Producer


def publish(producer, order):
    producer.produce("orders", json.dumps(order).encode(), order["id"])


def test_publish():
    producer = mock.Mock(spec=Producer)
    publish(producer, {"id": "order-1"})
    producer.produce.assert_called_once_with("orders", b'{"id": "order-1"}', "order-1")
