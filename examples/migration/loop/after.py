import json

import kbatch


def send_orders(config, orders):
    envelopes = [kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"]) for order in orders]
    with kbatch.Producer(config, wire="raw") as producer:
        report = producer.send_batch("orders", envelopes)
    return [(envelopes[index].key, error.name) for index, error in report.errors.items()]
