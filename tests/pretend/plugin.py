"""The pytest plugin that loads the pretended devices before anything imports torch."""

from tests.pretend import machine

machine.load()
