"""What becomes of a user's function that ends the process, is an object, or never returns."""

import asyncio
import threading

import pytest

from exprl_megatron.plugins.calling import Plugin
from exprl_megatron.plugins.failures import PluginError


def plugin(function) -> Plugin:
    return Plugin("verifier", "mine:function", function)


def test_a_function_that_exits_is_an_error_that_names_the_key():
    def function():
        raise SystemExit(0)

    with pytest.raises(PluginError, match="verifier: mine:function failed at"):
        plugin(function)()


def test_an_object_whose_call_is_async_is_asked_in_the_event_loop_of_plugins_which_keeps_no_process_alive():
    class Asked:
        async def __call__(self, value):
            return value, threading.current_thread().name, threading.current_thread().daemon

    asked = plugin(Asked())
    assert asked.is_async
    assert asyncio.run(asked.ask(3)) == (3, "async-plugins", True)


def test_a_function_that_is_not_async_runs_in_a_thread_that_keeps_no_process_alive():
    assert asyncio.run(plugin(lambda: threading.current_thread().daemon).ask()) is True
