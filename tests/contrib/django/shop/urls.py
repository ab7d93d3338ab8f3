from __future__ import annotations

import dramatiq
from django.http import HttpResponse
from django.urls import path

from .models import Order


def order(request):
    created = Order.objects.create(email=request.GET["email"])
    dramatiq.get_broker().get_actor("confirm").send(created.email)
    if "fail" in request.GET:
        raise RuntimeError("a bug")
    return HttpResponse("ok")


urlpatterns = [path("order", order)]
