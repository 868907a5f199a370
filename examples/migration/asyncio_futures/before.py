import asyncio
import json

from confluent_kafka.aio import AIOProducer


async def send_orders(config, orders):
    producer = AIOProducer(config)
    try:
        futures = [await producer.produce("orders", json.dumps(order).encode(), order["id"]) for order in orders]
        await producer.flush()
        await asyncio.gather(*futures)
    finally:
        await producer.close()
