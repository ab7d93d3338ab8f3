"""Tests of what belongs to other frameworks."""
