"""Takes an order and answers when Kafka has it.

KAFKA=localhost:9092 uvicorn --app-dir examples/migration/fastapi before:app  # or after:app
"""

import os
from contextlib import asynccontextmanager

from confluent_kafka import KafkaException
from confluent_kafka.aio import AIOProducer
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class Order(BaseModel):
    id: str
    customer: str


@asynccontextmanager
async def lifespan(app):
    app.state.producer = AIOProducer({"bootstrap.servers": os.environ["KAFKA"]})
    yield
    await app.state.producer.close()


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
async def create_order(order: Order):
    value = order.model_dump_json().encode()
    try:
        delivery = await app.state.producer.produce("orders", value, order.id)
        await app.state.producer.flush()
        message = await delivery
    except KafkaException as error:
        raise HTTPException(503, str(error)) from error
    return {"partition": message.partition(), "offset": message.offset()}
