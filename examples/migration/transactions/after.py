import json

import kbatch


def send_orders(config, orders):
    envelopes = [kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"]) for order in orders]
    with kbatch.Producer({**config, "transactional.id": "orders"}, wire="raw") as producer:
        while not producer.send_batch("orders", envelopes):
            pass
