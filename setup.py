"""Build entry point; the metadata is in pyproject.toml. Needs neither nvcc nor torch."""

from setuptools import setup

setup()
