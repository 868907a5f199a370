"""The transactional outbox and its relay.

`SqliteOutbox` adds records within the application's transaction, `Relay` brings them to Kafka. Between the two is
`OutboxStore`: what a relay asks of a database.
"""
