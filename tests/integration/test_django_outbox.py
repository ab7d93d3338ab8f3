"""Sends inside of `atomic`, on every database and every broker."""

from __future__ import annotations

import pytest
from django.db import connections, transaction
from dramatiq import group

from dramatiq_policies.contrib.django import DjangoOutbox
from dramatiq_policies.testing.concurrency import in_a_child

from ..contrib.django import project
from .places import until
from .shops import AnyShop

project.set_up()
pytestmark = pytest.mark.usefixtures("quick_restarts")


class Undo(Exception):
    pass


@pytest.fixture
def make_shop(place, database_url):
    with project.database("shop", **project.options_of(database_url)):
        made = []

        def make(**options):
            outbox = DjangoOutbox("shop", **{"namespace": place.queue[-12:], **options})
            made.append(AnyShop(place, outbox))
            return made[-1]

        yield make
        for shop in made:
            shop.outbox.database.close()


def test_a_commit_sends_and_a_rollback_does_not(make_shop):
    shop = make_shop()
    with transaction.atomic(using="shop"):
        message = shop.confirm.send(1)
        assert shop.place.ready() == 0
    with pytest.raises(Undo), transaction.atomic(using="shop"):
        shop.confirm.send(2)
        raise Undo
    with transaction.atomic(using="shop"):
        with pytest.raises(Undo), transaction.atomic(using="shop"):
            shop.confirm.send(3)
            raise Undo
        with transaction.atomic(using="shop"):
            shop.confirm.send(4)
    assert shop.pending() == 0
    found = shop.place.left()
    assert sorted(one.args[0] for one in found) == [1, 4]
    assert message in found


def test_a_group_and_a_delayed_message_run(make_shop):
    shop = make_shop()
    with transaction.atomic(using="shop"):
        group([shop.confirm.message(1), shop.confirm.message(2)], broker=shop.broker).run()
        shop.confirm.send_with_options(args=(3,), delay=300)
    with shop.working():
        until(lambda: len(shop.done) == 3, describe=lambda: shop.done)
    assert sorted(shop.done) == [1, 2, 3]
    assert shop.done[-1] == 3


def test_with_wait_0_a_worker_s_relay_sends_all(make_shop):
    shop = make_shop(wait=0)
    with transaction.atomic(using="shop"):
        shop.confirm.send(1)
    assert (shop.place.ready(), shop.pending()) == (0, 1)
    with shop.working():
        until(lambda: shop.done == [1])
    assert shop.pending() == 0


def test_a_forked_web_process_sends_over_connections_of_its_own(make_shop):
    shop = make_shop()
    with transaction.atomic(using="shop"):
        shop.confirm.send(1)
    # Before it forks, a server closes the application's connections. Those of the library stay open.
    connections["shop"].close()

    def in_child():
        with transaction.atomic(using="shop"):
            shop.confirm.send(2)
        assert shop.pending() == 0

    in_a_child(in_child)
    with transaction.atomic(using="shop"):
        shop.confirm.send(3)
    assert shop.pending() == 0
    assert shop.left() == [1, 2, 3]
