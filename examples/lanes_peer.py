"""The peers of lanes.py: plain sockets, and what peers do to a connection.

    python3 examples/lanes_peer.py    says whether a peer can vanish here
"""

import contextlib
import errno
import selectors
import socket
import struct
import subprocess
import sys

from vanish import vanish, where


#: Names of include/net/tcp_states.h, where the first is 1.
KERNEL = ("", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2",
          "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING")


def shaped():
    """Return a socket with small windows, so that a queue is soon to be seen.

    Loopback's segments have 64 kB, and the kernel's buffers grow with them.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    return sock


def listening():
    """Return a listener whose connections have small windows."""
    server = shaped()
    server.bind(("127.0.0.1", 0))
    server.listen(1)
    return server


def shut_port():
    """Return [a socket whose address refuses], for no one listens there."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return [sock]


def black_hole():
    """Return sockets; from the address of the first no answer comes.

    Its backlog is full, and the kernel drops the next SYN.
    """
    held = [socket.create_server(("127.0.0.1", 0), backlog=0)]
    for _ in range(4):
        held.append(socket.socket())
        held[-1].setblocking(False)
        held[-1].connect_ex(held[0].getsockname())
    return held


class Peer:
    """The other end of a lane; it lives in the same loop.

    A method that a button calls returns the words for what it has done.
    """

    def __init__(self, ops, sock, vanish, why_not=""):
        self._ops, self._sock = ops, sock
        self._vanish, self._why_not = vanish, why_not  # if vanish is None
        self.fate = "open"
        self.reading = self.dripping = False
        self.received = 0
        sock.setblocking(False)
        self.resume()

    def why_not(self, action):
        """Return why an action makes no sense, or ""."""
        if self.fate not in ("open", "half-closed"):
            return f"the peer: {self.fate}"
        if action == "resume" and self.reading:
            return "it reads"
        if action == "stop" and not self.reading:
            return "it does not read"
        if action.startswith("vanish") and self._vanish is None:
            return self._why_not
        if self.fate == "half-closed" and action in (
                "send", "half", "late_rst", "drip"):
            return "it has sent its FIN"
        return ""

    def kernel(self):
        """Return what the kernel calls the state of its socket, or None."""
        if self._sock.fileno() < 0 or not sys.platform.startswith("linux"):
            return None
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return KERNEL[info[0]]

    def send(self, data=b"hello\n"):
        with contextlib.suppress(OSError):  # recv() will say why
            self._sock.send(data)
        return f"send({data})"

    def fin(self):
        if self.reading:
            self._take()
        with contextlib.suppress(OSError):
            if self._sock.recv(1, socket.MSG_PEEK):
                self.close("closed with bytes unread")
                return "close() with bytes unread, which sends RST"
        self.close("closed")
        return "close(), which sends FIN"

    def half(self):
        with contextlib.suppress(OSError):  # as in send()
            self._sock.shutdown(socket.SHUT_WR)
        self.fate, self.dripping = "half-closed", False
        return "shutdown(SHUT_WR), which sends FIN; it could still read"

    def rst(self):
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                              struct.pack("ii", 1, 0))
        self.close("closed by RST")
        return "SO_LINGER of 0 s and close(), which sends RST"

    def late_rst(self):
        return f"{self.send(b'last words' + bytes([10]))}, {self.rst()}"

    def vanish(self):
        self._vanish(self._sock)
        self.fate, self.dripping = "vanished", False
        return "SO_ATTACH_FILTER: its kernel drops all that comes in"

    def stop(self):
        self._ops.dismiss(self._sock)
        self.reading = False
        return "no recv(): its window will shut"

    def resume(self):
        self._ops.attend(self._sock, selectors.EVENT_READ, self._ready)
        self.reading = True
        return "recv() again"

    def drip(self):
        self.dripping = not self.dripping
        return ("a byte now and then, and never the end of the line"
                if self.dripping else "drips no longer")

    def _ready(self, _mask):
        self._take()

    def _take(self):
        """Read all that is there; at its end close, as most programs do."""
        try:
            data = True
            while data:
                data = self._sock.recv(65536)
                self.received += len(data)
            self.close("has read our FIN and closed")
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(f"recv() says {errno.errorcode.get(error.errno)}")

    def close(self, fate):
        """Close its socket, unless that has been done."""
        if self._sock.fileno() < 0:
            return
        if self.reading:
            self.stop()
        self.fate, self.dripping = fate, False
        self._sock.close()


class Elsewhere:
    """A child in a network of its own, where it counts as root.

    Sockets made there stay there wherever they are sent: their peers can
    vanish though the program itself has not the right.
    """

    def __init__(self, words):
        self._line, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [*words, sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()])

    def pair(self):
        """Return two ends of a connection."""
        self._line.send(b"p")
        return [socket.socket(fileno=number)
                for number in socket.recv_fds(self._line, 1, 2)[1]]

    def vanish(self, sock):
        """Do as vanish.vanish does."""
        socket.send_fds(self._line, [b"v"], [sock.fileno()])
        self._line.recv(1)

    def close(self):
        """End the child."""
        self._line.close()
        self._child.wait()

    @staticmethod
    def serve(line):
        """Be the child, until the parent has gone."""
        with listening() as server:
            while True:
                word, numbers, _, _ = socket.recv_fds(line, 1, 1)
                if word == b"v":
                    with socket.socket(fileno=numbers[0]) as sock:
                        vanish(sock)
                    line.send(word)
                elif word == b"p":
                    with shaped() as sock:
                        sock.connect(server.getsockname())
                        with server.accept()[0] as ours:
                            socket.send_fds(line, [word], [
                                ours.fileno(), sock.fileno()])
                else:
                    return


def vanishing():
    """Return (the Elsewhere that peers need to vanish, or None; the function
    that has them vanish here, or None; a note for the page, or "").
    """
    why_not = "it needs Linux"
    if sys.platform.startswith("linux"):
        try:
            words = where()
            if not words:
                return None, vanish, ""
            return Elsewhere(words), None, (
                "Without root a peer can vanish only where it connects to us.")
        except OSError as error:
            why_not = ("only root may have the kernel drop what comes in for"
                       " a socket, and a network of one's own is not to be"
                       f" had ({error})")
    return None, None, f"No peer can vanish here: {why_not}."


if __name__ == "__main__":
    import signal
    if sys.argv[1:]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's
        with contextlib.suppress(OSError):
            Elsewhere.serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        elsewhere, _, note = vanishing()
        print(note or "A peer can vanish.")
        if elsewhere:
            elsewhere.close()
