import kafka


def test_kafka_python_reads_what_it_has_written(kafka_cluster):
    kafka_cluster.create_topic("orders")
    client = {"bootstrap_servers": kafka_cluster.bootstrap_servers, "api_version": (2, 0)}
    producer = kafka.KafkaProducer(**client)
    assert producer.send("orders", b"order-1").get(timeout=30).offset == 0
    producer.close()
    consumer = kafka.KafkaConsumer("orders", auto_offset_reset="earliest", consumer_timeout_ms=30_000, **client)
    assert next(consumer).value == b"order-1"
    consumer.close()
