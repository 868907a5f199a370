import json

import kbatch


def envelope_of(order):
    headers = [("customer", order["customer"]), ("seen", None), ("seen", b"\x01")]
    if order["quantity"] == 0:  # withdrawn: a tombstone
        return kbatch.Tombstone(order["id"], headers=headers)
    return kbatch.Envelope(
        data=json.dumps(order).encode(),
        key=order["id"],
        partition=order["shop"],
        timestamp=order["placed_ms"],
        headers=headers,
    )


def send_orders(config, orders):
    with kbatch.Producer(config) as producer:
        producer.send_batch("orders", map(envelope_of, orders)).raise_for_errors()
