"""Tests of the Django app, in a project of their own: see conftest.py."""
