import json

import kbatch
from kbatch import aio


async def send_orders(config, orders):
    envelopes = [kbatch.Envelope(data=json.dumps(order).encode(), key=order["id"]) for order in orders]
    async with aio.Producer(config, wire="raw") as producer:
        report = await producer.send_batch("orders", envelopes)
        report.raise_for_errors()
