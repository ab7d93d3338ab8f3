"""A Django project with one app, on django_dramatiq. See settings.py, jobs in tasks.py, tests in tests.py.

DJANGO_SETTINGS_MODULE=examples.django_shop.settings python -m django test examples.django_shop
export DJANGO_SETTINGS_MODULE=examples.django_shop.settings BROKER_URL=redis://localhost:6379/0 DATABASE=shop.sqlite3
python -m django migrate
python -m django rundramatiq
"""
