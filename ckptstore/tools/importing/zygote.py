"""The process that has PyTorch loaded and nothing else, from which the readers of foreign checkpoints fork.

Loading PyTorch takes a second, a fork none. Each reader starts afresh, so that what one file does to its reader
touches no other.
"""

from __future__ import annotations

import gc
import os
import socket
import struct

import torch

from ckptstore.tools.importing import reader, standins

READY = b"+"
FORK = b"F"
WAIT = struct.Struct("<cq")
"""Ask for the end of a reader, by its number."""
NUMBER = struct.Struct("<q")


def main(descriptor: int) -> None:
    """Serve the socket of this number until its other end is closed."""
    control = socket.socket(fileno=descriptor)
    torch.set_num_threads(1)
    standins.allow()
    gc.freeze()
    control.sendall(READY)
    while True:
        message, descriptors, *_ = socket.recv_fds(control, WAIT.size, 1)
        if not message:
            os._exit(0)
        if message == FORK:
            answer = _fork(control, descriptors[0])
        else:
            _, pid = WAIT.unpack(message)
            answer = os.waitpid(pid, 0)[1]
        control.sendall(NUMBER.pack(answer))


def _fork(control: socket.socket, descriptor: int) -> int:
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    code = 1
    try:
        control.close()
        # It would walk through all that was loaded, again and again, and find nothing to collect.
        gc.disable()
        reader.serve(socket.socket(fileno=descriptor))
        code = 0
    finally:
        # Nothing of what this process was told to be when it ends.
        os._exit(code)
