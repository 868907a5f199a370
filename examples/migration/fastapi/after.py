"""Takes an order and answers when Kafka has it.

KAFKA=localhost:9092 uvicorn --app-dir examples/migration/fastapi before:app  # or after:app
"""

import os
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from kbatch import Envelope, KbatchError, aio


class Order(BaseModel):
    id: str
    customer: str


@asynccontextmanager
async def lifespan(app):
    app.state.producer = aio.Producer({"bootstrap.servers": os.environ["KAFKA"]}, wire="raw")
    yield
    await app.state.producer.close()


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
async def create_order(order: Order):
    value = order.model_dump_json().encode()
    try:
        report = await app.state.producer.send_batch("orders", [Envelope(data=value, key=order.id)])
        report.raise_for_errors()
    except KbatchError as error:
        raise HTTPException(503, str(error)) from error
    return {"partition": report.partitions[0], "offset": report.offsets[0]}
