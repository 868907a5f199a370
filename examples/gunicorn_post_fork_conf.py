"""gunicorn's configuration for gunicorn_post_fork.py: gives each worker a producer of its own."""


def post_fork(server, worker):
    import gunicorn_post_fork

    gunicorn_post_fork.producer = gunicorn_post_fork.make_producer()
