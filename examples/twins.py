"""Three ways to watch one TCP connection, for deaths.py: a plain socket that
is asked, a bare asyncio Protocol that is told, and tcpops.
"""

import asyncio
import errno
import re
import select
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tcpops
from facts import ERROR, said
from vanish import TCP

STATES = dict(enumerate(
    "ESTABLISHED SYN_SENT SYN_RECV FIN_WAIT1 FIN_WAIT2 TIME_WAIT CLOSE"
    " CLOSE_WAIT LAST_ACK LISTEN CLOSING".split(), 1))
POLL = {"IN": 1, "OUT": 4, "RDHUP": 0x2000, "HUP": 16, "ERR": 8}
SETTINGS = {"connect_timeout": 1.5, "send_timeout": 1, "message_timeout": 1,
            "max_write_buffer": 1 << 24,
            "connection_lifetime": 86400}  # longer than one talks at a step
#: Seconds of silence, probes, seconds between them: in the order of tcpops.
KEEPALIVE = {"TCP_KEEPIDLE": 1, "TCP_KEEPCNT": 1, "TCP_KEEPINTVL": 1}


def keepalive(sock):
    for name, value in KEEPALIVE.items():
        sock.setsockopt(TCP, getattr(socket, name), value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class Twin:
    """One of three.  The peer is the socket at its other end.

    adopt takes a connected socket over, connect makes one; keepalive, send
    and close do what they say, in the manner of the twin; stop cleans up.
    """

    peer, target = None, None  # target: the address to connect to
    heard = ""                 # what the peer has read, in words
    over = False               # whether the program knows of the end

    def __init__(self):
        self.told, self.at = [], None  # what the program is told, and when

    def tell(self, what):
        self.told.append(what)
        self.at = time.monotonic()


class Asked(Twin):
    """A plain socket, to be asked once: an error is there only once."""

    sock = None

    def adopt(self, sock, _):
        self.sock = sock
        sock.setblocking(False)

    def connect(self):
        self.adopt(socket.socket(), None)
        self.sock.connect_ex(self.target)

    def keepalive(self):
        keepalive(self.sock)

    def send(self, data):
        self.sock.send(data)

    def close(self):
        self.sock.shutdown(socket.SHUT_WR)  # a closed one cannot be asked

    def poll(self):
        """Return the names of what poll() reports at this moment."""
        poll = select.poll()
        poll.register(self.sock, sum(POLL.values()))
        mask = dict(poll.poll(0)).get(self.sock.fileno(), 0)
        return [name for name, bit in POLL.items() if mask & bit]

    @property
    def over(self):
        return not {"RDHUP", "HUP", "ERR"}.isdisjoint(self.poll())

    def ask(self):
        """Return {who: answer}.  The last two take an error away."""
        # tcpi_state and tcpi_total_retrans.  tcpi_retransmits would count
        # timeouts; tcpi_probes counts unanswered probes, and a living peer
        # leaves the second of two within 500 ms unanswered.
        state, again = struct.unpack("B99xI", self.sock.getsockopt(
            TCP, socket.TCP_INFO, 104))
        return {"poll": " ".join(self.poll()) or "nothing",
                "TCP_INFO": STATES[state] + f", sent again: {again}" * (
                    again > 0),
                "SO_ERROR": str(said(self.sock.getsockopt, *ERROR)),
                "MSG_PEEK": str(said(self.sock.recv, 100, socket.MSG_PEEK)
                                or "end of file")}

    def stop(self):
        if self.sock:
            self.sock.close()


class Bare(Twin, asyncio.Protocol):
    """What asyncio tells a Protocol that does nothing of its own."""

    transport = dialled = None
    outcome = "nothing"

    async def dial(self, *address, **options):
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: self, *address, **options)
        except OSError as error:
            self.end("create_connection() raises {}", error)

    def adopt(self, sock, _):
        self.dialled = asyncio.ensure_future(self.dial(sock=sock))

    def connect(self):
        self.dialled = asyncio.ensure_future(self.dial(*self.target))

    def end(self, call, error):
        self.over = True
        self.outcome = str(error and errno.errorcode[error.errno])
        self.tell(call.format(self.outcome))

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.tell(f"data_received({data})")

    def eof_received(self):
        self.tell("eof_received()")

    def pause_writing(self):
        self.tell("pause_writing()")

    def connection_lost(self, error):
        self.end("connection_lost({})", error)

    def keepalive(self):
        keepalive(self.transport.get_extra_info("socket"))

    def send(self, data):
        self.transport.write(data)

    def close(self):
        self.transport.close()

    def stop(self):
        if self.dialled:
            self.dialled.cancel()
        if self.transport:
            self.transport.abort()


class Ours(Twin):
    """tcpops.  A program that waits must have its loop turn meanwhile."""

    def __init__(self):
        super().__init__()
        self.ops = tcpops.TcpOps(**SETTINGS)
        self.ops.request_route(lambda msg: self.tell(f"message {msg.data}"))
        self.ops.event_route("tcp:closed")(self.end)

    def end(self, event):
        self.over, self.event = True, event
        detail = re.sub(r"\d{5,}", lambda digits: f"{int(digits[0]):,}",
                        event.detail)
        self.tell(f"{event.name} {event.reason} ({detail})")

    def adopt(self, sock, framing):
        self.conid = self.ops.attach(sock, framing=framing)

    def connect(self):
        self.conid = self.ops.connect(*self.target)

    def keepalive(self):
        self.ops.tcp_keepalive_enable(self.conid, *KEEPALIVE.values())

    def send(self, data):
        self.ops.send(self.conid, data)

    def close(self):
        self.ops.tcp_close_connection(self.conid)

    def stop(self):
        self.ops.close()
