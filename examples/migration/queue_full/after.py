import json
from itertools import islice

import kbatch


def send_orders(config, orders):
    envelopes = (kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"]) for order in orders)
    with kbatch.Producer(config, wire="raw") as producer:
        while batch := list(islice(envelopes, 1_000)):
            producer.submit("orders", batch)
