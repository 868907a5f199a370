import json

import kbatch


def send_orders(config, orders, timeout_s=10):
    with kbatch.Producer(config, wire="raw", close_timeout_s=timeout_s) as producer:
        for order in orders:
            producer.submit("orders", [kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"])])
