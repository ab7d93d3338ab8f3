from __future__ import annotations

from datetime import timedelta
from functools import partial

from django.tasks import task

from dramatiq_policies import RetryPolicy, Snooze, constant
from dramatiq_policies.contrib.django.tasks import policy

#: The calls of the tasks, in order.
done = []


class Unreachable(Exception):
    pass


@task(queue_name="mail", priority=7)
@policy(retry_on={Unreachable: RetryPolicy(attempts=3, wait=constant(1_000))}, timeout=timedelta(seconds=30))
def send_mail(to, *, text=""):
    done.append((to, text))
    return {"to": to}


@task
def add(left, right):
    return left + right


@task
@policy(discard_on=ZeroDivisionError)
def divide(left, right):
    return left / right


@task(takes_context=True)
@policy(retry_on={Unreachable: RetryPolicy(attempts=3, wait=constant(1_000))}, idempotency_key="notice:{number}")
def notice(context, number, fail=0):
    done.append((context.attempt, context.task_result.id, context.task_result.worker_ids))
    if context.attempt <= fail:
        raise Unreachable(number)


@task
async def fetch(number):
    return [number, (number,)]


@task
def not_json():
    return partial


@task
def snooze_once():
    done.append(1)
    if len(done) == 1:
        raise Snooze(5_000)


@task(backend="immediate")
def of_another_backend():
    pass
