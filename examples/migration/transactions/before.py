import json

from confluent_kafka import KafkaException, Producer


def send_orders(config, orders):
    producer = Producer({**config, "transactional.id": "orders"})
    producer.init_transactions()
    while True:
        producer.begin_transaction()
        try:
            for order in orders:
                producer.produce("orders", json.dumps(order).encode(), order["id"])
                producer.poll(0)
            producer.commit_transaction()
            return
        except KafkaException as error:
            if not error.args[0].txn_requires_abort():
                raise
            producer.abort_transaction()
