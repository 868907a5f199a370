"""Stores an order and tells Kafka of it when it is committed.

KAFKA=localhost:9092 gunicorn --chdir examples/migration/django before:application  # or after:application
"""

import json
import logging
import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connection, models, transaction
from django.db.models.signals import post_save
from django.dispatch import receiver
from django.http import JsonResponse
from django.urls import path

import kbatch

logger = logging.getLogger(__name__)
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    ROOT_URLCONF=__name__,
)
django.setup()
producer = kbatch.Producer({"bootstrap.servers": os.environ["KAFKA"]}, wire="raw")


class Order(models.Model):
    customer = models.CharField(max_length=100)

    class Meta:
        app_label = "shop"


with connection.schema_editor() as editor:
    editor.create_model(Order)


@receiver(post_save, sender=Order)
def publish(instance, **_):
    value = json.dumps({"id": instance.id, "customer": instance.customer}).encode()

    def on_delivery(report):
        for error in report.errors.values():
            logger.error("order %s was not delivered: %s", instance.id, error)

    def send():
        envelope = kbatch.Envelope(data=value, key=str(instance.id))
        producer.submit("orders", [envelope], callback=on_delivery)

    transaction.on_commit(send)


@transaction.atomic
def create_order(request):
    order = Order.objects.create(customer=request.body.decode())
    return JsonResponse({"id": order.id}, status=201)


urlpatterns = [path("orders", create_order)]
application = get_wsgi_application()
