import json

import kbatch


def send_orders(config, orders):  # config has stats_cb, error_cb, throttle_cb, oauth_cb or logger
    with kbatch.Producer(config, wire="raw") as producer:
        envelopes = [kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"]) for order in orders]
        producer.send_batch("orders", envelopes).raise_for_errors()
