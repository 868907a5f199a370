"""What outboxes and inboxes have in common: connections and transactions of an application, and of kbatch's own.

``_tables`` names tables and knows their version; ``_sqlite`` and ``_postgres`` are for each kind of database;
``_postgres_connection`` needs psycopg.
"""
