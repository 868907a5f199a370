"""Takes events without waiting for Kafka; what is buffered when the server is told to end is sent first.

    KAFKA=localhost:9092 uvicorn --app-dir examples --timeout-graceful-shutdown 20 shutdown_fastapi:app
    curl --data-binary @events.jsonl http://localhost:8000/events

uvicorn ends with the signal that it was sent, without Python's atexit functions: the lifespan is where to close.
"""

import logging
import os
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

import kbatch
from kbatch import aio

topic = aio.KafkaTopic("events", kbatch.SenderMode.BUFFERED, config={"bootstrap.servers": os.environ["KAFKA"]})
log = logging.getLogger("uvicorn.error")


@asynccontextmanager
async def lifespan(app):
    app.state.sender = topic.create_sender()
    yield
    log.info("Closing the sender, %d envelopes to go", len(app.state.sender))
    try:
        await app.state.sender.close(timeout=float(os.environ.get("CLOSE_TIMEOUT_S", "20")))
    except kbatch.UndeliveredError as error:
        log.error("%d envelopes were not sent", error.count)


app = FastAPI(lifespan=lifespan)


@app.post("/events", status_code=202)
async def take_events(request: Request):
    events = [kbatch.Envelope(data=line) for line in (await request.body()).splitlines()]
    try:
        for event in events:
            await app.state.sender.send(event, timeout=5)
    except kbatch.SenderError as error:  # full, since Kafka does not keep up, or closed
        raise HTTPException(503, str(error)) from error
    return {"accepted": len(events)}
