"""What the kernel itself refuses a reader: Landlock, where Linux has it (5.13 and later).

Python's own hooks bind Python code. Whoever found a hole in native code would still be bound by this.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CREATE_RULESET, _RESTRICT_SELF = 444, 446
"""The numbers of the system calls, the same on every machine."""
_VERSION = 1
_NO_NEW_PRIVILEGES = 38

_READ = 1 << 2 | 1 << 3
"""Reading files and folders is all that stays allowed."""
_FIRST = 13
"""Rights to files in the first version; the second and the third know one more each."""
_NET, _NET_SINCE = 1 << 0 | 1 << 1, 4
_SCOPE, _SCOPE_SINCE = 1 << 0 | 1 << 1, 6
"""Abstract sockets and signals of other processes."""


def restrict() -> int:
    """For good: no writing, running, creating and removing, since version 4 no TCP, since 6 no signals to others.

    Returns:
        The version that the kernel has; 0 for none.
    """
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    version = int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)))
    if version < 1:
        return 0
    rights = (1 << _FIRST + min(version - 1, 2)) - 1 & ~_READ
    net, scope = _NET if version >= _NET_SINCE else 0, _SCOPE if version >= _SCOPE_SINCE else 0
    fields = (ctypes.c_uint64 * 3)(rights, net, scope)
    size = 8 * (1 + (version >= _NET_SINCE) + (version >= _SCOPE_SINCE))
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(fields), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return 0
    refused = libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
    return 0 if refused else version
