"""Inboxes: which ids a consumer group has handled, in the database that its handlers write.

``_tables`` has the DDL; ``_base`` what inboxes of all databases have in common; ``_session`` what a listener's worker
does with one; ``_keeper`` tells how far a group has committed, and purges.
"""
