"""Where a peer can vanish without a word: vanish() and a command around it.

    python examples/vanish.py               says whether it can be had here
    unshare -Urnm python examples/vanish.py COMMAND...

Root may have the kernel do that.  Anybody else may in a network of their own,
made by unshare, in which they count as root.  It has no interface but
loopback, and nothing of it is left when the command has ended.
"""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys


def vanish(sock):
    """Have the kernel drop whatever comes in for this socket."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack(  # SO_ATTACH_FILTER
        "HP", 1, ctypes.addressof(drop)))


def where():
    """Return the words to put before a command so that its peers can vanish:
    none for root.  OSError says why it cannot be had here.
    """
    try:
        with socket.socket() as sock:
            vanish(sock)
        return []
    except PermissionError:
        words = ["unshare", "-Urnm", sys.executable, os.path.abspath(__file__)]
        done = subprocess.run([*words, "true"], capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(done.stderr.strip().rpartition("\n")[2])
        return words


def enter():
    """Make a new network usable: loopback, and a /run for ip netns."""
    with socket.socket() as sock:
        up = struct.pack("16sh22x", b"lo", 1)
        fcntl.ioctl(sock, 0x8914, up)  # SIOCSIFFLAGS
        vanish(sock)
    ctypes.CDLL(None).mount(b"tmpfs", b"/run", b"tmpfs", 0, None)


if __name__ == "__main__":
    if sys.argv[1:]:
        enter()
        os.execvp(sys.argv[1], sys.argv[1:])
    print("in a network of one's own" if where() else "as it is")
