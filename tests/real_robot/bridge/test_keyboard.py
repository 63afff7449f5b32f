"""Keys of the operator, from a terminal and from a pipe."""

from __future__ import annotations

import os
import pty
import termios

from cogvla.real_robot.bridge.keyboard import Keyboard
from cogvla.tests.support.waiting import until


def test_a_terminal_gives_keys_without_enter_and_is_left_as_it_was() -> None:
    terminal, operator = pty.openpty()[::-1]
    before = termios.tcgetattr(terminal)
    pressed: list[str] = []
    with Keyboard(pressed.append, terminal):
        assert not termios.tcgetattr(terminal)[3] & termios.ICANON
        os.write(operator, b"a ")
        until(lambda: pressed == ["a", " "])
    assert termios.tcgetattr(terminal) == before


def test_a_pipe_gives_keys_but_no_line_ends_and_may_be_closed() -> None:
    read, write = os.pipe()
    pressed: list[str] = []
    with Keyboard(pressed.append, read):
        os.write(write, b"y\r\nn\n")
        until(lambda: pressed == ["y", "n"])
        os.close(write)


def test_a_key_that_fails_leaves_the_emergency_stop_alive() -> None:
    read, write = os.pipe()
    pressed: list[str] = []

    def press(key: str) -> None:
        if key == "a":
            raise ConnectionError("no way to the arm")
        pressed.append(key)

    with Keyboard(press, read):
        os.write(write, b"a ")
        until(lambda: pressed == [" "])


def test_a_keyboard_that_nobody_uses_can_be_closed() -> None:
    read, _ = os.pipe()
    with Keyboard(print, read):
        pass
