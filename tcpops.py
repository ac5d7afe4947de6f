#!/usr/bin/env python3
"""tcpops: every connection has a number; its whole life by that number.

One file of pure standard-library Python, a reference implementation of
Kamailio's TCP Ops module with an event loop of its own.  Every TCP, TLS and
WebSocket connection gets a number, the conid.  By that number you ask whether
the connection still lives, turn keepalive on and off, give it an idle lifetime
and close it, and you are told exactly once when and why it ended:

    import tcpops

    ops = tcpops.TcpOps(connection_lifetime=120)

    @ops.request_route
    def on_message(msg):
        ops.tcp_set_connection_lifetime(3605)  # of the message's connection
        msg.reply(b"welcome\\n")

    @ops.event_route("tcp:closed")
    def on_closed(event):
        print(event.conid, event.reason)

    ops.listen("127.0.0.1", 5060)
    ops.run()

Without a program: python tcpops.py --listen

The file reads from top to bottom; nothing is used above its definition:

    1  Imports and public names
    2  The words of the specification
    3  What callers pass
    4  Deadlines
    5  Keepalive
    6  Probing a socket
    7  Messages and framings
    8  SIP over a stream
    9  WebSocket
   10  TLS
   11  A connection
   12  The table of connections
   13  Routes
   14  The loop
   15  The functions of the specification
   16  The command line

What the specification's functions return; negative is false, as in the
script language, so "if not ops.tcp_conid_alive(conid)" means what it says:

    Result   1 SUCCESS   -1 FAILURE
    State    1 OK         2 ACCEPT   3 CONNECT
            -1 NOT_FOUND -2 EOF     -3 ERROR    -4 BAD

"Spec" in a docstring names the section of the TCP Ops module's documentation.

Not here: a SIP stack (transactions, dialogs), WebSocket extensions, UDP, name
lookups without blocking, use of one TcpOps from several threads (only stop and
call_soon may be).

Copyright (c) 2026, the tcpops authors.  BSD-2-Clause, see LICENSE.
"""

# ---------------------------------------------------------------------------
# 1. Imports and public names
# ---------------------------------------------------------------------------

import argparse
import binascii
import codecs
import collections
import contextlib
import enum
import errno
import functools
import heapq
import itertools
import json
import logging
import math
import numbers
import os
import re
import reprlib
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
import weakref
from typing import NamedTuple, Optional

__version__ = "1.0.0"

__all__ = [
    "State", "Result", "Event", "EVENT_NAMES", "REASONS",         # section 2
    "parse_address",                                              # section 3
    "Keepalive",                                                  # section 5
    "probe",                                                      # section 6
    "Message", "TextMessage", "ProtocolError", "SKIPPED",         # section 7
    "Framing", "RawFraming", "LineFraming",
    "SipMessage", "SipFraming",                                   # section 8
    "WebSocketFraming",                                           # section 9
    "ConnectionInfo",                                             # section 11
    "TcpOps",                                                     # section 15
    "main",                                                       # section 16
]

log = logging.getLogger("tcpops")

#: "No deadline", and "no limit": larger than every number of seconds or bytes.
NEVER = math.inf

# ---------------------------------------------------------------------------
# 2. The words of the specification
# ---------------------------------------------------------------------------


class _Code(enum.IntEnum):
    """An integer of the script language: positive is true, negative false.

    In plain Python -1 is true, and "if not tcp_conid_alive(conid)" would
    silently never fire.  print() shows the bare number on every version of
    Python (the enum module changed its mind on that in 3.11 and 3.12).
    """

    def __bool__(self):
        return self.value > 0

    __str__ = int.__repr__
    __format__ = int.__format__


class Result(_Code):
    """What the functions that do something return.  Spec: 3.3 to 3.6."""

    SUCCESS = 1
    FAILURE = -1


# What each message and probe names: a member of an enum is looked up in no
# time from here, and slowly by its class before Python 3.12.
_SUCCESS, _FAILURE = Result


class State(_Code):
    """What tcp_conid_state and probe return.  Spec: 3.2."""

    OK = 1          #: the connection is usable
    ACCEPT = 2      #: a listener, or accepted and no byte has moved yet
    CONNECT = 3     #: connect() is under way
    NOT_FOUND = -1  #: no such connection, or not any more
    EOF = -2        #: the peer has sent FIN
    ERROR = -3      #: the socket has an error; the connection will end
    BAD = -4        #: the probe itself failed; the connection will end


_OK, _EOF = State.OK, State.EOF

#: The routes of event_route().  The specification knows the first (4.1); its
#: newer releases split resets and timeouts off; "tcp:opened" is ours.
EVENT_NAMES = ("tcp:closed", "tcp:reset", "tcp:timeout", "tcp:opened")

#: Why a connection ended, and which event tells it.  README shows this table.
REASONS = {
    "eof": "tcp:closed",         # FIN from the peer
    "closed": "tcp:closed",      # tcp_close_connection
    "protocol": "tcp:closed",    # what came cannot be parsed, or is too long
    "error": "tcp:closed",       # any other error of the socket
    "shutdown": "tcp:closed",    # the loop was closed or drained
    "reset": "tcp:reset",        # RST from the peer, or connect refused
    "keepalive": "tcp:timeout",  # the peer vanished
    "lifetime": "tcp:timeout",   # idle for longer than its lifetime
    "connect": "tcp:timeout",    # no answer to connect, or no way there
    "send": "tcp:timeout",       # what is queued makes no progress
    "message": "tcp:timeout",    # a message begun is not complete
}

# An errno means one thing while connecting and another thing afterwards.
# ECONNREFUSED on an established connection is a stored ICMP error that the
# kernel hands out when its own timer gives up: the peer has vanished.
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
                errno.EHOSTDOWN, errno.ENOPROTOOPT)
_CONNECTING_REASON = {
    errno.ECONNREFUSED: "reset",
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    **dict.fromkeys(_UNREACHABLE, "connect"),
}
_CONNECTED_REASON = {
    errno.EPIPE: "eof",  # RST after FIN; the peer's first segment decides
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    **dict.fromkeys(_UNREACHABLE, "keepalive"),
    errno.ECONNREFUSED: "keepalive",
}


class Cause(NamedTuple):
    """The first terminal cause of a connection: latched, never replaced."""

    reason: str
    errno: Optional[int]
    detail: str

    @classmethod
    def of_errno(cls, number, connecting=False):
        """Translate the error of a socket."""
        table = _CONNECTING_REASON if connecting else _CONNECTED_REASON
        reason = table.get(number, "error")
        if reason == "eof":
            # The same end as a FIN that recv() shows, so the same answer.
            return cls("eof", None, "FIN from the peer")
        return cls(reason, number, os.strerror(number))

    @property
    def state(self):
        """What tcp_conid_state says of a connection that has this cause."""
        if self.reason in ("closed", "shutdown"):
            return State.NOT_FOUND
        return State.EOF if self.reason == "eof" else State.ERROR


class Event(NamedTuple):
    """What an event route is called with.  Spec: 4.1.

    si, sp are the peer's address and port, Ri, Rp ours (Kamailio's $si, $sp,
    $Ri and $Rp).  The socket is closed by the time an end is told: the fields
    are all there is.
    """

    conid: int
    name: str               #: one of EVENT_NAMES
    reason: Optional[str]   #: one of REASONS; None for tcp:opened
    errno: Optional[int]    #: the number behind the reason, or None
    detail: str             #: a few words for a person
    proto: str              #: "tcp", "tls", "ws" or "wss"
    si: str
    sp: int
    Ri: str
    Rp: int
    age: float              #: seconds since the conid was handed out
    bytes_in: int           #: bytes received
    bytes_out: int          #: bytes handed to the kernel

# ---------------------------------------------------------------------------
# 3. What callers pass
#
# Two languages meet in this file.  Listening, connecting and settings speak
# Python: a wrong value raises.  The functions of the specification speak the
# script language: a wrong value is one log line and -1.  Both check with what
# stands here, which always raises ValueError; section 15 is the only place
# that turns it into a return code.
# ---------------------------------------------------------------------------

#: Stands for "no conid given": None is a wrong value, not a missing one.
_CURRENT = object()

#: The largest lifetime, some 68 years: what the original can hold.
_MAX_SECONDS = 2 ** 31 - 1

_NUMERAL = re.compile(r"[+-]?[0-9]{1,100}(\.[0-9]{1,100})?", re.ASCII)


def _number(value, name, low, high, whole=False):
    """Return value as a number from low to high, or raise ValueError.

    A numeric string is a number, as in the script language.  bool is not one,
    though Python says so: True for a conid is a mistake, never an intention.
    """
    number = value
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, str) and _NUMERAL.fullmatch(value):
        number = float(value) if "." in value else int(value)
    kind = numbers.Integral if whole else numbers.Real
    if (not isinstance(number, kind) or isinstance(number, bool)
            or not low <= number <= high):
        what = "a whole number" if whole else "a number"
        limits = f" from {low} to {high}" if high != NEVER else ""
        raise ValueError(
            f"{name} must be {what}{limits}, not {reprlib.repr(value)}")
    if whole:
        return int(number)
    return number if isinstance(number, int) else float(number)


def _arguments(names, given, named):
    """Sort the arguments of a function whose leading conid may be left out."""
    if len(given) == len(names) and not named:
        return given
    if len(given) + len(named) == len(names) - 1 and "conid" not in named:
        given = (_CURRENT, *given)
    missing = names[len(given):]
    if len(given) > len(names) or set(missing) != set(named):
        raise TypeError("wrong arguments")
    return (*given, *(named[name] for name in missing))


def _payload(payload):
    """Return a payload as bytes or, text, as str; or raise TypeError."""
    if isinstance(payload, str):
        return str(payload)
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise TypeError("payload must be bytes or str, not"
                        f" {type(payload).__name__}")
    return bytes(payload)


_ADDRESS = re.compile(
    r"(?:(?P<scheme>sips?):(?:[^@]*@)?)?"
    r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^\[\]:;?@\s]+))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?(scheme)(?:[;?].*)?)", re.IGNORECASE | re.ASCII | re.DOTALL)


def parse_address(address, lowest_port=1):
    """Return (host, port) of "host:port", "[v6]:port" or a sip: or sips: URI.

    The port defaults to 5060, for sips: to 5061 (RFC 3261, 19.1.2).  Raises
    ValueError for anything else.
    """
    match = isinstance(address, str) and _ADDRESS.fullmatch(address)
    if match:
        sips = (match["scheme"] or "").lower() == "sips"
        port = int(match["port"] or (5061 if sips else 5060))
        if lowest_port <= port <= 65535:
            return match["v6"] or match["host"], port
    raise ValueError("address must be HOST:PORT, [V6]:PORT or a SIP URI,"
                     f" not {reprlib.repr(address)}")


def _format_address(address):
    """Return "host:port", with brackets around an IPv6 address."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolve(host, port, passive=False):
    """Return [(family, address), ...] of a host; a name blocks on its lookup.

    Also the way in which an address is written becomes the kernel's way, so
    that what is returned compares with what accept() and getpeername() say.
    """
    port = _number(port, "port", 0, 65535, whole=True)
    flags = socket.AI_PASSIVE if passive else 0
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM,
                               flags=flags)
    return [(family, address) for family, _, _, _, address in found]

# ---------------------------------------------------------------------------
# 4. Deadlines
#
# Nearly every deadline is put off before it comes up: a lifetime is renewed
# by each message.  So activity must cost nothing here.  It stores a number on
# the connection and leaves the heap alone; an entry that comes up early is
# pushed back to where it belongs.  Only a deadline that is *shortened* pushes
# an entry at once, and the old one is recognised by its time, which is no
# longer the owner's.  One heap serves lifetime, keepalive, connect, send and
# message: each owner has one live entry, its earliest.
#
# Time is an argument.  Nothing here reads a clock.
# ---------------------------------------------------------------------------


class Deadlines:
    """A heap of wake-ups, one live entry for each owner.

    An owner has a conid, which breaks ties, and a wake, the time of its live
    entry, NEVER if it has none; wake belongs to this class alone.
    """

    def __init__(self):
        self._heap = []  # of (when, conid, owner)
        self._live = 0   # how many owners have a wake

    def __len__(self):
        return len(self._heap)

    def arm(self, owner, when):
        """See to it that the owner comes up at that time at the latest."""
        if when >= owner.wake:
            return
        if owner.wake == NEVER:
            self._live += 1
        owner.wake = when
        heapq.heappush(self._heap, (when, owner.conid, owner))
        self._prune()

    def disarm(self, owner):
        """Forget the owner's entry."""
        if owner.wake != NEVER:
            owner.wake = NEVER
            self._live -= 1
            self._prune()

    def next(self):
        """Return the time of the earliest live entry, NEVER if none."""
        heap = self._heap
        while heap and heap[0][0] != heap[0][2].wake:
            heapq.heappop(heap)
        return heap[0][0] if heap else NEVER

    def pop(self, now):
        """Take out and return an owner whose time has come, or None."""
        if self.next() > now:
            return None
        owner = heapq.heappop(self._heap)[2]
        owner.wake = NEVER
        self._live -= 1
        return owner

    def _prune(self):
        """Keep the heap a small multiple of its live entries."""
        # Linear, but only after as many pushes or ends as there are entries.
        # A set, since an owner put back to the very time of a stale entry of
        # its own would otherwise have two live ones.
        if len(self._heap) > 2 * self._live + 8 or not self._live:
            self._heap = list({entry for entry in self._heap
                               if entry[0] == entry[2].wake})
            heapq.heapify(self._heap)

# ---------------------------------------------------------------------------
# 5. Keepalive
#
# The kernel does the probing.  But it does not probe while data of ours is
# unacknowledged: a peer that vanishes with data in flight stays "alive" for
# the 15 minutes that retransmission goes on (tcp_retries2).  TCP_USER_TIMEOUT
# would end that and break something else, for it kills a living peer that
# keeps its window shut.  So the loop keeps a deadline beside the kernel's and
# asks TCP_INFO when it comes up: is_dead() below.
# ---------------------------------------------------------------------------


class Keepalive(NamedTuple):
    """Keepalive settings of a connection.  Spec: 3.3."""

    idle: int      #: seconds of silence before the first probe
    count: int     #: unanswered probes before the connection is reset
    interval: int  #: seconds between two probes

    @property
    def limit(self):
        """Seconds of silence after which the peer has vanished."""
        return self.idle + self.count * self.interval


#: Each setting and the names of its option; macOS has a name of its own for
#: the first.  Linux takes 1 to 32767 seconds, 1 to 127 probes.
_KEEPALIVE_OPTIONS = (
    ("idle", ("TCP_KEEPIDLE", "TCP_KEEPALIVE")),
    ("count", ("TCP_KEEPCNT",)),
    ("interval", ("TCP_KEEPINTVL",)),
)


def _keepalive_options():
    """Return [(setting, option's name, option)], OSError if one is missing."""
    options = []
    for setting, names in _KEEPALIVE_OPTIONS:
        name = next((name for name in names if hasattr(socket, name)), None)
        if name is None:
            raise OSError(errno.ENOPROTOOPT,
                          f"this platform has no {' or '.join(names)}")
        options.append((setting, name, getattr(socket, name)))
    return options


def get_keepalive(sock):
    """Return the Keepalive that the kernel has for a socket, None if off."""
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return None
    return Keepalive(*(sock.getsockopt(socket.IPPROTO_TCP, option)
                       for _, _, option in _keepalive_options()))


def set_keepalive(sock, keepalive):
    """Turn keepalive on; all settings or, with OSError, none."""
    options = _keepalive_options()
    before = [sock.getsockopt(socket.IPPROTO_TCP, option)
              for _, _, option in options]
    for (setting, name, option), value in zip(options, keepalive):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        except (OSError, TypeError) as error:  # TypeError: no C int
            for (_, _, undo), old in zip(options, before):
                sock.setsockopt(socket.IPPROTO_TCP, undo, old)
            raise OSError(
                getattr(error, "errno", errno.EINVAL),
                f"the system refuses {value} as {setting} ({name})") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def clear_keepalive(sock):
    """Turn keepalive off; the settings stay in the socket, unused."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)


class TcpInfo(NamedTuple):
    """What is used of Linux' struct tcp_info."""

    state: int       #: as in include/net/tcp_states.h
    unanswered: int  #: retransmissions or window probes with no answer yet
    silence: float   #: seconds since the peer last sent anything, even an ACK


# Eight bytes (state, ca_state, retransmits, probes, backoff, options, window
# scales, flags), then 32-bit fields; the 12th is tcpi_last_data_recv and the
# 13th tcpi_last_ack_recv, in milliseconds.
_TCP_INFO = struct.Struct("=B x B B 4x 44x I I")
_TCP_SYN_SENT = 2
_TCP_CLOSE = 7
#: No byte can come any more: TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING.
_TCP_ENDED = (6, 7, 8, 9, 11)


def tcp_info(sock):
    """Return the TcpInfo of a socket, None where there is no such thing."""
    # The BSDs have an option of this name with other fields behind it.
    if not sys.platform.startswith("linux"):
        return None  # pragma: no cover (no struct tcp_info as on Linux)
    try:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO,
                              _TCP_INFO.size)
        state, retransmits, probes, data, ack = _TCP_INFO.unpack(raw)
    except (OSError, struct.error):  # not TCP, or not open any more
        return None
    return TcpInfo(state, max(retransmits, probes), min(data, ack) / 1000)


def is_dead(info, limit, suspected):
    """Say whether a peer that has been asked something has vanished.

    Silence alone proves nothing: the kernel probes a shut window at growing
    intervals, so a living peer can be silent for longer than the limit with
    nothing asked of it.  Two transmissions without an answer do, or one that
    has had an interval to be answered (suspected).
    """
    return info.silence >= limit and (
        info.unanswered >= 2 or (info.unanswered == 1 and suspected))

# ---------------------------------------------------------------------------
# 6. Probing a socket
#
# Some facts about SO_ERROR and MSG_PEEK, each of which decides a line below
# (Linux; the test suite shows them):
#
# - SO_ERROR is read and clear.  After an RST the first read says ECONNRESET,
#   the second 0, and recv() then says a clean EOF.  A MSG_PEEK that raises
#   consumes the error too.  So whoever probes must remember what he found.
# - MSG_PEEK cannot see past unread bytes.  Behind them FIN is invisible, and
#   after an RST it still returns the data.  So SO_ERROR is asked first, and
#   where bytes are waiting TCP_INFO says whether the peer has sent FIN.
# - An RST that follows a FIN is EPIPE, not ECONNRESET: the kernel knows.
# - SO_ERROR also returns, and clears, an ICMP error that the kernel only keeps
#   in mind (EHOSTUNREACH, say) while it goes on trying: a connection that has
#   not been closed by its error is alive.
# - A socket that is still connecting looks quiet (EAGAIN), like a good one.
# - recv() on a listener, and on a socket never connected, says ENOTCONN.
# ---------------------------------------------------------------------------

# An SSLSocket refuses flags, the plain socket's method works on any socket.
_recv = socket.socket.recv
# MSG_DONTWAIT: the socket may be a blocking one.  0 where there is none.
_PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)
_SOL_SOCKET, _SO_ERROR = socket.SOL_SOCKET, socket.SO_ERROR
# What a probe meets where there is no connected socket behind a descriptor.
_NO_SOCKET = (errno.EBADF, errno.ENOTSOCK, errno.ENOTCONN)


def _is_soft(sock):
    """Say whether a socket lives in spite of the error that it carries."""
    info = tcp_info(sock)
    return info is not None and info.state != _TCP_CLOSE


def _look(sock):
    """Return (State, errno or None, bytes waiting) of a connected socket.

    OK with an errno: an ICMP error has come, but the connection lives.
    """
    soft = None
    try:
        number = sock.getsockopt(_SOL_SOCKET, _SO_ERROR)
        if number and _is_soft(sock):
            soft, number = number, 0
        if not number:
            if not _recv(sock, 1, _PEEK):
                return _EOF, None, False
            info = tcp_info(sock)
            if info is not None and info.state in _TCP_ENDED:
                return _EOF, None, True
            return _OK, soft, True
    except (BlockingIOError, InterruptedError):
        return _OK, soft, False
    except OSError as error:
        number = error.errno
    if number == errno.EPIPE:
        return State.EOF, number, False
    if number in _NO_SOCKET:
        return State.BAD, number, False
    return State.ERROR, number, False


def probe(sock):
    """Say what state any TCP socket is in, without a loop.  Spec: 3.2.

    Returns (State, errno or None), and never blocks or raises on the state of
    the socket.  OK with an errno: an ICMP error has come, and the kernel goes
    on trying.  Reading the error clears it, so a second probe of a failed
    socket finds less than the first; TcpOps remembers, this cannot.
    """
    timeout = sock.gettimeout()
    if timeout and sock.fileno() >= 0:
        # With a timeout Python waits for readability, whatever the flags.
        sock.settimeout(0)
        try:
            return probe(sock)
        finally:
            sock.settimeout(timeout)
    state, number, _ = _look(sock)
    if state is State.BAD and number == errno.ENOTCONN:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return State.ACCEPT, None
    elif state is State.OK:
        info = tcp_info(sock)
        if info is not None and info.state == _TCP_SYN_SENT:
            return State.CONNECT, None
    return state, number

# ---------------------------------------------------------------------------
# 7. Messages and framings
#
# A framing turns bytes into payloads and payloads into bytes.  It touches no
# socket, reads no clock and calls no handler, so that it can be tested by
# feeding it, and so that the loop treats every protocol alike.  The loop
# pulls payloads one by one: when a connection may not send any more, or a
# handler closes it, the rest waits in the framing and nothing is lost.
# ---------------------------------------------------------------------------


class Message:
    """What request_route and onreply_route are called with."""

    __slots__ = ("_loop", "_conn", "data")

    #: The string of a text message (of a WebSocket), None for bytes.
    text = None

    def __init__(self, loop, conn, data):
        self._loop = loop
        self._conn = conn
        self.data = data  #: the payload, bytes

    @property
    def framing(self):
        """The framing's instance of this connection, None for raw."""
        layer = self._conn.layer
        return getattr(layer, "inner", layer)

    @property
    def tls(self):
        """The ssl.SSLObject of this connection, None without TLS: its
        getpeercert(), version() and cipher() tell who and how.
        """
        return getattr(self._conn.layer, "tls", None)

    #: The connection that the message came from, see Event for the names.
    conid = property(lambda self: self._conn.conid)
    proto = property(lambda self: self._conn.proto)
    si = property(lambda self: self._conn.peer[0])
    sp = property(lambda self: self._conn.peer[1])
    Ri = property(lambda self: self._conn.local[0])
    Rp = property(lambda self: self._conn.local[1])

    @property
    def is_reply(self):
        """Whether onreply_route, if there is one, gets this message.

        Plain bytes do not say whether they ask or answer: what comes in on a
        connection that we opened is taken for an answer.  A framing whose
        messages know better has a subclass of its own.
        """
        return self._conn.origin == "connect"

    @property
    def payload(self):
        """The text if there is one, else the data: reply(payload) echoes."""
        return self.data if self.text is None else self.text

    def reply(self, payload):
        """Send payload on the connection that the message came from.

        Returns a Result, see TcpOps.send.
        """
        return self._loop._send_on(self._conn, payload)

    def __repr__(self):
        return (f"<{type(self).__name__} conid {self.conid}:"
                f" {reprlib.repr(self.payload)}>")


class TextMessage(Message):
    """A message of a framing that tells text from bytes."""

    __slots__ = ("text",)

    def __init__(self, loop, conn, payload):
        self.text = payload if isinstance(payload, str) else None
        super().__init__(loop, conn, payload if self.text is None
                         else payload.encode())


class ProtocolError(Exception):
    """Raised by a framing: the peer broke the protocol.

    The connection ends with the reason "protocol" and the text as detail.
    """


#: What next_message returns when it has taken something that is no message.
SKIPPED = object()


class Framing:
    """The base of a framing, and the way to write one of your own.

    Pass the class to listen, connect or attach; each connection gets an
    instance.  To be filled in: next_message and encode.  buffer holds what
    has been received and not yet returned; what a framing has to say by
    itself it appends to output.  A framing with a handshake has more to fill
    in: opened is False until that is done (the connection is not usable, and
    tcp:opened not told, before).
    """

    proto = "tcp"      #: what the proto of its connections is
    message = Message  #: the class of its messages; read when it is open
    opened = True      #: False while a handshake is under way
    handshake = "handshake"  #: what that is called
    #: Set to a few words when the peer has ended the stream in the protocol's
    #: own way: it is as if its FIN had come.
    closed = None
    #: True once nothing more can be sent: send() and reply() refuse then.
    mute = False
    #: True between the parts of a message, if something else may come there:
    #: SKIPPED then gives that message no new time.
    amid = False

    def __init__(self, max_message, client):
        self.max_message = max_message  #: bytes; refuse what is longer
        self.client = client            #: True on a connection that we opened
        self.buffer = bytearray()
        self.output = bytearray()

    def begin(self, host):
        """The connection stands; host is the "host:port" given to connect.

        Here a framing says what it says first.
        """

    def receive(self, data):
        """Take what came from the peer."""
        self.buffer += data

    def next_message(self):
        """Return the next payload, or None: more bytes are needed.

        SKIPPED: something was taken that is no message, ask again.  A payload
        is bytes, or str where message is a TextMessage.  Raises
        ProtocolError.
        """
        raise NotImplementedError

    def finish(self):
        """Return the payload that the peer's FIN completes, or None.

        Raises ProtocolError if it comes where it must not.
        """
        return None

    @property
    def partial(self):
        """Whether a message has begun and is not complete."""
        return bool(self.buffer)

    def encode(self, payload):
        """Return the bytes that send a payload, which is bytes."""
        raise NotImplementedError

    def encode_text(self, text):
        """Return the bytes that send a text: those of its UTF-8."""
        return self.encode(text.encode())

    def farewell(self, reason):
        """Return what is to be sent before we close, for one of REASONS.

        May be asked more than once, and answers b"" then.
        """
        return b""


class RawFraming(Framing):
    """A message is what there is: the "raw" of a connection under TLS.

    Without TLS "raw" needs no framing, what recv() returns is the message.
    """

    def next_message(self):
        """Return what has been received, max_message at the most, or None."""
        data = bytes(self.buffer[:self.max_message])
        del self.buffer[:len(data)]
        return data or None

    @property
    def partial(self):
        """Nothing is ever incomplete."""
        return False

    def encode(self, payload):
        """Return payload as it is."""
        return payload


class LineFraming(Framing):
    """A message is a line, without its LF or CR LF.

    What is sent gets a LF unless it ends with one.  A last line without LF is
    a message too, once the peer has sent FIN.
    """

    def __init__(self, max_message, client):
        super().__init__(max_message, client)
        self._searched = 0  # a line that drips in is not searched anew

    def next_message(self):
        """Return the next line, or None.  Raises ProtocolError: too long."""
        end = self.buffer.find(b"\n", self._searched)
        length = len(self.buffer) if end < 0 else end
        limit = self.max_message
        if length > limit + (self.buffer[limit:limit + 1] == b"\r"):
            raise ProtocolError(f"a line of over {self.max_message} bytes")
        if end < 0:
            self._searched = length
            return None
        line = bytes(self.buffer[:end])
        del self.buffer[:end + 1]
        self._searched = 0
        return line[:-1] if line.endswith(b"\r") else line

    def finish(self):
        """Return the last line, which has no LF, or None."""
        line = bytes(self.buffer)
        self.buffer.clear()
        return line or None

    def encode(self, payload):
        """Return payload, with a LF at its end."""
        return payload if payload.endswith(b"\n") else payload + b"\n"

# ---------------------------------------------------------------------------
# 8. SIP over a stream
#
# Not a SIP stack: where a message ends (RFC 3261, 18.3), and a look at its
# headers.  A start line has to speak of SIP, and is not judged otherwise, so
# that a request which nobody understands does not cost those that follow it
# on the same connection.
# ---------------------------------------------------------------------------

_FOLD = re.compile(rb"\r\n[ \t]+")


def _parse_head(head):
    """Return (start line, [(name, value), ...]) of a SIP or HTTP head.

    Folded values are unfolded, names are in lower case, bytes that are no
    UTF-8 become U+FFFD, and a line without a colon is left out.
    """
    lines = _FOLD.sub(b" ", head).decode("utf-8", "replace").split("\r\n")
    fields = (line.partition(":") for line in lines[1:])
    return lines[0], [(name.strip(" \t").lower(), value.strip(" \t"))
                      for name, colon, value in fields if colon]


def _printable(text):
    """Return a text of the peer's for a detail: it may end at a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1]
                   for char in text)


def _check_printable(buffer, protocol):
    """Raise ProtocolError if no text begins here, as with TLS: at once, since
    the end of a head might never come.
    """
    if buffer and not 0x20 < buffer[0] < 0x7F:
        raise ProtocolError(f"this is not {protocol}" + (
            " (TLS on a port without it?)" if buffer[0] == 0x16 else ""))


#: The compact names of RFC 3261, 7.3.3 and of those registered since.
_COMPACT = {
    "a": "accept-contact", "b": "referred-by", "c": "content-type",
    "d": "request-disposition", "e": "content-encoding", "f": "from",
    "i": "call-id", "j": "reject-contact", "k": "supported",
    "l": "content-length", "m": "contact", "n": "identity-info", "o": "event",
    "r": "refer-to", "s": "subject", "t": "to", "u": "allow-events",
    "v": "via", "x": "session-expires", "y": "identity",
}


class SipMessage(TextMessage):
    """A SIP message; its headers are looked at when they are asked for."""

    __slots__ = ("_head",)

    def _parsed(self):
        """Return (the start line's three parts, header fields, body)."""
        try:
            return self._head
        except AttributeError:
            pass
        head, _, body = self.data.partition(b"\r\n\r\n")
        start, fields = _parse_head(head)
        first, _, rest = start.partition(" ")
        if first.upper().startswith("SIP/"):
            second, _, third = rest.partition(" ")
        else:
            second, _, third = rest.rpartition(" ")
        self._head = (first, second.strip(), third.strip()), [
            (_COMPACT.get(name, name), value) for name, value in fields], body
        return self._head

    @property
    def is_reply(self):
        """Whether it is a response: onreply_route, if there is one, gets it.
        """
        return self.data[:4].upper() == b"SIP/"

    @property
    def method(self):
        """The method of a request; None for a response."""
        return None if self.is_reply else self._parsed()[0][0]

    @property
    def uri(self):
        """The Request-URI of a request; None for a response."""
        return None if self.is_reply else self._parsed()[0][1]

    @property
    def status(self):
        """The status code of a response; None for a request, and for a
        response whose code is not one of three digits.
        """
        code = re.fullmatch("[0-9]{3}", self._parsed()[0][1])
        return int(code[0]) if self.is_reply and code else None

    @property
    def reason(self):
        """The reason phrase of a response; None for a request."""
        return self._parsed()[0][2] if self.is_reply else None

    def headers(self, name):
        """Return the values of all header fields of that name, in order.

        The name in any case, long or compact.  A value is what stands behind
        the colon, unfolded; lists with commas are not taken apart.
        """
        name = name.lower()
        name = _COMPACT.get(name, name)
        return [value for field, value in self._parsed()[1] if field == name]

    def header(self, name):
        """Return the first of headers(name), None if there is none."""
        return next(iter(self.headers(name)), None)

    @property
    def body(self):
        """The bytes behind the headers."""
        return self._parsed()[2]


_LENGTHS = re.compile(
    rb"\r\n(?:content-length|l)(?:[ \t]|\r\n[ \t])*:((?:[^\r\n]|\r\n[ \t])*)",
    re.IGNORECASE)
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")
_CRLFS = re.compile(rb"(?:\r\n)+")
_START = re.compile(rb"(?:[^\r\n]*[ \t])?SIP/", re.IGNORECASE)


class SipFraming(Framing):
    """SIP messages, by their Content-Length (RFC 3261, 18.3).

    CR LF before a message is skipped, two of them are a keepalive that is
    answered by one (RFC 5626, 3.5.1).  Without a Content-Length, or with
    several that differ, nobody knows where the next message begins: that
    ends the connection.
    """

    message = SipMessage

    def __init__(self, max_message, client):
        super().__init__(max_message, client)
        self._half = 0      # CR LFs that wait for their second one
        self._searched = 0  # a head that drips in is not searched anew
        self._length = 0    # of the message, once its head has come

    def next_message(self):
        """Return the next message, or None.  Raises ProtocolError."""
        buffer = self.buffer
        if not self._length and not self._find_length():
            return None
        if len(buffer) < self._length:
            return None
        data = bytes(buffer[:self._length])
        del buffer[:self._length]
        self._length = 0
        return data

    def _find_length(self):
        """Find out how long the next message is; return whether it is known.
        """
        buffer = self.buffer
        crlfs = _CRLFS.match(buffer)
        if crlfs:
            pings, self._half = divmod(self._half + crlfs.end() // 2, 2)
            self.output += b"\r\n" * pings
            del buffer[:crlfs.end()]
            self._searched = 0
        if buffer != b"\r":
            _check_printable(buffer, "SIP")
        end = buffer.find(b"\r\n\r\n", self._searched)
        if end >= 0:
            if not _START.match(buffer):
                raise ProtocolError("this is not SIP")
            self._half = self._searched = 0
            self._length = end + 4 + self._content_length(
                bytes(buffer[:end + 2]))
        else:
            self._searched = max(0, len(buffer) - 3)
        if max(self._length, self._searched) > self.max_message:
            raise ProtocolError(
                f"a message of over {self.max_message} bytes")
        return self._length

    @staticmethod
    def _content_length(head):
        """Return the number of bytes that follow a head."""
        if _BARE.search(head):
            raise ProtocolError("a bare CR or LF: lines end with CR LF")
        values = {_FOLD.sub(b" ", value).strip(b" \t")
                  for value in _LENGTHS.findall(head)}
        if not values:
            raise ProtocolError("no Content-Length")
        if any(not re.fullmatch(rb"[0-9]{1,19}", value) for value in values):
            raise ProtocolError("Content-Length is no number")
        lengths = {int(value) for value in values}
        if len(lengths) > 1:
            raise ProtocolError("several Content-Lengths that differ")
        return lengths.pop()

    def encode(self, payload):
        """Return payload, which is a whole SIP message, as it is."""
        return payload

# ---------------------------------------------------------------------------
# 9. WebSocket
#
# RFC 6455: an HTTP request and its answer, then frames.  A frame's payload is
# taken as it arrives, so that text that is no UTF-8, and a message that will
# be too long, are refused at their first wrong byte.  What a client sends is
# masked, what a server sends is not.  No extensions: every reserved bit is
# wrong.
# ---------------------------------------------------------------------------

_CONTINUED, _TEXT, _BINARY = 0x0, 0x1, 0x2
_CLOSE, _PING, _PONG = 0x8, 0x9, 0xA
_FINAL = _MASKED = 0x80
#: Bytes of an HTTP request or answer.
_LONGEST_HEAD = 16384
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HTTP_REASONS = {400: "Bad Request", 403: "Forbidden",
                 426: "Upgrade Required"}


def _is_close_code(code):
    """Whether a close frame may carry a code (7.4, and IANA's registry)."""
    return (1000 <= code <= 1014 and code not in (1004, 1005, 1006)
            or 3000 <= code <= 4999)


def _xor(data, mask):
    """Mask or unmask bytes: as two long integers, the fastest way there is
    in pure Python.
    """
    count = len(data)
    repeated = (mask * (count // 4 + 1))[:count]
    return (int.from_bytes(data, "little")
            ^ int.from_bytes(repeated, "little")).to_bytes(count, "little")


def _accept_key(key):
    """Return the answer to a Sec-WebSocket-Key (4.2.2)."""
    import hashlib  # here: it loads OpenSSL, which nothing else needs
    digest = hashlib.sha1(key.encode() + _GUID).digest()
    return binascii.b2a_base64(digest, newline=False).decode()


def _tokens(value):
    """Return the elements of a header's list, in lower case."""
    return [token.strip().lower() for token in (value or "").split(",")]


class _Violation(ProtocolError):
    """What the peer did wrong, and the code that tells it so."""

    def __init__(self, code, detail):
        super().__init__(detail)
        self.code = code


class WebSocketFraming(Framing):
    """WebSocket, both sides of it.

    msg.text is a text message's string, msg.data the bytes of any message.
    To change what it asks for or grants, pass a subclass.  With the
    subprotocol "sip" (RFC 7118) messages are SipMessages.
    """

    proto = "ws"
    message = TextMessage
    handshake = "WebSocket handshake"
    path = "/"                #: what a client asks for, a server is asked for
    headers = ()              #: (name, value) pairs that come along with that
    offers = ()               #: the subprotocols that a client offers
    subprotocols = ("sip",)   #: those that a server speaks

    def __init__(self, max_message, client):
        super().__init__(max_message, client)
        if not re.fullmatch(r"[!-~]+", self.path):
            raise ValueError(f"no path for a WebSocket: {self.path!r}")
        for names in (self.offers, self.subprotocols):
            if isinstance(names, str):
                raise ValueError(f"a tuple is needed, not {names!r}")
        self.opened = False
        self.subprotocol = None  #: what was agreed on
        self._key = None         # of a client's handshake
        self._frame = None       # (final, mask) of the frame that comes in
        self._left = 0           # bytes of it that have not come
        self._kind = None        # opcode of the message that comes in
        self._parts = []         # of that message
        self._tail = b""         # of its text: the beginning of a character
        self._size = 0           # of that message
        self.mute = False        # a close frame of ours has been sent

    def refuse(self, path, headers):
        """Return why a client is refused (403), or None: it is welcome.

        For a subclass, which may look at the Origin, say.  headers are
        (name in lower case, value) pairs; both are to be had afterwards, too,
        as path and headers of msg.framing.
        """
        return None

    # -- the handshake ------------------------------------------------------

    def begin(self, host):
        """As a client, ask."""
        if self.client:
            self._key = binascii.b2a_base64(
                os.urandom(16), newline=False).decode()
            self._say_http(f"GET {self.path} HTTP/1.1", {
                "Host": host, "Upgrade": "websocket", "Connection": "Upgrade",
                "Sec-WebSocket-Key": self._key, "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Protocol": ", ".join(self.offers),
                **dict(self.headers)})

    def _say_http(self, start, headers, body=""):
        lines = [start, *(f"{name}: {value}" for name, value
                          in headers.items() if value), "", body]
        self.output += "\r\n".join(lines).encode()

    def _shake_hands(self):
        """Read the other side's half of the handshake, if it is complete."""
        _check_printable(self.buffer, "HTTP")
        end = self.buffer.find(b"\r\n\r\n")
        too_long = (len(self.buffer) if end < 0 else end) > _LONGEST_HEAD
        if end < 0 and not too_long:
            return
        start, fields = _parse_head(bytes(self.buffer[:end]))
        del self.buffer[:end + 4]
        headers = {}
        for name, value in fields:
            headers[name] = (f"{headers[name]}, {value}" if name in headers
                             else value)
        if self.client:
            if too_long:
                raise ProtocolError("the answer's headers have no end")
            self._check_answer(start, headers)
        else:
            refusal = ((400, "the headers are too long") if too_long
                       else self._check_request(start, headers, fields))
            if refusal:
                self._refuse(*refusal)
            self._grant(headers)
        self.opened = True

    def _check_request(self, start, headers, fields):
        """Return (status, reason) for a refusal, None if all is well.

        RFC 6455, 4.2.1.
        """
        match = re.fullmatch(r"(\S+) (\S+) HTTP/([0-9]\.[0-9])", start)
        if not match or match[3] < "1.1":
            return 400, "HTTP/1.1 is needed"
        if match[1] != "GET":
            return 400, "the method must be GET"
        if not headers.get("host") or "," in headers["host"]:
            return 400, "there must be one Host"
        if "websocket" not in _tokens(headers.get("upgrade")):
            return 426, "this is a WebSocket; Upgrade must name websocket"
        if "upgrade" not in _tokens(headers.get("connection")):
            return 400, "Connection must name Upgrade"
        if not re.fullmatch(r"[A-Za-z0-9+/]{22}==",
                            headers.get("sec-websocket-key", "")):
            return 400, "Sec-WebSocket-Key must be 16 bytes in base64"
        if headers.get("sec-websocket-version") != "13":
            return 426, "Sec-WebSocket-Version must be 13"
        self.path, self.headers = match[2], fields
        reason = self.refuse(match[2], fields)
        return (403, str(reason)) if reason else None

    def _refuse(self, status, reason):
        self._say_http(f"HTTP/1.1 {status} {_HTTP_REASONS[status]}", {
            "Upgrade": "websocket" if status == 426 else "",
            "Sec-WebSocket-Version": "13" if status == 426 else "",
            "Connection": "Upgrade, close" if status == 426 else "close",
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(reason.encode()) + 1),
        }, reason + "\n")
        raise ProtocolError(f"no WebSocket handshake: {reason}")

    def _grant(self, headers):
        offered = headers.get("sec-websocket-protocol", "").split(",")
        self._agree(next((name.strip() for name in offered
                          if name.strip() in self.subprotocols), None))
        self._say_http("HTTP/1.1 101 Switching Protocols", {
            "Upgrade": "websocket", "Connection": "Upgrade",
            "Sec-WebSocket-Accept": _accept_key(headers["sec-websocket-key"]),
            "Sec-WebSocket-Protocol": self.subprotocol})

    def _agree(self, subprotocol):
        self.subprotocol = subprotocol
        if subprotocol == "sip":
            self.message = SipMessage

    def _check_answer(self, start, headers):
        """Check a server's half of the handshake.  RFC 6455, 4.1."""
        subprotocol = headers.get("sec-websocket-protocol")
        for wrong, reason in (
                (not re.match(r"HTTP/1\.1 101(?: |$)", start),
                 _printable(start[:80])),
                (_tokens(headers.get("upgrade")) != ["websocket"],
                 "Upgrade must be websocket"),
                ("upgrade" not in _tokens(headers.get("connection")),
                 "Connection must name Upgrade"),
                (headers.get("sec-websocket-accept")
                 != _accept_key(self._key), "Sec-WebSocket-Accept is wrong"),
                (headers.get("sec-websocket-extensions"),
                 "an extension that was not offered"),
                (subprotocol is not None and subprotocol not in self.offers,
                 "a subprotocol that was not offered")):
            if wrong:
                raise ProtocolError(f"no WebSocket handshake: {reason}")
        self._agree(subprotocol)

    # -- frames that come in ------------------------------------------------

    def next_message(self):
        """Return the next message, str or bytes; SKIPPED or None if none."""
        if not self.opened:
            self._shake_hands()
            return SKIPPED if self.opened else None
        if self.closed:
            return None
        try:
            if self._frame is None:
                head = self._parse_frame_head()
                if head is None:
                    return None
                if head[0] >= _CLOSE:
                    return self._take_control(*head)
                self._begin_frame(*head)
            return self._take_payload()
        except _Violation as violation:
            self._part(violation.code, str(violation))
            raise

    def _parse_frame_head(self):
        """Return (opcode, final, mask, size of the head, length of the
        payload), or None: more bytes are needed.  5.2.
        """
        buffer = self.buffer
        if len(buffer) < 2:
            return None
        opcode, final = buffer[0] & 0x0F, buffer[0] & _FINAL
        length, size, least = buffer[1] & 0x7F, 2, 0
        self._check_frame(opcode, final, length)
        if length >= 126:
            size, least = (4, 126) if length == 126 else (10, 65536)
            if len(buffer) < size:
                return None
            length = int.from_bytes(buffer[2:size], "big")
        if not least <= length < 2 ** 63:
            raise _Violation(1002, "a payload length that is badly written")
        if opcode < _CLOSE and self._size + length > self.max_message:
            raise _Violation(1009,
                             f"a message of over {self.max_message} bytes")
        mask = None
        if not self.client:
            size += 4
            if len(buffer) < size:
                return None
            mask = bytes(buffer[size - 4:size])
        return opcode, final, mask, size, length

    def _check_frame(self, opcode, final, length):
        """Raise _Violation for what the first two bytes of a frame give away.
        """
        if self.buffer[0] & 0x70:
            raise _Violation(1002, "a reserved bit is set")
        if opcode not in (_CONTINUED, _TEXT, _BINARY, _CLOSE, _PING, _PONG):
            raise _Violation(1002, f"opcode {opcode} is unknown")
        if bool(self.buffer[1] & _MASKED) == self.client:
            raise _Violation(1002, "a masked frame from the server"
                             if self.client else "a frame without mask")
        if opcode >= _CLOSE:
            if not final:
                raise _Violation(1002, "a control frame in fragments")
            if length > 125:
                raise _Violation(1002, "a control frame of over 125 bytes")
        elif (opcode == _CONTINUED) != self.amid:
            raise _Violation(1002, "a message within a message" if self.amid
                             else "a continuation of nothing")

    def _begin_frame(self, opcode, final, mask, size, length):
        """A data frame's payload follows."""
        del self.buffer[:size]
        self._frame, self._left = (final, mask), length
        self._size += length
        if opcode != _CONTINUED:
            self._kind = opcode

    def _take_payload(self):
        """Take what has come of a frame's payload; return the message that
        it completes, SKIPPED if it completes no message, None if no frame.
        """
        final, mask = self._frame
        data = bytes(self.buffer[:self._left])
        del self.buffer[:len(data)]
        self._left -= len(data)
        if mask:
            data = _xor(data, mask)
            turn = len(data) % 4
            self._frame = final, mask[turn:] + mask[:turn]
        complete = final and not self._left
        if self._kind == _TEXT:
            data = self._decode(data, complete)
        if not self._left:
            self._frame = None
        if not complete:
            if data:
                self._parts.append(data)
            return None if self._left else SKIPPED
        if self._parts:
            parts, self._parts = [*self._parts, data], []
            data = type(data)().join(parts)
        self._kind, self._size = None, 0
        return data

    def _decode(self, data, complete):
        """Decode a piece of a text; what is no UTF-8 is noticed at once."""
        data = self._tail + data
        try:
            text, used = codecs.utf_8_decode(data, "strict", complete)
        except UnicodeDecodeError:
            raise _Violation(1007, "text that is not UTF-8") from None
        self._tail = data[used:]
        return text

    def _take_control(self, opcode, _final, mask, size, length):
        """Handle a control frame, if it is complete."""
        end = size + length
        if len(self.buffer) < end:
            return None
        payload = bytes(self.buffer[size:end])
        del self.buffer[:end]
        if mask:
            payload = _xor(payload, mask)
        if opcode == _PING:
            self.output += self._encode_frame(_PONG, payload)
        elif opcode == _CLOSE:
            self._take_close(payload)
        return SKIPPED

    def _take_close(self, payload):
        """The peer says good-bye.  5.5.1."""
        code = int.from_bytes(payload[:2], "big") if payload else 1005
        if len(payload) == 1 or (payload and not _is_close_code(code)):
            raise _Violation(1002, "a close frame with a code that is none")
        try:
            reason = payload[2:].decode()
        except UnicodeDecodeError:
            raise _Violation(1007,
                             "a close reason that is not UTF-8") from None
        self.closed = f"close frame {code} {_printable(reason)}".rstrip()
        self.buffer.clear()
        if not self.mute:
            self.mute = True
            self.output += self._encode_frame(_CLOSE, payload[:2])

    @property
    def amid(self):
        """Whether a message has begun whose last frame has not."""
        return self._kind is not None

    @property
    def partial(self):
        """Whether a message or a frame has begun and is not complete."""
        return self.amid or bool(self.buffer)

    def finish(self):
        """Note what a FIN has cut short."""
        self.closed = self.closed or (
            "FIN without a close frame" if self.opened
            else f"FIN within the {self.handshake}")

    # -- frames that go out -------------------------------------------------

    def _encode_frame(self, opcode, payload):
        """Return a frame, which is always the only one of its message."""
        length = len(payload)
        masked = _MASKED if self.client else 0
        if length < 126:
            head = bytes((_FINAL | opcode, masked | length))
        elif length < 65536:
            head = struct.pack("!BBH", _FINAL | opcode, masked | 126, length)
        else:
            head = struct.pack("!BBQ", _FINAL | opcode, masked | 127, length)
        if not self.client:
            return head + payload
        mask = os.urandom(4)
        return head + mask + _xor(payload, mask)

    def encode(self, payload):
        """Return payload as a binary message."""
        return self._encode_frame(_BINARY, payload)

    def encode_text(self, text):
        """Return text as a text message."""
        return self._encode_frame(_TEXT, text.encode())

    def _part(self, code, reason=""):
        """Say good-bye, once."""
        if self.opened and not self.mute:
            self.mute = True
            self.output += self._encode_frame(
                _CLOSE, code.to_bytes(2, "big") + reason.encode()[:123])

    def farewell(self, reason):
        """Return a close frame, unless one has been sent.  7.4.1."""
        self._part(1000 if reason in ("closed", "eof") else 1001)
        data = bytes(self.output)
        self.output.clear()
        return data

# ---------------------------------------------------------------------------
# 10. TLS
#
# A framing around another one, over two memory BIOs of the ssl module: the
# loop goes on moving bytes and knows nothing of it, and the socket stays a
# plain one that can be probed (an SSLSocket refuses MSG_PEEK).
#
# Three ends are told apart: close_notify is a clean one ("eof"), a FIN
# without it is a truncation ("protocol"), since anybody on the way can send a
# FIN, and an RST is a "reset".
# ---------------------------------------------------------------------------

#: Bytes of plain text in a TLS record.
_LONGEST_RECORD = 16384


class TlsFraming(Framing):
    """TLS around a framing.  See the tls argument of listen and connect."""

    def __init__(self, context, server_hostname, inner):
        import ssl  # only a program that uses TLS pays for it
        super().__init__(inner.max_message, inner.client)
        self._want_read, self._zero_return = (ssl.SSLWantReadError,
                                              ssl.SSLZeroReturnError)
        self._error = ssl.SSLError  # the base of both
        self.inner = inner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=not inner.client,
            server_hostname=server_hostname)
        self._host = ""
        self._shaken = False  # the handshake is done
        self._failure = None  # raised once what came before is delivered
        self._head = b""      # of the record that comes in: up to 5 bytes,
        self._left = 0        # and how many bytes of it are missing

    handshake = property(lambda self: self.inner.handshake if self._shaken
                         else "TLS handshake")
    proto = property(lambda self: {"tcp": "tls", "ws": "wss"}.get(
        self.inner.proto, self.inner.proto))
    message = property(lambda self: self.inner.message)
    opened = property(lambda self: self._shaken and self.inner.opened)
    amid = property(lambda self: self.inner.amid)
    mute = property(lambda self: self._failure or self.inner.mute)

    @property
    def partial(self):
        """Whether a message, or a record, has begun and is not complete."""
        return bool(self.inner.partial or self._left or self._head)

    def begin(self, host):
        """Start the handshake."""
        self._host = host
        self._advance()

    def receive(self, data):
        """Decrypt what came from the peer."""
        self._incoming.write(data)
        self._count_records(data)
        self._advance()

    def _advance(self):
        """Go on with the handshake, then decrypt what there is."""
        try:
            if not self._shaken:
                self.tls.do_handshake()
                self._shaken = True
                self.inner.begin(self._host)
            while not self.closed:
                data = self.tls.read(_LONGEST_RECORD)
                if not data:
                    raise self._zero_return
                self.inner.receive(data)
                if not self._incoming.pending and not self.tls.pending():
                    break  # spares the exception that says so
        except self._want_read:
            pass
        except self._zero_return:
            self.closed = "close_notify from the peer"
        except self._error as failure:
            self._failure = self._failure or self._explain(failure)
        self._collect()

    def _explain(self, failure):
        """Return the ProtocolError for what the ssl module says."""
        reason = getattr(failure, "verify_message", None) or (
            failure.reason or str(failure)).lower().replace("_", " ")
        reason = re.sub(r"^(?:sslv3|tlsv1\d?) alert ", "the peer says ",
                        reason)
        if reason in ("wrong version number", "http request"):
            reason += " (plain text on a TLS port?)"
        elif reason == "no shared cipher":
            reason += " (has the listener's context a certificate?)"
        return ProtocolError("TLS handshake failed: " + reason
                             if not self._shaken else "TLS: " + reason)

    def _count_records(self, data):
        """Keep account of whether a record is incomplete (RFC 8446, 5.1)."""
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
            else:
                step = 5 - len(self._head)
                self._head += data[at:at + step]
                if len(self._head) == 5:
                    self._left = int.from_bytes(self._head[3:], "big")
                    self._head = b""
            at += step

    def next_message(self):
        """Return the next message of the framing within."""
        inner = self.inner
        try:
            payload = inner.next_message()
        finally:
            if inner.output:
                self._collect()
        if inner.closed:
            self.closed = inner.closed
        if payload is None and self._failure:
            raise self._failure
        return payload

    def finish(self):
        """Return what the end of the stream completes; raise ProtocolError
        where the peer has not announced the end.
        """
        if not self._shaken:
            raise ProtocolError("FIN within the TLS handshake")
        if not self.closed:
            raise ProtocolError("TLS truncated: FIN without close_notify")
        return self.inner.finish()

    # -- what goes out ------------------------------------------------------

    def _seal(self, data):
        """Encrypt, unless OpenSSL has given up."""
        if data and not self._failure:
            self.tls.write(data)

    def _collect(self):
        """Move what is to be sent to output."""
        if self.inner.output and self._shaken:
            self._seal(bytes(self.inner.output))
            self.inner.output.clear()
        if self._outgoing.pending:
            self.output += self._outgoing.read()

    def _flush(self):
        """Return, and forget, what is to be sent."""
        data = bytes(self.output) + self._outgoing.read()
        self.output.clear()
        return data

    def encode(self, payload):
        """Return the records that send a payload."""
        self._seal(self.inner.encode(payload))
        return self._flush()

    def encode_text(self, text):
        """Return the records that send a text."""
        self._seal(self.inner.encode_text(text))
        return self._flush()

    def farewell(self, reason):
        """Return close_notify, behind what the framing within has to say."""
        if self._shaken and not self._failure:
            with contextlib.suppress(self._error):
                self._seal(self.inner.farewell(reason))
                self.tls.unwrap()
        return self._flush()

# ---------------------------------------------------------------------------
# 11. A connection
# ---------------------------------------------------------------------------

#: The framings by name; "raw" has none: what recv() returns is the message.
_FRAMINGS = {"raw": None, "line": LineFraming, "sip": SipFraming,
             "ws": WebSocketFraming}


class Stack(NamedTuple):
    """What is between a connection's bytes and its messages."""

    name: str            #: of the framing
    factory: object      #: of the framing, None: raw
    context: object      #: an ssl.SSLContext, None: no TLS
    server_hostname: Optional[str]
    host: str            #: what connect was told, "host:port"

    @classmethod
    def of(cls, framing, tls=None, server_hostname=None, address=None):
        """Check the arguments of listen, connect and attach."""
        if isinstance(framing, str) and framing in _FRAMINGS:
            name, factory = framing, _FRAMINGS[framing]
        elif callable(framing) and (not isinstance(framing, type)
                                    or issubclass(framing, Framing)):
            name, factory = getattr(framing, "__name__", "custom"), framing
        else:
            raise ValueError(
                f"framing must be {', '.join(_FRAMINGS)}, a subclass of"
                " Framing or a function that returns an instance, not"
                f" {reprlib.repr(framing)}")
        if tls is not None:
            cls._check_context(tls, client=address is not None)
            if address is not None and server_hostname is None:
                server_hostname = address[0]
        elif server_hostname is not None:
            raise ValueError("server_hostname is for TLS")
        host = "" if address is None else _format_address(address)
        return cls(name, factory, tls, server_hostname, host)

    @staticmethod
    def _check_context(context, client):
        """Raise ValueError for what cannot be the tls of this side."""
        import ssl  # only a program that uses TLS pays for it
        if not isinstance(context, ssl.SSLContext):
            raise ValueError("tls must be an ssl.SSLContext,"
                             f" not {reprlib.repr(context)}")
        if context.protocol == (ssl.PROTOCOL_TLS_SERVER if client
                                else ssl.PROTOCOL_TLS_CLIENT):
            raise ValueError("tls must be a context for "
                             + ("clients" if client else "servers"))
        # Gone in TLS 1.3, for good reasons: while the peer has one under way
        # nothing can be sent, and nothing says until when.
        context.options |= ssl.OP_NO_RENEGOTIATION

    def build(self, max_message, client):
        """Return an instance for one connection, None for raw."""
        if self.context is None and self.factory is None:
            return None
        inner = (self.factory or RawFraming)(max_message, client)
        if not isinstance(inner, Framing):
            raise TypeError(f"{self.name} must return a Framing,"
                            f" not {reprlib.repr(inner)}")
        if self.context is None:
            return inner
        return TlsFraming(self.context, self.server_hostname, inner)



class Phase:
    """Where a connection is in its life; each is entered at most once.

    Not an enum: to name a member of one takes as long as a call, on the
    versions of Python before 3.12, and each message does it several times.
    """

    LISTENING = "listening"    # a listener; never anything else
    CONNECTING = "connecting"  # connect() is under way
    OPENING = "opening"        # the framing's handshake is under way
    OPEN = "open"              # usable
    DOOMED = "doomed"          # its socket is dead; the rest is delivered
    CLOSING = "closing"        # it ends as soon as what is queued is sent
    ENDED = "ended"            # its socket is closed, its event maybe queued


#: The phases in which a connection can be told things, and can send.
_LIVE = (Phase.OPEN, Phase.OPENING, Phase.CONNECTING)
#: The phases in which messages are handed over.
_RECEIVING = (Phase.OPEN, Phase.OPENING, Phase.DOOMED)


class Connection:
    """What the loop knows of a connection, or of a listener.

    A record: whoever reads it finds every number of the connection in one
    place.  The loop alone writes it.  No __dict__, since there may be tens of
    thousands of them.
    """

    __slots__ = (
        "conid", "proto", "peer", "local", "origin",    # who
        "phase", "ready", "cause",         # where in its life
        "forgotten",                       # tcp_close_connection returned 1
        "sock", "events",                  # its socket, and what is selected
        "stack", "layer", "message",       # how bytes become messages
        "waiting",                         # messages wait for the next turn
        "out", "bytes_in", "bytes_out",    # out: bytearray, or None if empty
        "wants_event",                     # tcp_enable_closed_event
        "since", "active", "lifetime",     # seconds, of the loop's clock
        "work_due", "send_due", "keepalive_due",
        "keepalive", "suspected",          # suspected since: see is_dead
        "soft_error",                      # an ICMP error that a probe met
        "wake",                            # see Deadlines
        "candidates",                      # addresses that connect() may try
        "early", "early_bytes",            # payloads sent before it is open
        "opened",                          # it has been usable
    )

    def __init__(self, conid, origin, stack, lifetime, now):
        self.conid = conid
        self.proto = "tcp"
        self.peer = self.local = ("", 0)
        self.origin = origin    # "listen", "accept", "connect" or "attach"
        self.phase = self.ready = self.cause = None
        self.forgotten = False
        self.sock = None
        self.events = 0
        self.stack = stack
        self.layer = None       # the framing's instance; None: raw
        self.message = Message
        self.waiting = False
        self.out = None
        self.bytes_in = self.bytes_out = 0
        self.wants_event = False
        self.since = now
        # The lifetime is an idle lifetime of what is open; before that the
        # connect and message timeouts count.
        self.active = NEVER
        self.lifetime = lifetime
        self.work_due = self.send_due = self.keepalive_due = NEVER
        self.keepalive = None
        self.suspected = NEVER
        self.soft_error = None
        self.wake = NEVER
        self.candidates = self.early = ()
        self.early_bytes = 0
        self.opened = False

    def bind(self, sock, peer, local):
        """Give it a socket.

        Not its bound methods, too: they would save a message next to nothing,
        and cost every connection that is held a sixth of its memory.
        """
        self.sock, self.peer, self.local = sock, peer, local

    def due(self):
        """Return the earliest of its deadlines."""
        return min(self.active + self.lifetime, self.work_due, self.send_due,
                   self.keepalive_due)

    def __repr__(self):
        return (f"<Connection conid {self.conid} {self.phase}"
                f" {_format_address(self.peer)}>")


class ConnectionInfo(NamedTuple):
    """A snapshot of a connection, see TcpOps.connection.

    Times are in seconds; deadline is a time of the loop's clock (that of
    time.monotonic unless another one was given), None if there is none.
    """

    conid: int
    proto: str
    si: str                 #: the peer's address and port
    sp: int
    Ri: str                 #: our address and port
    Rp: int
    framing: str
    state: State
    age: float              #: since the conid was handed out
    idle: float             #: since the last byte in either direction
    lifetime: float
    deadline: Optional[float]       #: when something of it comes up next
    keepalive: Optional[Keepalive]  #: as the kernel has it, None if off
    bytes_in: int
    bytes_out: int

# ---------------------------------------------------------------------------
# 12. The table of connections
# ---------------------------------------------------------------------------


class Table:
    """The connections by conid and by the peer's address.

    Conids count up and are never used twice.  A connection that has ended
    stays until its event has been told: in the handler its state is known.
    """

    def __init__(self):
        self._conids = itertools.count(1)
        self._by_conid = {}
        #: get(conid) returns the connection of a conid, or None.
        self.get = self._by_conid.get
        # (host, port): the connection; a dict by conid if there are several,
        # as with many connections of ours to one server.
        self._by_peer = {}

    def __len__(self):
        return len(self._by_conid)

    def __iter__(self):
        return iter(list(self._by_conid.values()))

    def new_conid(self):
        """Return a conid that has never been used."""
        return next(self._conids)

    def add(self, conn):
        """Make a connection known by its conid."""
        self._by_conid[conn.conid] = conn

    def remove(self, conn):
        """Forget a connection, for ever."""
        self._by_conid.pop(conn.conid, None)  # None: in a child, after fork

    def add_peer(self, conn):
        """Make a connection known by its peer's address."""
        key = conn.peer[:2]
        held = self._by_peer.setdefault(key, conn)
        if held is not conn:
            if not isinstance(held, dict):
                held = self._by_peer[key] = {held.conid: held}
            held[conn.conid] = conn

    def remove_peer(self, conn):
        """Undo add_peer."""
        key = conn.peer[:2]
        held = self._by_peer.get(key)
        if isinstance(held, dict):
            held.pop(conn.conid, None)
        if held is conn or held == {}:
            del self._by_peer[key]

    def find_peer(self, host, port):
        """Return the youngest connection with a peer, or None."""
        held = self._by_peer.get((host, port))
        if isinstance(held, dict):
            return next(reversed(held.values()))
        return held

# ---------------------------------------------------------------------------
# 13. Routes
# ---------------------------------------------------------------------------


def _handler(handler):
    """Catch @ops.request_route() and its like where they are written."""
    if not callable(handler):
        raise TypeError(f"a route is a function, not {reprlib.repr(handler)}")
    return handler


class Routes:
    """Which handler is called for what; the decorators that say so.

    Each decorator returns the function unchanged.  One handler for each
    route, as in the script language: a second one takes the first's place.
    """

    def __init__(self, closed_event, event_callback):
        self._request = self._onreply = None
        self._events = {}
        self.closed_event = closed_event
        self.event_callback = event_callback

    @property
    def closed_event(self):
        """Whose end is told: 0 nobody's, 1 every connection's, 2 that of the
        connections for which tcp_enable_closed_event was called.  Spec: 2.1.
        """
        return self._closed_event

    @closed_event.setter
    def closed_event(self, mode):
        self._closed_event = _number(mode, "closed_event", 0, 2, whole=True)

    @property
    def event_callback(self):
        """Called with the event's name, instead of any event route, if set.

        The event itself is TcpOps.event then.
        """
        return self._event_callback

    @event_callback.setter
    def event_callback(self, callback):
        if callback is not None and not callable(callback):
            raise ValueError("event_callback must be callable or None,"
                             f" not {reprlib.repr(callback)}")
        self._event_callback = callback

    def modparam(self, module, name, value):
        """Set a parameter as the script language does.  Spec: 2.

        The module is "tcpops", the parameters are closed_event and
        event_callback.  Raises ValueError for any other, and a wrong value.
        """
        if module != "tcpops" or name not in ("closed_event",
                                              "event_callback"):
            raise ValueError(
                'modparam knows "tcpops" with "closed_event" and'
                f' "event_callback", not {module!r} with {name!r}')
        setattr(self, name, value)

    def request_route(self, handler):
        """Decorator: call handler(msg) for each message received."""
        self._request = _handler(handler)
        return handler

    def onreply_route(self, handler):
        """Decorator: call handler(msg) for each message that is an answer.

        See Message.is_reply.  Without such a handler request_route's gets
        them too.
        """
        self._onreply = _handler(handler)
        return handler

    def event_route(self, name):
        """Decorator: call handler(event) for each event of that name.

        An end without a handler of its own goes to "tcp:closed".  Raises
        ValueError for a name that is not in EVENT_NAMES.  Spec: 4.
        """
        if name not in EVENT_NAMES:
            raise ValueError(f"an event is one of {', '.join(EVENT_NAMES)},"
                             f" not {reprlib.repr(name)}")

        def register(handler):
            self._events[name] = _handler(handler)
            return handler
        return register

    def event_handler(self, event):
        """Return what is to be called with an event, or None."""
        callback = self._event_callback
        if callback is not None:
            return lambda event: callback(event.name)
        handler = self._events.get(event.name)
        if handler is None and event.reason is not None:
            handler = self._events.get("tcp:closed")
        return handler

# ---------------------------------------------------------------------------
# 14. The loop
#
# One turn: wait, input and output, calls from outside, deadlines, dead
# sockets, events.  In that order, so that what has arrived is seen before a
# deadline says that nothing has.
#
# Three rules:
#
# - _end is the one way out.  It unregisters, closes, forgets and queues the
#   one event; every path leads there, and a second call changes nothing.
# - A handler is never called from inside another.  What ends meanwhile queues
#   its event; it is told when the handler has returned.
# - The selector's key carries the connection, never a descriptor's number:
#   within one batch a handler may close a connection and its number may be
#   used again.  An ended connection ignores what the batch still holds for
#   it.
# ---------------------------------------------------------------------------

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
#: A peer that closed must not kill us with SIGPIPE, even where a host program
#: has undone Python's choice to ignore it.
_NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)

#: Bytes asked of one recv(): one turn of one connection.
_RECV_SIZE = 65536
#: recv() calls on a dead socket in one turn.
_BURY = 16
#: In one turn: messages of one connection that a framing finds in what one
#: recv() brought.  Few, so that a peer that floods costs the others no time.
_SHARE = 8
#: In one turn: accepts of one listener, deadlines.
_BATCH = 64
#: recv() calls that empty a socket before it is closed: more than the largest
#: receive buffer of a default Linux (tcp_rmem, 6 MB).
_EMPTYING = 128
#: Seconds of one wait; epoll counts its milliseconds in 31 bits.
_LONGEST_WAIT = 86400
#: Seconds after which a listener that met a full table tries again, should
#: no end of a connection wake it before.
_REST = 0.1
#: Seconds between two looks at a peer that is suspected to have vanished.
_LOOK = 0.25
#: Descriptors left for the host program where max_connections is not given.
_RESERVE = 32
#: accept() errors that say "not now": listeners rest.
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
#: accept() errors of the listener itself; all others are one peer's.
_BROKEN = (errno.EBADF, errno.ENOTSOCK, errno.EINVAL, errno.EOPNOTSUPP)
_IN_PROGRESS = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)
_AGAIN = (BlockingIOError, InterruptedError)
#: send() errors that say "not now": what is to be sent is queued.
_NOT_NOW = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS,
            errno.ENOMEM)
#: Listeners bound to these have connections with various local addresses.
_EVERY_ADDRESS = ("0.0.0.0", "::")
_LINGER_RESET = struct.pack("ii", 1, 0)


def _descriptor_limit():
    """Return how many connections the process may open, less a reserve."""
    try:
        import resource
    except ImportError:  # pragma: no cover (Windows has no such limit)
        return NEVER
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return NEVER if soft == resource.RLIM_INFINITY else max(
        1, soft - _RESERVE)


#: Every Loop that lives, for fork: see Loop._abandon.
_loops = weakref.WeakSet()


def _abandon_loops():
    """In a child after fork(): let go of what belongs to the parent."""
    for loop in list(_loops):
        loop._abandon()


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows)
    os.register_at_fork(after_in_child=_abandon_loops)


def _take(queue):
    """Take out what a queue holds now, not what is added meanwhile.

    A handler that makes new work for itself does not keep the others waiting.
    """
    for _ in range(len(queue)):
        if not queue:
            return  # pragma: no cover (in a child, after fork(), tested too)
        yield queue.popleft()


def _ignore(_conn, _mask):
    """What a dead or ended connection does when it is selected: nothing."""


class Loop(Routes):
    """Moves bytes, messages, deadlines and events.  See TcpOps."""

    def __init__(self, *, closed_event=1, event_callback=None,
                 connection_lifetime=120, connect_timeout=10, send_timeout=10,
                 message_timeout=20, max_connections=None, max_message=65536,
                 max_write_buffer=1048576, clock=time.monotonic):
        super().__init__(closed_event, event_callback)
        self.connection_lifetime = connection_lifetime
        for name, value in (("connect_timeout", connect_timeout),
                            ("send_timeout", send_timeout),
                            ("message_timeout", message_timeout)):
            setattr(self, "_" + name,
                    _number(value, name, 0.001, _MAX_SECONDS))
        for name, value in (("max_message", max_message),
                            ("max_write_buffer", max_write_buffer)):
            setattr(self, "_" + name,
                    _number(value, name, 1, sys.maxsize, whole=True))
        if max_connections is None:
            self._max_connections = _descriptor_limit()
        else:
            self._max_connections = _number(
                max_connections, "max_connections", 1, sys.maxsize,
                whole=True)
        if not callable(clock):
            raise ValueError(f"clock must be callable, not {clock!r}")
        self._clock = clock
        self._start()
        _loops.add(self)

    def _start(self):
        """Set up the state; settings are checked by now."""
        self._recv_size = min(_RECV_SIZE, self._max_message)
        self._table = Table()
        self._deadlines = Deadlines()
        self._waiting = collections.deque()     # see Connection.waiting
        self._doomed = collections.deque()  # connections with a dead socket
        self._events_due = collections.deque()  # of (connection, Event)
        self._calls = collections.deque()   # of (function, arguments)
        self._live = 0          # connections with a socket
        self._opened = 0        # conids given to connections, see stats
        self._ended = dict.fromkeys(REASONS, 0)
        self._bytes_in = self._bytes_out = 0    # of the ended ones
        self._refused = 0
        self._resting = []      # listeners that met a full table
        self._complain_at = -NEVER
        self._current = None    # the connection of the handler that runs
        self._event = None      # the event of the handler that runs
        self._last_keepalive = None  # what was enabled last
        self._otcpid = None     # the current message's outbound conid,
        self._use_otcpid = False    # and whether forward heeds it
        self._turning = self._stopping = False
        self._draining = self._closing = False
        self._embedded = False  # fileno() was asked for: see _nudge
        self._handle = {        # what a connection does when it is selected
            Phase.LISTENING: self._accept,
            Phase.CONNECTING: self._connect_done,
            Phase.OPENING: self._serve,
            Phase.OPEN: self._serve,
            Phase.DOOMED: _ignore,
            Phase.CLOSING: self._flush,
            Phase.ENDED: _ignore,
        }
        self._selector = selectors.DefaultSelector()
        self._select = self._selector.select
        # stop() and call_soon() interrupt a wait by writing to this pair.
        self._waker, self._woken = socket.socketpair()
        for sock in (self._waker, self._woken):
            sock.setblocking(False)
        self.attend(self._woken, _READ, self._drain_waker)

    def attend(self, sock, events, ready):
        """Call ready(mask) whenever a socket of the host program's is ready.

        For a socket that is no connection and is to have no conid.  events
        and mask are those of the selectors module.  What ready raises is
        logged.
        """
        self._selector.register(sock, events, types.SimpleNamespace(
            sock=sock, ready=lambda _, mask: self._run_call(ready, (mask,))))

    def dismiss(self, sock):
        """Undo attend."""
        self._selector.unregister(sock).data.ready = _ignore

    # -- for the host program: settings and questions ---------------------

    @property
    def connection_lifetime(self):
        """Seconds of idleness that a new connection is allowed."""
        return self._lifetime

    @connection_lifetime.setter
    def connection_lifetime(self, lifetime):
        self._lifetime = _number(lifetime, "connection_lifetime", 0,
                                 _MAX_SECONDS)

    @property
    def conid(self):
        """The conid of the current message or event; None outside."""
        return None if self._current is None else self._current.conid

    @property
    def event(self):
        """The current event, for event_callback; None outside."""
        return self._event

    def connection(self, conid):
        """Return a ConnectionInfo of a connection or listener, or None."""
        conn = self._table.get(conid) if type(conid) is int else None
        if conn is None or conn.forgotten or conn.phase is Phase.ENDED:
            return None
        now = self._clock()
        due = conn.due()
        return ConnectionInfo(
            conn.conid, conn.proto, *conn.peer[:2], *conn.local[:2],
            conn.stack.name, self._state(conn), now - conn.since,
            max(0.0, now - conn.active), conn.lifetime,
            None if due == NEVER else due, self._kernel_keepalive(conn),
            conn.bytes_in, conn.bytes_out)

    def connections(self):
        """Return a list of the ConnectionInfo of every connection."""
        infos = (self.connection(conn.conid) for conn in self._table
                 if conn.phase is not Phase.LISTENING)
        return [info for info in infos if info is not None]

    def listeners(self):
        """Return a list of the ConnectionInfo of every listener."""
        return [self.connection(conn.conid) for conn in self._table
                if conn.phase is Phase.LISTENING]

    def stats(self):
        """Return counts since the start, as a dict.

        opened (connections; each ends once), ended ({reason: count}),
        accepts_refused (how often a listener had to rest because descriptors
        or max_connections ran out), bytes_in and bytes_out.
        """
        live = [conn for conn in self._table if conn.phase is not Phase.ENDED]
        return {
            "opened": self._opened,
            "ended": dict(self._ended),
            "accepts_refused": self._refused,
            "bytes_in": self._bytes_in + sum(c.bytes_in for c in live),
            "bytes_out": self._bytes_out + sum(c.bytes_out for c in live),
        }

    # -- for the host program: connections --------------------------------

    def listen(self, host, port, *, framing="raw", tls=None,
               backlog=socket.SOMAXCONN, reuse_port=False):
        """Accept connections; return the listener's conid.

        framing is "raw", "line", "sip", "ws" or a subclass of Framing, tls an
        ssl.SSLContext for servers, with its certificate.  host is an address
        or a name ("" for every IPv4 address), port 0 lets the system choose:
        connection(conid).Rp says what it chose.  "::" is every IPv6 address
        and no IPv4 one.  Raises OSError.
        """
        stack = Stack.of(framing, tls)
        layer = stack.build(self._max_message, client=False)
        self._check_taking()
        family, address = _resolve(host or "0.0.0.0", port, passive=True)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # pragma: no branch (Windows)
                # There it would let any program take our port.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                # The same on every system, and 0.0.0.0 may be had beside it.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setblocking(False)
            sock.bind(address)
            sock.listen(backlog)
            local = sock.getsockname()
        except BaseException:
            sock.close()
            raise
        conn = self._begin(sock, Phase.LISTENING, "listen", stack,
                           local=local)
        conn.proto = "tcp" if layer is None else layer.proto
        self._watch(conn, _READ)
        if conn.cause is not None:  # the selector has no room for it
            raise OSError(conn.cause.errno, conn.cause.detail)
        return conn.conid

    def connect(self, host, port, *, framing="raw", tls=None,
                server_hostname=None):
        """Start to connect; return the conid.

        tls is an ssl.SSLContext for clients, which says what is verified;
        server_hostname is the name in the certificate where it is not host.

        What becomes of it is told by an event: tcp:opened, or an end.  What
        is sent meanwhile is queued.  A name is looked up at once, which may
        block, and its addresses are tried in turn, all within
        connect_timeout.  Raises OSError (no such name, no descriptor).
        """
        stack = Stack.of(framing, tls, server_hostname, (host, port))
        self._check_room()
        addresses = _resolve(host, port)
        layer = stack.build(self._max_message, client=True)
        sock, address, rest = self._socket_for(addresses)
        conn = self._begin(sock, Phase.CONNECTING, "connect", stack, layer,
                           address)
        conn.candidates = rest
        conn.work_due = conn.since + self._connect_timeout
        self._arm(conn, conn.work_due)
        self._start_connect(conn)
        return conn.conid

    def attach(self, sock, *, framing="raw"):
        """Adopt a connected TCP socket; return its conid.

        The socket belongs to the loop from then on: do not close it.  Raises
        ValueError for any other kind of socket, OSError if not connected.
        """
        stack = Stack.of(framing)
        self._check_room()
        ssl = sys.modules.get("ssl")  # not loaded: then it is not one
        if (not isinstance(sock, socket.socket)
                or ssl and isinstance(sock, ssl.SSLSocket)
                or sock.type != socket.SOCK_STREAM
                or sock.family not in (socket.AF_INET, socket.AF_INET6)):
            raise ValueError("attach takes a plain TCP socket,"
                             f" not {reprlib.repr(sock)}")
        peer, local = sock.getpeername(), sock.getsockname()
        key = self._selector.get_map().get(sock.fileno())
        if key is not None and key.data.sock is sock:
            raise ValueError(f"{sock!r} is attached already")
        layer = stack.build(self._max_message, client=False)
        sock.setblocking(False)
        conn = self._begin(sock, Phase.OPENING, "attach", stack, layer,
                           peer, local)
        self._greet(conn)
        return conn.conid

    # -- for the host program: running ------------------------------------

    def run(self):
        """Run until stop() or close() is called.

        Raises RuntimeError inside a handler and after close().
        """
        self._check_outside()
        # A signal that comes between Python's last look and epoll_wait would
        # not be noticed before something else happens; so it wakes us too.
        wakeup = None
        with contextlib.suppress(ValueError):  # not in the main thread
            wakeup = signal.set_wakeup_fd(self._waker.fileno(),
                                          warn_on_full_buffer=False)
        self._turning = True
        try:
            while not self._stopping and not self._closing:
                self._turn(self._patience(None))
        finally:
            self._stopping = False
            if wakeup is not None:
                signal.set_wakeup_fd(wakeup)
            self._rest_from_turning()

    def step(self, timeout=None):
        """Wait until something happens, and handle it.

        Waits for timeout seconds at the most, None for as long as it takes.
        Returns how many things were handled, 0 if time ran out.  Raises
        RuntimeError inside a handler and after close().
        """
        self._check_outside()
        if timeout is not None:
            timeout = _number(timeout, "timeout", 0, NEVER)
        self._turning = True
        try:
            while True:
                wait = self._patience(timeout)
                handled = self._turn(wait)
                if handled or self._stopping:
                    return handled
                if timeout is not None:
                    # The wait was cut short by a deadline that had been put
                    # off meanwhile: the caller's time goes on.
                    timeout -= wait
                    if timeout <= 0:
                        return 0
        finally:
            self._rest_from_turning()

    def _rest_from_turning(self):
        """A turn is over; close() in one of its handlers waited for that."""
        self._turning = False
        if self._closing:
            self._release()

    def stop(self):
        """Make run() return after this turn.

        Safe from a signal handler and from any thread.  Called before run(),
        it makes that return at once.  A loop of your own around step() should
        give it a timeout: only run() is woken by a signal that comes at the
        very moment at which the wait begins.
        """
        self._stopping = True
        self._wake()

    def call_soon(self, function, *args):
        """Call function(*args) in the loop's next turn; safe from any thread.

        Raises RuntimeError after close().
        """
        self._check_running()
        self._calls.append((function, args))
        self._wake()

    def drain(self, timeout):
        """Stop accepting, send what is queued, and end every connection.

        Returns when all have ended, after timeout seconds (of real time) at
        the latest.  Their reason is "shutdown", or "reset" after an RST.
        """
        timeout = _number(timeout, "timeout", 0, _MAX_SECONDS)
        self._check_outside()
        deadline = time.monotonic() + timeout
        self._draining = True
        try:
            cause = Cause("shutdown", None, "drained")
            for conn in self._table:
                self._last_look(conn)
                if conn.phase is not Phase.DOOMED:
                    self._finish(conn, cause)
            while self._live and time.monotonic() < deadline:
                self.step(max(0, deadline - time.monotonic()))
            for conn in self._table:
                self._end(conn, cause)
            while self._events_due:
                self.step(0)
        finally:
            self._draining = False

    def close(self):
        """End every connection at once, tell the events, free everything.

        From inside a handler: when that has returned.  A second call does
        nothing.
        """
        if self._closing:
            return
        self._closing = True
        for conn in self._table:
            self._last_look(conn)
            self._end(conn, Cause("shutdown", None, "the loop was closed"))
        if not self._turning:
            self._release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def fileno(self):
        """Return a descriptor that is readable when step(0) has work to do.

        With next_deadline() it lets any other event loop drive this one: call
        step(0) when it is readable and when the deadline has come, and ask
        for the next deadline after each step.
        Raises OSError where the system's selector has none (Windows).
        """
        self._check_running()
        if not hasattr(self._selector, "fileno"):  # pragma: no cover (Windows)
            raise OSError(errno.ENOTSUP, "this selector has no descriptor")
        self._embedded = True
        return self._selector.fileno()

    def next_deadline(self):
        """Return the time of the clock at which step(0) is due, or None.

        fileno() turns readable when it has become earlier.
        """
        if self._has_work():
            return self._clock()
        due = self._deadlines.next()
        return None if due == NEVER else due

    # -- one turn ---------------------------------------------------------

    def _check_running(self):
        if self._closing:
            raise RuntimeError("this TcpOps is closed")

    def _check_outside(self):
        self._check_running()
        if self._turning:
            raise RuntimeError("run(), step() and drain() cannot be called"
                               " from inside a handler")

    def _has_work(self):
        """Whether the next turn has something to do without any wait."""
        return bool(self._events_due or self._waiting or self._doomed
                    or self._calls)

    def _patience(self, timeout):
        """Return how long the next wait may take, None for ever."""
        if self._has_work():
            return 0
        due = self._deadlines.next()
        if due == NEVER:
            return timeout and min(timeout, _LONGEST_WAIT)
        wait = min(due - self._clock(), _LONGEST_WAIT)
        if timeout is not None and timeout < wait:
            return timeout
        return wait if wait > 0 else 0

    def _turn(self, wait):
        """Wait, then handle what there is; return how many things that was."""
        # Wait.  Selectors round the time up: never early, never spinning.
        ready = self._select(wait)
        # Deadlines that come up while handlers run are for the next turn:
        # what peers have sent in the meantime is read before.
        now = self._clock()
        handled = len(ready)
        # Input and output.
        for key, mask in ready:
            conn = key.data
            conn.ready(conn, mask)
            if self._events_due:
                self._tell()
        # Messages that were left when their connection's share was used up,
        # and calls from outside.
        if self._waiting or self._calls:
            for conn in _take(self._waiting):
                conn.waiting = False
                conn.active = self._clock()  # it is not idle: we lag behind
                self._deliver(conn)
                self._rewatch(conn)
                handled += 1
            for call in _take(self._calls):
                self._run_call(*call)
                handled += 1
        # Deadlines.
        if self._deadlines.next() <= now:
            handled += self._expire(now)
        # Dead sockets, and events.
        if self._doomed:
            for conn in _take(self._doomed):
                try:
                    self._bury(conn)
                finally:  # Ctrl-C in a handler must not make it immortal
                    if conn.phase is Phase.DOOMED:
                        self._doomed.append(conn)
                handled += 1
        if self._events_due:
            handled += self._tell()
        return handled

    def _wake(self):
        """Interrupt a wait; safe from a signal handler and any thread."""
        # Full: a wake-up is on its way.  Closed: nobody waits.
        with contextlib.suppress(BlockingIOError, OSError):
            self._waker.send(b"\0", _NOSIGNAL)

    def _nudge(self):
        """Tell whoever drives the loop by fileno() that it has new work."""
        if self._embedded and not self._turning:
            self._wake()

    def _drain_waker(self, _mask):
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)

    @staticmethod
    def _run_call(function, arguments):
        """Call a function of the host program's."""
        try:
            function(*arguments)
        except Exception:
            log.exception("%r raised", function)

    def _release(self):
        """Tell the last events and give the descriptors back."""
        failure = None
        self._turning = True  # a handler may not start another turn
        while self._events_due:
            try:
                self._tell()
            except BaseException as error:  # Ctrl-C: the rest is told, too
                failure = failure or error
        self._turning = False
        self._selector.close()
        self._waker.close()
        self._woken.close()
        if failure:
            raise failure

    def _abandon(self):
        """Close this process's copies and touch nothing that is shared.

        After fork() the selector and the sockets are the parent's too: to
        unregister, to read or to end something here would be felt there.
        Not to close would keep the parent's peers from ever seeing its FIN.
        """
        self._closing = True
        with contextlib.suppress(ValueError):  # not in the main thread
            wakeup = signal.set_wakeup_fd(-1)
            if wakeup not in (-1, self._waker.fileno()):
                signal.set_wakeup_fd(wakeup)  # somebody else's
        for conn in self._table:
            self._enter(conn, Phase.ENDED)
            with contextlib.suppress(OSError):
                conn.sock.close()
        self._table, self._deadlines = Table(), Deadlines()
        for work in (self._waiting, self._doomed, self._events_due,
                     self._calls):
            work.clear()
        self._live = 0
        self._release()

    # -- handlers and events ----------------------------------------------
    #
    # What a handler raises is logged and changes nothing.

    def _message(self, conn, msg):
        """Hand a message to its route."""
        self._current = conn
        handler = self._request
        try:
            if self._onreply is not None and msg.is_reply:
                handler = self._onreply
            if handler is not None:
                handler(msg)
        except Exception:
            self._log_raised(conn, handler)
        finally:
            self._current = self._otcpid = None
            self._use_otcpid = False

    def _call_event(self, conn, event):
        """Hand an event to its route."""
        self._current, self._event = conn, event
        handler = self.event_handler
        try:
            handler = handler(event)
            if handler is not None:
                handler(event)
        except Exception:
            self._log_raised(conn, handler)
        finally:
            self._current = self._event = None

    @staticmethod
    def _log_raised(conn, handler):
        log.exception("conid %d: %s raised", conn.conid,
                      getattr(handler, "__qualname__", handler))

    def _queue_event(self, conn, name, cause):
        """Note an event; it is told when no handler runs."""
        self._events_due.append((conn, Event(
            conn.conid, name, *cause, conn.proto, *conn.peer[:2],
            *conn.local[:2], self._clock() - conn.since, conn.bytes_in,
            conn.bytes_out)))
        self._nudge()

    def _tell(self):
        """Call the routes of the events that are due; return how many."""
        count = 0
        for conn, event in _take(self._events_due):
            count += 1
            try:
                self._call_event(conn, event)
            finally:
                if event.reason is not None:
                    self._table.remove(conn)
        return count

    # -- the life of a connection -----------------------------------------

    def _enter(self, conn, phase):
        """Change a connection's phase."""
        if conn.phase in _LIVE and phase not in _LIVE:
            self._table.remove_peer(conn)
        conn.phase = phase
        conn.ready = self._handle[phase]

    def _arm(self, conn, due):
        """Bring the heap up to date after one of the deadlines was set."""
        if due < conn.wake:
            if self._embedded and due < self._deadlines.next():
                self._nudge()
            self._deadlines.arm(conn, due)

    def _begin(self, sock, phase, origin, stack, layer=None, peer=("", 0),
               local=("", 0)):
        """Give a conid to a socket; return the connection."""
        conn = Connection(self._table.new_conid(), origin, stack,
                          self._lifetime, self._clock())
        if layer is not None:
            conn.layer, conn.proto = layer, layer.proto
        conn.bind(sock, peer, local)
        self._table.add(conn)
        if phase is not Phase.LISTENING:
            self._live += 1
            self._opened += 1
            self._table.add_peer(conn)
        self._enter(conn, phase)
        return conn

    def _greet(self, conn):
        """A connection stands: let its framing begin, or it is open."""
        if conn.layer is not None:
            try:
                conn.layer.begin(conn.stack.host)
            except Exception as error:
                self._framing_failed(conn, error)
                return
            self._speak(conn)
        if conn.layer is None or conn.layer.opened:
            self._open(conn)
        else:
            conn.work_due = self._clock() + self._message_timeout
            self._arm(conn, conn.work_due)
        self._rewatch(conn)

    def _open(self, conn):
        """A connection has become usable."""
        log.debug("conid %d is open, %s", conn.conid, conn.peer)
        conn.opened = True
        if not conn.forgotten:
            self._queue_event(conn, "tcp:opened", (None, None, ""))
        if conn.layer is not None:
            conn.message = conn.layer.message
        if conn.phase is Phase.DOOMED:
            return  # its socket has died in the handshake
        self._enter(conn, Phase.OPEN)
        conn.work_due = NEVER
        conn.active = self._clock()
        self._arm(conn, conn.active + conn.lifetime)
        if conn.layer is not None and conn.layer.mute:
            return  # the end has come with the handshake
        early, conn.early, conn.early_bytes = conn.early, (), 0
        try:
            for payload in early:
                self._write(conn, self._encode(conn, payload))
        except Exception as error:
            self._framing_failed(conn, error)
        if conn.forgotten:
            self._finish(conn, conn.cause)

    def _finish(self, conn, cause):
        """End a connection as soon as what is queued has been sent."""
        conn.cause = conn.cause or cause
        if conn.phase is Phase.CLOSING:
            return
        if conn.early and cause.state is State.NOT_FOUND:
            conn.forgotten = True  # _open comes back to it
            return
        if conn.phase in (Phase.OPENING, Phase.OPEN):
            self._write(conn, self._farewell(conn))
        if conn.out and conn.phase in (Phase.OPENING, Phase.OPEN):
            conn.work_due = NEVER
            self._enter(conn, Phase.CLOSING)
            self._rewatch(conn)
        else:
            self._end(conn)

    def _conclude(self, conn, cause):
        """What the peer's bytes say is the end, whatever its socket says.

        They came first, also where a probe has met a FIN or an RST before
        they were read.
        """
        if conn.phase in (Phase.CLOSING, Phase.ENDED):
            return  # a handler was quicker
        if not conn.forgotten:
            conn.cause = None
        self._finish(conn, cause)

    def _doom(self, conn, cause):
        """A socket is dead: its connection ends in this turn or the next.

        Not at once, since a handler may be running and since what the socket
        still holds is delivered first.  Nor by waiting for the kernel, since
        the error that it would tell has been consumed.
        """
        conn.cause = conn.cause or cause
        if conn.phase not in _LIVE:
            self._end(conn)
            return
        self._enter(conn, Phase.DOOMED)
        conn.out = None
        self._deadlines.disarm(conn)
        self._watch(conn, 0)
        self._doomed.append(conn)
        self._postpone(conn)
        self._nudge()

    def _bury(self, conn):
        """Deliver what a dead socket still holds, then end the connection.

        A share of it in each turn: there may be megabytes.
        """
        for _ in range(_BURY):
            if conn.phase is not Phase.DOOMED or conn.waiting:
                return
            try:
                data = conn.sock.recv(self._recv_size)
            except OSError:
                data = b""
            if not data:
                break
            self._receive(conn, data)
        else:
            return
        if conn.cause.reason == "eof":
            self._end_of_stream(conn)
        self._end(conn)

    def _end(self, conn, cause=None):
        """End a connection or a listener: the one way out."""
        if conn.phase is Phase.ENDED:
            return
        listening = conn.phase is Phase.LISTENING
        conn.cause = conn.cause or cause
        if conn.soft_error and conn.cause.errno == errno.ETIMEDOUT:
            # As the kernel would have said, had no probe asked before.
            conn.cause = conn.cause._replace(
                errno=conn.soft_error, detail=os.strerror(conn.soft_error))
        unsent = len(conn.out or ()) + conn.early_bytes
        if unsent and conn.cause.reason != "send":
            conn.cause = conn.cause._replace(
                detail=f"{conn.cause.detail}, {unsent} bytes unsent")
        self._enter(conn, Phase.ENDED)
        self._deadlines.disarm(conn)
        self._watch(conn, 0)
        self._close_socket(conn)
        conn.out = conn.layer = None
        conn.early = ()
        log.debug("conid %d has ended, %s: %s", conn.conid, *conn.cause[::2])
        if listening:
            self._table.remove(conn)
            return
        self._live -= 1
        self._bytes_in += conn.bytes_in
        self._bytes_out += conn.bytes_out
        self._ended[conn.cause.reason] += 1
        if self._closed_event == 1 or (self._closed_event == 2
                                       and conn.wants_event):
            self._queue_event(conn, REASONS[conn.cause.reason], conn.cause)
        else:
            self._table.remove(conn)
        if self._resting:
            self._resume()

    @staticmethod
    def _farewell(conn):
        """Return what a connection's framing says before we close."""
        if conn.layer is not None:
            try:
                return conn.layer.farewell(conn.cause.reason)
            except Exception:
                log.exception("conid %d: framing %s raised", conn.conid,
                              conn.stack.name)
        return b""

    def _close_socket(self, conn):
        """Close a connection's socket so that the peer learns the truth."""
        try:
            if conn.out:
                # The stream is cut short: RST, for a FIN would say that it
                # is complete, and no orphan that the kernel goes on serving.
                conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                     _LINGER_RESET)
            elif conn.cause is not None and conn.cause.errno is None:
                farewell = self._farewell(conn)
                if farewell:
                    conn.bytes_out += conn.sock.send(farewell, _NOSIGNAL)
                # Unread bytes would turn the FIN into an RST, which destroys
                # what the peer has not read yet of ours.  Ends with EAGAIN
                # or FIN, or with a peer that sends faster than we read.
                if conn.bytes_out:
                    any(not conn.sock.recv(_RECV_SIZE)
                        for _ in range(_EMPTYING))
        except OSError:
            pass  # so the peer knows already, or never will
        try:
            conn.sock.close()
        except OSError:
            pass

    # -- input and output -------------------------------------------------

    def _watch(self, conn, events):
        """Have the selector look for these events, 0 for none."""
        before, conn.events = conn.events, events
        if before == events:
            return
        try:
            if not events:
                self._selector.unregister(conn.sock)
            elif before:
                self._selector.modify(conn.sock, events, conn)
            else:
                self._register(conn)
        except (KeyError, ValueError, OSError) as error:
            # Closed behind our back, or the system has no room for it.
            conn.events = 0
            self._doom(conn, Cause.of_errno(
                getattr(error, "errno", None) or errno.EBADF))

    def _register(self, conn):
        """Register a connection with the selector."""
        number = conn.sock.fileno()
        if number in self._selector.get_map():
            # The number belonged to a socket that was closed behind our back;
            # the kernel has forgotten that one, the selector has not.  It
            # must not close the number once more, for it is ours now.
            stale = self._selector.get_key(number).data
            self._selector.unregister(number)
            if stale.sock.fileno() == number:
                stale.sock.detach()
            if isinstance(stale, Connection):  # else: see attend
                stale.events = 0
                self._doom(stale, Cause.of_errno(errno.EBADF))
        self._selector.register(conn.sock, conn.events, conn)

    def _rewatch(self, conn):
        """Have the selector look for what the connection's state allows."""
        events = _WRITE if conn.out else 0
        if self._over(conn):
            if conn.phase is Phase.OPEN:
                # We do not read: it is not the peer's fault if a message
                # is not complete.
                conn.work_due = NEVER
        elif (conn.phase in (Phase.OPENING, Phase.OPEN)
              and not conn.waiting):
            events |= _READ
        self._watch(conn, events)

    def _over(self, conn):
        """Whether a connection may queue, and so should read, nothing more."""
        return (conn.out is not None
                and len(conn.out) >= self._max_write_buffer)

    def _serve(self, conn, mask):
        """Do what an open connection was selected for."""
        if conn.out is not None and mask & _WRITE:
            self._flush(conn)
        # Asked again: the batch is older than what handlers did meanwhile.
        if not (mask & _READ and conn.events & _READ):
            return
        # Once.  What is left is selected again, after the others.
        try:
            data = conn.sock.recv(self._recv_size)
        except _AGAIN:
            return
        except OSError as error:
            self._end(conn, Cause.of_errno(error.errno))
            return
        if data:
            self._receive(conn, data)
        else:
            self._end_of_stream(conn)

    def _receive(self, conn, data):
        """Take what came from the peer."""
        conn.bytes_in += len(data)
        conn.active = self._clock()
        if conn.layer is None:
            self._message(conn, Message(self, conn, data))
        else:
            self._deliver(conn, data)

    def _end_of_stream(self, conn):
        """The peer has sent FIN: all before it has been delivered."""
        layer, payload, detail = conn.layer, None, "FIN from the peer"
        if layer is not None:
            try:
                payload = layer.finish()
            except Exception as error:
                self._framing_failed(conn, error)
                return
            detail = layer.closed or detail
        if payload is not None and conn.opened:
            self._message(conn, conn.message(self, conn, payload))
        self._conclude(conn, Cause("eof", None, detail))

    def _deliver(self, conn, data=b""):
        """Hand over the messages that a framing holds, up to a turn's share.

        data is what has been received just now.  Stops where a handler has
        closed the connection or has queued more than it may; _flush comes
        back when the queue is shorter.
        """
        layer = conn.layer
        count, anew = 0, False
        try:
            if data:
                layer.receive(data)
                if layer.output or not conn.opened:
                    self._greeted(conn)
            while conn.phase in _RECEIVING and not self._over(conn):
                if count == _SHARE:
                    if anew:
                        conn.work_due = NEVER
                    self._postpone(conn)
                    break
                payload = layer.next_message()
                if layer.output or not conn.opened:
                    self._greeted(conn)
                    if conn.phase not in _RECEIVING:
                        break
                if payload is None:
                    if layer.closed:
                        self._end_of_stream(conn)
                    else:
                        self._time_message(conn, layer.partial, anew)
                    break
                count += 1
                if payload is SKIPPED:
                    anew = anew or not layer.amid
                else:
                    anew = True
                    self._message(conn, conn.message(self, conn, payload))
        except Exception as error:
            self._framing_failed(conn, error)
        except BaseException:
            self._postpone(conn)  # Ctrl-C in a handler loses no message
            raise

    def _greeted(self, conn):
        """Send what a framing has to say; its handshake may be done."""
        self._speak(conn)
        # None: a callback of the TLS context has closed it.
        if not conn.opened and conn.layer is not None and conn.layer.opened:
            self._open(conn)
            self._tell()

    def _framing_failed(self, conn, error):
        """End a connection whose framing cannot go on."""
        detail = str(error)
        if not isinstance(error, ProtocolError):
            log.error("conid %d: framing %s raised", conn.conid,
                      conn.stack.name, exc_info=error)
            detail = f"the framing raised {error!r}"
        self._speak(conn)
        self._conclude(conn, Cause("protocol", None, detail))

    def _time_message(self, conn, partial, is_new=False):
        """Start, go on with or stop the time that a message may take."""
        if conn.phase is not Phase.OPEN:
            return
        if not partial:
            conn.work_due = NEVER
        elif is_new or conn.work_due == NEVER:
            conn.work_due = conn.active + self._message_timeout
            self._arm(conn, conn.work_due)

    def _postpone(self, conn):
        """Leave the rest of a connection's messages to the next turn."""
        if (conn.phase in _RECEIVING and conn.layer is not None
                and not conn.waiting):
            conn.waiting = True
            self._waiting.append(conn)
            self._rewatch(conn)

    def _speak(self, conn):
        """Send what a framing has to say by itself."""
        layer = conn.layer
        if layer is not None and layer.output:
            data = bytes(layer.output)
            layer.output.clear()
            self._write(conn, data)

    def _send_on(self, conn, payload):
        """Send a payload on a connection; return a Result.  See send."""
        if type(payload) is not bytes:
            payload = _payload(payload)
        if conn.phase is not Phase.OPEN:
            return self._send_early(conn, payload)
        layer = conn.layer
        if (conn.out is not None and self._over(conn)
                or layer is not None and layer.mute):
            log.debug("conid %d takes nothing to send", conn.conid)
            return _FAILURE
        if layer is not None or type(payload) is str:
            payload = self._encode(conn, payload)
        return _SUCCESS if self._write(conn, payload) else _FAILURE

    def _send_early(self, conn, payload):
        """Keep a payload until connect and a framing's handshake are done."""
        if (conn.phase not in _LIVE or conn.forgotten
                or conn.early_bytes >= self._max_write_buffer):
            log.debug("conid %d takes nothing to send", conn.conid)
            return _FAILURE
        conn.early = conn.early or []
        conn.early_bytes += len(payload.encode() if type(payload) is str
                                else payload)
        conn.early.append(payload)
        return _SUCCESS

    @staticmethod
    def _encode(conn, payload):
        """Return the bytes that send a payload on a connection."""
        layer = conn.layer
        if type(payload) is str:
            return (payload.encode() if layer is None
                    else layer.encode_text(payload))
        return payload if layer is None else layer.encode(payload)

    def _write(self, conn, data):
        """Send bytes, queue what the kernel does not take.

        Returns whether the connection still stands.
        """
        sent = 0
        if conn.phase is Phase.DOOMED:
            return False
        if conn.out is None and data:
            try:
                sent = conn.sock.send(data, _NOSIGNAL)
            except OSError as error:
                if error.errno not in _NOT_NOW:
                    self._doom(conn, Cause.of_errno(error.errno))
                    return False
            else:
                conn.bytes_out += sent
                conn.active = self._clock()
        if sent < len(data):
            self._queue(conn, data, sent)
        return True

    def _queue(self, conn, data, sent):
        """Queue what the kernel has not taken of data."""
        if conn.out is not None:
            conn.out += data
        else:
            conn.out = bytearray(memoryview(data)[sent:])
            conn.send_due = self._clock() + self._send_timeout
            self._arm(conn, conn.send_due)
        self._rewatch(conn)

    def _flush(self, conn, _mask=None):
        """Send what is queued, as much as the kernel takes."""
        try:
            sent = conn.sock.send(conn.out, _NOSIGNAL)
        except OSError as error:
            if error.errno not in _NOT_NOW:
                self._doom(conn, Cause.of_errno(error.errno))
            return
        was_over = self._over(conn)
        del conn.out[:sent]
        conn.bytes_out += sent
        conn.active = self._clock()
        conn.send_due = conn.active + self._send_timeout
        if not conn.out:
            conn.out = None
            conn.send_due = NEVER
            if conn.phase is Phase.CLOSING:
                self._end(conn)
                return
        if was_over and not self._over(conn):
            self._postpone(conn)  # what the framing still holds goes first
        self._rewatch(conn)

    # -- listeners and connect() ------------------------------------------

    def _check_taking(self):
        """Raise what listen, connect and attach raise at a wrong time."""
        self._check_running()
        if self._draining:
            raise RuntimeError("this TcpOps is being drained")

    def _check_room(self):
        """Raise what connect and attach raise where there is no room."""
        self._check_taking()
        if self._live >= self._max_connections:
            raise OSError(errno.EMFILE, "max_connections reached")

    def _accept(self, listener, _mask):
        """Accept what waits at a listener, a turn's share at the most."""
        for count in range(_BATCH):
            if self._live >= self._max_connections:
                if not count:  # else: whether more wait is not known yet
                    self._rest(listener, "max_connections reached")
                return
            try:
                sock, peer = listener.sock.accept()
            except _AGAIN:
                return
            except OSError as error:
                if error.errno in _FULL:
                    self._rest(listener, error.strerror)
                    return
                if error.errno in _BROKEN:
                    log.error("conid %d stops listening: %s", listener.conid,
                              error.strerror)
                    self._end(listener, Cause.of_errno(error.errno))
                    return
                log.debug("accept: %s", error.strerror)  # that peer's, gone
            else:
                self._admit(listener, sock, peer)

    def _admit(self, listener, sock, peer):
        """Make an accepted socket a connection."""
        try:
            layer = listener.stack.build(self._max_message, client=False)
            sock.setblocking(False)
            local = listener.local
            if local[0] in _EVERY_ADDRESS:
                local = sock.getsockname()
        except Exception:
            log.exception("conid %d: an accepted connection is dropped",
                          listener.conid)
            sock.close()
            return
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # macOS: EINVAL if reset by now
        self._greet(self._begin(sock, Phase.OPENING, "accept",
                                listener.stack, layer, peer, local))

    def _rest(self, listener, why):
        """Let a listener rest: it would be selected for ever and in vain."""
        self._refused += 1
        now = self._clock()
        if now >= self._complain_at:
            log.warning("conid %d accepts nothing for now: %s",
                        listener.conid, why)
            self._complain_at = now + 1
        self._watch(listener, 0)
        self._resting.append(listener)
        # Descriptors may come free anywhere in the process.
        listener.work_due = now + _REST
        self._arm(listener, listener.work_due)

    def _resume(self):
        """Let the listeners try again: there may be room."""
        resting, self._resting = self._resting, []
        for listener in resting:
            if listener.phase is Phase.LISTENING:
                listener.work_due = NEVER
                self._watch(listener, _READ)

    @staticmethod
    def _socket_for(addresses):
        """Return (socket to connect with, address, the addresses left).

        Raises OSError where the system has a socket for none of them.
        """
        failure = OSError(errno.EADDRNOTAVAIL, "no address is left")
        for count, (family, address) in enumerate(addresses, 1):
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                failure = error
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock, address, addresses[count:]
        raise failure

    def _start_connect(self, conn):
        """Connect to the peer; if that fails at once, to the next address."""
        while True:
            number = conn.sock.connect_ex(conn.peer)
            if number in _IN_PROGRESS:
                conn.local = conn.sock.getsockname()
                self._watch(conn, _WRITE)
                return
            if not self._next_address(conn):
                self._doom(conn, Cause.of_errno(number, connecting=True))
                return

    def _next_address(self, conn):
        """Take the next address that connect() found; return if there is."""
        try:
            sock, address, rest = self._socket_for(conn.candidates)
        except OSError:
            return False
        self._watch(conn, 0)
        self._close_socket(conn)
        self._table.remove_peer(conn)
        conn.candidates = rest
        conn.bind(sock, address, ("", 0))
        self._table.add_peer(conn)
        return True

    def _connect_done(self, conn, _mask):
        """A connect() may have ended, one way or the other."""
        state, number, _ = _look(conn.sock)
        if state is State.OK or number is None:
            number = 0
            try:
                conn.sock.getpeername()
            except OSError:
                return  # not yet: the batch speaks of an address before
        self._connect_result(conn, number)

    def _connect_result(self, conn, number):
        """Go on with the errno that a connect() has ended with, or 0."""
        if number in (0, errno.EPIPE, errno.ECONNRESET):
            # Connected, and perhaps ended since: FIN and RST, or an RST,
            # maybe with data before.  In the handshake it is ECONNREFUSED.
            conn.local = conn.sock.getsockname()
            self._enter(conn, Phase.OPENING)
            self._greet(conn)
            if number:
                self._doom(conn, Cause.of_errno(number))
        elif self._next_address(conn):
            self._start_connect(conn)
        else:
            self._doom(conn, Cause.of_errno(number, connecting=True))

    # -- deadlines --------------------------------------------------------

    def _expire(self, now):
        """Handle the deadlines that have come up; return how many had."""
        handled = 0
        for _ in range(_BATCH):
            conn = self._deadlines.pop(now)
            if conn is None:
                break
            if conn.due() <= now:
                self._come_due(conn, now)
                handled += 1
            if conn.phase not in (Phase.DOOMED, Phase.ENDED):
                self._deadlines.arm(conn, conn.due())
        return handled

    def _come_due(self, conn, now):
        """The earliest of a connection's deadlines has come up."""
        due = conn.due()
        if conn.phase is Phase.LISTENING:
            self._resume()
        elif due == conn.work_due and conn.phase is Phase.CONNECTING:
            self._expired(conn, "connect", "no answer in"
                          f" {self._connect_timeout:g} s", errno.ETIMEDOUT)
        elif due == conn.work_due:
            what = ("message" if conn.phase is Phase.OPEN
                    else conn.layer.handshake)
            self._expired(conn, "message", f"{what} not complete after"
                          f" {self._message_timeout:g} s")
        elif due == conn.send_due:
            self._expired(conn, "send", f"{len(conn.out)} bytes unsent after"
                          f" {self._send_timeout:g} s")
        elif due == conn.keepalive_due:
            self._check_keepalive(conn, now)
        else:
            self._expired(conn, "lifetime", f"idle for {conn.lifetime:g} s")

    def _expired(self, conn, reason, detail, number=None):
        """End a connection for a deadline, unless its socket knows better.

        Where reading was paused, a FIN or an RST may have come before.
        """
        if (conn.phase in (Phase.OPENING, Phase.OPEN)
                and self._probe(conn) is _EOF and not conn.out):
            self._doom(conn, conn.cause)  # what came before it is delivered
        if conn.phase is not Phase.DOOMED:
            self._end(conn, Cause(reason, number, detail))

    def _check_keepalive(self, conn, now):
        """Ask the kernel whether the peer has vanished.  See is_dead."""
        keepalive = conn.keepalive
        suspected = now - conn.suspected >= keepalive.interval
        info = tcp_info(conn.sock)
        if info is None:
            conn.keepalive_due = NEVER  # the kernel's own keepalive decides
        elif conn.phase is Phase.CONNECTING:
            conn.keepalive_due = now + keepalive.limit
        elif is_dead(info, keepalive.limit, suspected):
            self._expired(conn, "keepalive",
                          f"silent for {info.silence:.1f} s", errno.ETIMEDOUT)
        elif info.silence < keepalive.limit:
            conn.suspected, conn.soft_error = NEVER, None
            conn.keepalive_due = now + keepalive.limit - info.silence
        else:
            # One transmission is unanswered: the next is not far.
            asked = info.unanswered > 0
            conn.suspected = min(conn.suspected, now) if asked else NEVER
            conn.keepalive_due = now + (_LOOK if asked
                                        else keepalive.interval)

    # -- states -----------------------------------------------------------

    def _state(self, conn):
        """Return a connection's State: what is latched, or else a probe."""
        if conn.phase is Phase.LISTENING:
            return State.ACCEPT
        if conn.forgotten:
            return State.NOT_FOUND
        if conn.cause is None:
            return self._probe(conn)
        if conn.phase is Phase.DOOMED and conn.cause.errno in _NO_SOCKET:
            return State.BAD
        return conn.cause.state

    def _probe(self, conn):
        """Probe a socket and latch what is found: probing has consumed it."""
        state, number, waiting = _look(conn.sock)
        fatal = number is not None and state is not _OK
        if conn.phase is Phase.CONNECTING:
            # Until the loop has taken notice, also if it has just succeeded.
            if not fatal:
                return State.CONNECT
            self._connect_result(conn, number)
            return State.CONNECT if conn.cause is None else self._state(conn)
        if number:
            conn.soft_error = number
        if fatal:
            self._doom(conn, Cause.of_errno(number))
        elif state is _EOF:
            conn.cause = Cause("eof", None, "FIN from the peer")
        elif conn.phase is Phase.OPENING:
            return (State.CONNECT if conn.origin == "connect"
                    else State.ACCEPT)
        elif (conn.origin == "accept" and not waiting
              and not conn.bytes_in and not conn.bytes_out):
            return State.ACCEPT
        return state

    def _last_look(self, conn):
        """Before we end a connection: an RST that has come is the reason.

        A FIN is not, unless somebody has seen it: it leaves the connection to
        us, and what came before it is not delivered any more.
        """
        if conn.cause is None:
            self._state(conn)
            if conn.phase in (Phase.OPENING, Phase.OPEN):
                conn.cause = None

    def _kernel_keepalive(self, conn):
        """Return the Keepalive that the kernel has, None where it has none."""
        try:
            return get_keepalive(conn.sock)
        except OSError:
            return None

# ---------------------------------------------------------------------------
# 15. The functions of the specification
#
# In the specification's order.  They never raise on what a caller passes: a
# wrong value or a conid that is of no use is one log line and -1, and nothing
# has been changed.  _script_function is the border; behind it, everything
# raises.  Two of them only ask (tcp_conid_alive, tcp_conid_state), and for
# those the answer "no such connection" is no failure and no log line.
# ---------------------------------------------------------------------------


def _script_function(takes, failure=Result.FAILURE, name=None):
    """Decorator: what the function raises is a log line and this value."""
    def decorate(function):
        @functools.wraps(function)
        def script_function(*args, **named):
            try:
                return function(*args, **named)
            except TypeError:
                reason = f"takes ({takes})"
            except (ValueError, OSError, RuntimeError) as error:
                reason = error
            log.warning("%s: %s", name or function.__name__, reason)
            return failure
        script_function.takes = takes
        return script_function
    return decorate


class TcpOps(Loop):
    """Every TCP connection by its number, and the loop that runs them.

    Settings (keyword arguments; ValueError for a wrong one):

    closed_event         whose end is told: 0 nobody's, 1 every connection's,
                         2 where tcp_enable_closed_event was called (spec 2.1)
    event_callback       called with the event's name instead of any route
    connection_lifetime  seconds of idleness allowed to a new connection
    connect_timeout      seconds for connect
    send_timeout         seconds without progress of what is queued to send
    message_timeout      seconds from a message's first byte to its last, and
                         for a framing's handshake
    max_connections      None: what the process may open, less a reserve
    max_message          bytes
    max_write_buffer     bytes queued, for each connection
    clock                a function that returns seconds

    Not for several threads: only stop and call_soon may be called from
    another one.  In a child after fork() it is closed, without any event, and
    the parent's does not notice.
    """

    def __repr__(self):
        return (f"<TcpOps: {len(self.listeners())} listeners,"
                f" {self._live} connections>")

    # -- which connection is meant ----------------------------------------

    def _known(self, conid):
        """Return the connection of a conid, None if there is none (any more).

        Raises ValueError for what cannot be a conid.
        """
        if type(conid) is int:
            return self._table.get(conid)
        if conid is _CURRENT:
            if self._current is None:
                raise ValueError("no conid is given, and no message or event"
                                 " is being handled")
            return self._current
        return self._table.get(
            _number(conid, "conid", -NEVER, NEVER, whole=True))

    def _usable(self, conid):
        """Return the live connection of a conid, or raise ValueError."""
        conn = self._known(conid)
        if conn is None:
            raise ValueError(f"there is no connection {conid}")
        if conn.phase in _LIVE and not conn.forgotten:
            return conn
        if conn.phase is Phase.LISTENING:
            raise ValueError(f"conid {conid} is a listener, no connection")
        raise ValueError(f"connection {conn.conid} is ending")

    # -- spec 3.1 to 3.6 --------------------------------------------------

    @_script_function("[conid]")
    def tcp_conid_alive(self, conid=_CURRENT):
        """Return SUCCESS if a connection is usable, or a listener.  Spec: 3.1.

        FAILURE: it has errors, does not exist or is about to be closed.
        """
        conn = self._known(conid)
        return (Result.SUCCESS if conn is not None and self._state(conn)
                else Result.FAILURE)

    @_script_function("[conid]", State.NOT_FOUND)
    def tcp_conid_state(self, conid=_CURRENT):
        """Return a connection's State, as a probe finds it now.  Spec: 3.2.

        In the handler of its end: EOF after an eof, NOT_FOUND after a close
        of ours, else ERROR; afterwards NOT_FOUND for ever.
        """
        conn = self._known(conid)
        return State.NOT_FOUND if conn is None else self._state(conn)

    @_script_function("[conid], idle, count, interval")
    def tcp_keepalive_enable(self, *args, **named):
        """tcp_keepalive_enable([conid], idle, count, interval).  Spec: 3.3.

        idle: seconds of silence before the first probe; count: unanswered
        probes before the connection is reset; interval: seconds between two
        probes.  A peer that is silent for idle + count * interval, though
        asked, ends the connection with the reason "keepalive", also with data
        in flight.  All settings are made or, with FAILURE, none.
        """
        names = ("conid", *Keepalive._fields)
        conid, *values = _arguments(names, args, named)
        conn = self._usable(conid)
        keepalive = Keepalive(*(
            _number(value, name, 1, _MAX_SECONDS, whole=True)
            for name, value in zip(Keepalive._fields, values)))
        set_keepalive(conn.sock, keepalive)
        if keepalive == self._last_keepalive:
            keepalive = self._last_keepalive  # one object for all alike
        self._last_keepalive = conn.keepalive = keepalive
        conn.suspected = NEVER
        conn.keepalive_due = self._clock() + keepalive.limit
        self._arm(conn, conn.keepalive_due)
        return Result.SUCCESS

    @_script_function("[conid]")
    def tcp_keepalive_disable(self, conid=_CURRENT):
        """Turn keepalive off.  Spec: 3.4."""
        conn = self._usable(conid)
        clear_keepalive(conn.sock)
        conn.keepalive, conn.keepalive_due = None, NEVER
        return Result.SUCCESS

    @_script_function("[conid], lifetime")
    def tcp_set_connection_lifetime(self, *args, **named):
        """tcp_set_connection_lifetime([conid], lifetime).  Spec: 3.5.

        The seconds for which the connection may be idle: bytes received or
        sent renew it.  It counts from now; 0 expires in the loop's next turn.
        """
        conid, lifetime = _arguments(("conid", "lifetime"), args, named)
        conn = self._usable(conid)
        conn.lifetime = _number(lifetime, "lifetime", 0, _MAX_SECONDS)
        conn.active = self._clock()
        self._arm(conn, conn.active + conn.lifetime)
        return _SUCCESS

    @_script_function("[conid]")
    def tcp_enable_closed_event(self, conid=_CURRENT):
        """Have the end of a connection told if closed_event is 2.  Spec: 3.6.

        Without a conid FAILURE unless closed_event is 2, as in the original.
        """
        if conid is _CURRENT and self.closed_event != 2:
            raise ValueError("without a conid it needs closed_event 2, not"
                             f" {self.closed_event}")
        self._usable(conid).wants_event = True
        return Result.SUCCESS

    # -- of the original's later releases ---------------------------------

    @_script_function("[conid]")
    def tcp_close_connection(self, conid=_CURRENT):
        """Close a connection, or a listener.

        What is queued is sent first, within send_timeout, or its lifetime if
        that is shorter.  From the moment that this returns, the conid's state
        is NOT_FOUND.  FAILURE if an RST has come before, also if nobody has
        noticed: that is the reason then.
        """
        conn = self._known(conid)
        if conn is not None:
            self._last_look(conn)
        if conn is None or conn.phase is not Phase.LISTENING:
            conn = self._usable(conid)
        conn.forgotten = True
        self._finish(conn, Cause("closed", None, "closed by conid"))
        return Result.SUCCESS

    @_script_function("address")
    def tcp_get_conid(self, address):
        """Return the conid of a live connection with a peer, or FAILURE (-1).

        address is as for parse_address; a name in it blocks on its look-up.
        Of several connections with that peer it is the youngest.
        """
        conn = self._peer(*parse_address(address))
        return Result.FAILURE if conn is None else conn.conid

    @_script_function("address")
    def tcp_con_alive(self, address):
        """Return SUCCESS if there is a usable connection with a peer."""
        conn = self._peer(*parse_address(address))
        return (Result.SUCCESS if conn is not None and self._state(conn)
                else Result.FAILURE)

    @_script_function("conid")
    def tcp_set_otcpid(self, conid):
        """Name the connection on which forward is to send.

        For the message being handled, and only while tcp_set_otcpid_flag is
        on; FAILURE outside of a message's handler.
        """
        self._check_in_message()
        self._otcpid = self._usable(conid).conid
        return Result.SUCCESS

    @_script_function("mode")
    def tcp_set_otcpid_flag(self, mode):
        """Have forward heed tcp_set_otcpid (mode not 0) or not (mode 0).

        For the message being handled; off when its handler is called.
        """
        self._check_in_message()
        self._use_otcpid = _number(mode, "mode", -NEVER, NEVER,
                                   whole=True) != 0
        return Result.SUCCESS

    def _check_in_message(self):
        if self._current is None or self._event is not None:
            raise ValueError("only in the handler of a message")

    def _peer(self, host, port):
        """Return the youngest connection with a peer, or None."""
        found = (self._table.find_peer(*address[:2])
                 for _, address in _resolve(host, port))
        return next((conn for conn in found if conn is not None), None)

    # -- sending ----------------------------------------------------------

    def send(self, conid, payload):
        """Send payload on a connection; return a Result.

        A str is a text message on a WebSocket, elsewhere its UTF-8 bytes.
        What the kernel does not take is queued.  FAILURE: there is no such
        connection, it is ending, or its queue is over max_write_buffer; then
        nothing of it has been sent.  Raises TypeError for what is neither
        bytes nor str.
        """
        payload = _payload(payload)
        conn = self._found(conid)
        return (Result.FAILURE if conn is None
                else self._send_on(conn, payload))

    @_script_function("conid, payload", None, "send")
    def _found(self, conid):
        """Return a live connection, or None after a log line."""
        return self._usable(conid)

    def forward(self, address, payload):
        """Send payload to a peer; return a Result.

        On the connection that tcp_set_otcpid names, if it was told to; else
        on one with that peer if there is one; else on a new one, with the
        framing of the current message, without TLS (so not for sips:).
        address is as for parse_address.  Raises TypeError for a payload that
        is neither bytes nor str.
        """
        payload = _payload(payload)
        conn = self._way_to(address)
        return (Result.FAILURE if conn is None
                else self._send_on(conn, payload))

    @_script_function("address, payload", None, "forward")
    def _way_to(self, address):
        """Return the connection for forward, or None after a log line."""
        host, port = parse_address(address)
        if self._use_otcpid and self._otcpid is not None:
            return self._usable(self._otcpid)
        conn = self._peer(host, port)
        secure = address[:5].lower() == "sips:"
        if secure and (conn is None or conn.proto not in ("tls", "wss")):
            raise ValueError(f"there is no TLS connection to {address}, and"
                             " forward makes none")
        if conn is None:
            framing = "raw" if self._current is None else (
                self._current.stack.factory or "raw")
            conn = self._table.get(self.connect(host, port, framing=framing))
        return conn

# ---------------------------------------------------------------------------
# 16. The command line
# ---------------------------------------------------------------------------

#: The functions of section 15: commands, and plain names in a routes file.
_FUNCTIONS = [name for name in vars(TcpOps) if name.startswith("tcp_")]
# The otcpid pair means something within a message's handler only.
_HELP = "\n".join([
    "commands:",
    *(re.sub(r"[][,]", "", f"  {name} {getattr(TcpOps, name).takes.upper()}")
      for name in _FUNCTIONS if "otcpid" not in name),
    "  send CONID TEXT  sends TEXT as a message of the connection's framing;",
    r"                 \n, \r, \t, \\ and \xNN mean what they mean in Python",
    "  list           shows the connections and listeners",
    "  help           shows this",
    "  quit           ends everything and leaves",
])
#: Seconds for what is queued to be sent when the program leaves.
_DRAIN = 5

_EPILOG = """
Try it:
  %(prog)s --listen                      and in another terminal:
  nc 127.0.0.1 5060

Other protocols: SIP, WebSocket, and TLS below any of them:
  %(prog)s --listen --framing sip
  %(prog)s --listen 8443 --framing ws --certfile examples/localhost.pem
  %(prog)s --connect localhost:8443 --framing ws --console \\
      --cafile examples/localhost.pem

A routes file says what to do; it knows ops, the decorators request_route,
onreply_route and event_route, modparam, and the specification's functions:
  @request_route
  def _(msg):
      tcp_set_connection_lifetime(3605)
      msg.reply(b"welcome\\n")

A control socket takes the same commands from elsewhere:
  %(prog)s --listen --control /tmp/tcpops.sock
  %(prog)s --call /tmp/tcpops.sock tcp_conid_state 2

""" + _HELP + """

With --json each line is an object; "data" holds one character for each byte.

SIGINT (Ctrl-C), SIGTERM and SIGHUP: listeners close, what is queued is sent,
for DRAIN seconds at the most, every connection ends; a second signal stops at
once.

Exit status: 0, also after a signal, 130 after a second one; 1 if the system
said no; 2 for wrong usage.  With --call 0 if the result is positive, else 1.
With --connect alone it leaves when no connection is left, with 1 if none was
ever made.
""".replace("DRAIN", str(_DRAIN))


#: Long payloads are shown by their beginning and end.
_BYTES = reprlib.Repr()
_BYTES.maxother = _BYTES.maxstring = 72


#: What a person may try a listener with.
_CLIENTS = {
    "tcp": "nc {host} {port}",
    "sip": r"printf 'OPTIONS sip:x SIP/2.0\r\nl: 0\r\n\r\n'"
           " | nc {host} {port}",
    "tls": "openssl s_client -quiet -connect {address}",
    "ws": "new WebSocket('ws://{address}') in a browser",
    "wss": "new WebSocket('wss://{address}') in a browser",
}


#: Details that say no more than their reason.
_PLAIN_DETAILS = {"eof": "FIN from the peer", "closed": "closed by conid",
                  "shutdown": "drained"}


def _answer_text(answer):
    """Return a command's answer as a person wants it."""
    if "text" in answer:
        return answer["text"]
    if "state" in answer:
        return f"{answer['result']} {answer['state']}"
    return str(answer["result"])


class _Display:
    """Writes what happens to standard output, for a person or a program."""

    def __init__(self, as_json, stop):
        self.as_json = as_json
        self.prompt = ""
        self.failure = None  # why nothing can be written any more
        self._stop = stop    # called then

    def write(self, text):
        """Write, as long as somebody takes it."""
        if self.failure or sys.stdout is None:  # None: started without one
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            self.failure = error
            # Python would write the rest when it exits, and complain.
            with open(os.devnull, "w") as devnull:
                os.dup2(devnull.fileno(), sys.stdout.fileno())
            self._stop()

    def _print(self, line, **fields):
        """Write a line, or the fields as an object."""
        if self.as_json:
            line = json.dumps({"time": round(time.time(), 3), **fields})
        if self.prompt:
            # Over the prompt and what is being typed; a new one below.
            self.write(f"\r\x1b[K{line}\n{self.prompt}")
        else:
            self.write(line + "\n")

    @staticmethod
    def _clock():
        now = time.time()
        return (time.strftime("%H:%M:%S", time.localtime(now))
                + f".{int(now % 1 * 1000):03d}")

    def ask(self):
        """Write the prompt."""
        self.write(self.prompt)

    def started(self, what, info, console):
        """A listener was made, or a connect() begun."""
        how = (info.framing if info.proto == "tcp" else info.proto
               if info.framing == "ws" else f"{info.proto}, {info.framing}")
        if what == "listen on":
            # A wildcard address is none to connect to.
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(info.Ri, info.Ri)
            text = (f"listening on {_format_address((info.Ri, info.Rp))}"
                    f" (conid {info.conid}, {how}); try: "
                    + _CLIENTS.get(how, _CLIENTS[info.proto]).format(
                        host=host, port=info.Rp,
                        address=_format_address((host, info.Rp))))
            if console:
                text += "; type help for commands"
        else:
            text = (f"connecting to {_format_address((info.si, info.sp))}"
                    f" (conid {info.conid}, {how})")
        self._print(text, event=text.split()[0], conid=info.conid, si=info.si,
                    sp=info.sp, Ri=info.Ri, Rp=info.Rp, proto=info.proto,
                    framing=info.framing)

    def message(self, msg):
        """A message came."""
        self._print(f"{self._clock()} {'message':11} conid {msg.conid} "
                    f" {len(msg.data)} bytes  {_BYTES.repr(msg.payload)}",
                    event="message", conid=msg.conid, proto=msg.proto,
                    si=msg.si, sp=msg.sp, Ri=msg.Ri, Rp=msg.Rp,
                    bytes=len(msg.data), data=msg.data.decode("latin-1"),
                    text=msg.text)

    def event(self, event):
        """A connection opened or ended."""
        if event.reason is None:
            text = f"{event.proto} {_format_address((event.si, event.sp))}"
        else:
            text = (f"{event.reason}  {event.age:.1f} s, {event.bytes_in}"
                    f" bytes in, {event.bytes_out} out")
            if event.detail != _PLAIN_DETAILS.get(event.reason):
                text += f"  ({event.detail})"
        fields = event._asdict()
        del fields["name"]
        self._print(f"{self._clock()} {event.name:11} conid {event.conid} "
                    f" {text}", event=event.name, **fields)

    def answer(self, answer):
        """A command was carried out."""
        self._print(_answer_text(answer), **answer)


class _Shown(TcpOps):
    """A TcpOps that shows every message and event before its route runs."""

    display = keepalive = None
    stopped = closed = False
    opened = 0

    def stop(self):
        self.stopped = True
        super().stop()

    def close(self):
        self.stopped = self.closed = True
        super().close()

    def _message(self, conn, msg):
        self.display.message(msg)
        super()._message(conn, msg)

    def event_handler(self, event):
        self.display.event(event)
        if event.reason is None:
            self.opened += 1
            if self.keepalive:
                self.tcp_keepalive_enable(event.conid, *self.keepalive)
        return super().event_handler(event)


def _unescape(text):
    """Return the bytes of a text with Python's escapes for bytes in it."""
    def replace(match):
        escape = match[0]
        simple = {b"\\n": b"\n", b"\\r": b"\r", b"\\t": b"\t",
                  b"\\\\": b"\\"}
        if escape in simple:
            return simple[escape]
        if len(escape) == 4:
            return bytes([int(escape[2:], 16)])
        raise ValueError(f"no such escape: {escape.decode()}")
    return re.sub(rb"\\(?:x[0-9a-fA-F]{2}|.|$)", replace,
                  text.encode("utf-8", "surrogateescape"))


class _LogTap(logging.Handler):
    """Collects what is logged: the reason behind a command's -1."""

    def __init__(self, level):
        super().__init__(level)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class _Commands:
    """Carries out the commands of the console and the control socket."""

    def __init__(self, ops):
        self._ops = ops

    def run(self, line):
        """Carry out a line; return the answer, a dict, always with result."""
        name, _, rest = line.strip().partition(" ")
        own = {"send": self._send, "list": self._list, "help": self._help,
               "quit": self._quit}
        tap = _LogTap(logging.WARNING)
        log.addHandler(tap)
        try:
            if name in _FUNCTIONS:
                result = getattr(self._ops, name)(*rest.split())
                answer = {"result": int(result)}
                if isinstance(result, State):
                    answer["state"] = result.name
            elif name not in own:
                log.warning("no such command: %s; type help", name)
                answer = {"result": -1}
            elif name != "send" and rest.strip():
                log.warning("%s takes nothing", name)
                answer = {"result": -1}
            else:
                answer = own[name](rest)
        finally:
            log.removeHandler(tap)
        if tap.lines:
            answer["error"] = "; ".join(tap.lines)
        return {"command": name, **answer}

    def _help(self, _rest):
        return {"result": 1, "text": _HELP}

    def _quit(self, _rest):
        self._ops.stop()
        return {"result": 1}

    def _send(self, rest):
        conid, _, text = rest.strip().partition(" ")
        try:
            payload = _unescape(text)
        except ValueError as error:
            log.warning("send: %s", error)
            return {"result": -1}
        with contextlib.suppress(UnicodeDecodeError):
            payload = payload.decode()  # a text message, where there are any
        return {"result": int(self._ops.send(conid, payload))}

    def _list(self, _rest):
        listeners, conns = self._ops.listeners(), self._ops.connections()
        lines = [f"conid {info.conid}  listening on"
                 f" {_format_address((info.Ri, info.Rp))}"
                 + ("" if info.proto == "tcp" else f", {info.proto}")
                 for info in listeners]
        for info in conns:
            keepalive = ("off" if info.keepalive is None else
                         ",".join(map(str, info.keepalive)))
            lines.append(
                f"conid {info.conid}  {info.proto}"
                f" {_format_address((info.si, info.sp))}  {info.state}"
                f" {info.state.name}  age {info.age:.1f} s, idle"
                f" {info.idle:.1f} of {info.lifetime:g} s, keepalive"
                f" {keepalive}, {info.bytes_in} bytes in, {info.bytes_out}"
                " out")
        return {"result": 1, "text": "\n".join(lines) or "no connections",
                "listeners": [info._asdict() for info in listeners],
                "connections": [info._asdict() for info in conns]}


class _Failure(Exception):
    """What the system refused, in one line; exit status 1."""


def _reason(error):
    """Return why the system said no, without its number."""
    return getattr(error, "strerror", None) or str(error)


def _connect_address(text, lowest_port=1):
    """Return (host, port) of "HOST:PORT", for argparse."""
    try:
        if "://" in text:
            raise ValueError("give HOST:PORT; --framing and --tls or"
                             " --certfile say the rest")
        port = re.search(r":([0-9]+)$", text)
        if not port:
            raise ValueError(f"no port in {reprlib.repr(text)}")
        if not lowest_port <= int(port[1]) <= 65535:
            raise ValueError(f"no such port: {port[1]}")
        return parse_address(text, lowest_port)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _listen_address(text):
    """Return (host, port) of "[HOST:]PORT", for argparse."""
    if text.isascii() and text.isdigit():
        text = "127.0.0.1:" + text
    return _connect_address(text, lowest_port=0)


def _keepalive_settings(text):
    """Return the Keepalive of "IDLE,COUNT,INTERVAL", for argparse."""
    try:
        keepalive = Keepalive(*map(int, text.split(",")))
        with socket.socket() as sock:
            set_keepalive(sock, keepalive)  # what the system refuses: now
    except (TypeError, ValueError, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError)
                  else "it takes three numbers, as in 60,5,5")
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}") from None
    return keepalive


class _Parser(argparse.ArgumentParser):
    """An argparse that complains in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def _parser():
    """Return the parser of the command line."""
    parser = _Parser(
        prog=os.path.basename(sys.argv[0]) or "tcpops.py",
        description="Gives every TCP, TLS and WebSocket connection a number,"
        " the conid,\nand shows and steers its life by that number.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--listen", metavar="[HOST:]PORT", action="append", nargs="?",
        type=_listen_address, const=("127.0.0.1", 5060),
        help="accept connections; 127.0.0.1:5060 if bare, port 0 for any;"
        " may be given again")
    add("--connect", metavar="HOST:PORT", action="append",
        type=_connect_address, help="connect; may be given again")
    add("--framing", choices=list(_FRAMINGS), default="raw",
        help="what a message is: what was received at once (raw, the default),"
        " a line, a SIP message, or that of a WebSocket (ws)")
    add("--certfile", metavar="FILE",
        help="have listeners speak TLS, with this certificate (PEM)")
    add("--keyfile", metavar="FILE", help="its key, if in a file of its own")
    add("--tls", action="store_true", help="have --connect speak TLS")
    add("--cafile", metavar="FILE",
        help="like --tls, but trust the certificates in this file (PEM)")
    add("--closed-event", metavar="N", type=int, default=1,
        help="whose end is told: 0 nobody's, 1 everybody's (default), 2 where"
        " tcp_enable_closed_event was called")
    add("--lifetime", metavar="S", type=float, default=120,
        help="seconds of idleness allowed (default 120)")
    add("--keepalive", metavar="IDLE,COUNT,INTERVAL",
        type=_keepalive_settings,
        help="turn keepalive on for every connection as it opens")
    add("--max-connections", metavar="N", type=int,
        help="how many at a time (default: as many as may be open)")
    add("--echo", action="store_true", help="send back what is received")
    add("--routes", metavar="FILE.py", help="a file with handlers, see below")
    add("--json", action="store_true", help="one object a line, for programs")
    add("--console", action="store_true",
        help="read commands from standard input also where it is no terminal;"
        " its end is quit")
    add("--control", metavar="PATH",
        help="take commands over a Unix-domain socket, one JSON line back for"
        " each")
    add("--call", metavar="PATH COMMAND ARG", nargs=argparse.REMAINDER,
        help="send a command to such a socket and print the answer; comes"
        " last")
    add("--log-level", default="warning",
        choices=("debug", "info", "warning", "error"),
        help="what is logged on standard error (default warning)")
    add("--version", action="version", version=f"tcpops {__version__}")
    return parser


def _call_control(words, as_json):
    """Carry out --call; return the exit status."""
    path, *command = words
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(path)
            line = " ".join(command).replace("\n", "\\n") + "\n"
            sock.sendall(line.encode("utf-8", "surrogateescape"))
            with sock.makefile() as answers:
                raw = answers.readline()
        answer = json.loads(raw)
        text = raw.rstrip("\n") if as_json else _answer_text(answer)
    except OSError as error:
        raise _Failure(f"cannot call {path}: {_reason(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise _Failure(f"cannot call {path}: no answer of tcpops") from None
    if "error" in answer:
        print(answer["error"], file=sys.stderr)
    display = _Display(as_json, bool)
    display.write(text + "\n")
    return 0 if answer["result"] > 0 and not display.failure else 1


class _ControlClient:
    """One client of the control socket: lines in, JSON lines out."""

    LONGEST = 65536  # bytes of a line

    def __init__(self, control, sock):
        self._control = control
        self._sock = sock
        self._read, self._unsent = bytearray(), bytearray()
        self._events = _READ
        sock.setblocking(False)
        control.ops.attend(sock, _READ, self._ready)

    def _ready(self, mask):
        try:
            if mask & _READ:
                data = self._sock.recv(4096)
                self._read += data
                self._answer()
                if not data or len(self._read) > self.LONGEST:
                    raise ConnectionError
            if self._unsent:
                del self._unsent[:self._sock.send(self._unsent, _NOSIGNAL)]
        except _AGAIN:
            pass
        except OSError:
            self._control.ops.dismiss(self._sock)
            self._sock.close()
            return
        # Who does not take the answers is not asked for more commands.
        events = _WRITE if self._unsent else _READ
        if events != self._events:
            self._events = events
            self._control.ops.dismiss(self._sock)
            self._control.ops.attend(self._sock, events, self._ready)

    def _answer(self):
        """Carry out the lines that are complete."""
        *lines, rest = self._read.split(b"\n")
        self._read = bytearray(rest)
        for line in lines:
            answer = self._control.commands.run(
                line.decode("utf-8", "surrogateescape"))
            self._unsent += json.dumps(answer).encode() + b"\n"


class _Control:
    """The control socket, served by the loop like everything else."""

    def __init__(self, path, ops, commands):
        self.ops = ops
        self.commands = commands
        self._path = path
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._sock = socket.socket(socket.AF_UNIX)
        try:
            self._remove_stale()
            umask = os.umask(0o177)  # mode 0600 from the first moment
            try:
                self._sock.bind(path)
            finally:
                os.umask(umask)
            self._inode = os.stat(path).st_ino
            self._sock.listen()
        except OSError as error:
            self._sock.close()
            raise _Failure(f"cannot make {path}: {_reason(error)}") from None
        self._sock.setblocking(False)
        ops.attend(self._sock, _READ, self._accept)

    def _remove_stale(self):
        """Remove what a program that was killed has left; spare the rest."""
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(self._path)
            except FileNotFoundError:
                return
            except ConnectionRefusedError:
                if not stat.S_ISSOCK(os.stat(self._path).st_mode):
                    raise OSError("it is no socket, and in the way") from None
                os.unlink(self._path)
                return
        raise OSError("a program answers there")

    def _accept(self, _mask):
        try:
            sock, _ = self._sock.accept()
        except OSError:
            # Out of descriptors, it would stay ready for ever: let go of the
            # spare one, take the client with it and turn him away.
            os.close(self._spare)
            with contextlib.suppress(OSError):
                self._sock.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY)
        else:
            _ControlClient(self, sock)

    def close(self):
        """Remove the socket, unless the path is somebody else's by now."""
        self._sock.close()
        os.close(self._spare)
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)


def _load_routes(path, ops):
    """Run a routes file; its decorators register with ops."""
    names = ("request_route", "onreply_route", "event_route", "modparam",
             "send", "forward", *_FUNCTIONS)
    namespace = {"__name__": "routes", "__file__": path, "ops": ops,
                 "State": State, "Result": Result,
                 **{name: getattr(ops, name) for name in names}}
    # What lies beside the file can be imported, as from any script.
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise _Failure(f"cannot read {path}: {_reason(error)}") from None
    try:
        exec(compile(source, path, "exec"), namespace)
    except Exception as error:
        line = getattr(error, "lineno", None)  # of a SyntaxError
        trace = error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == path:
                line = trace.tb_lineno
            trace = trace.tb_next
        where = path if line is None else f"{path}:{line}"
        raise _Failure(
            f"{where}: {type(error).__name__}: {error}") from None


def _at_terminal():
    """Whether standard input is a terminal that listens to us.

    A background job that read from it would be stopped (SIGTTIN).
    """
    try:
        number = sys.stdin.fileno()
        return os.isatty(number) and os.tcgetpgrp(number) == os.getpgrp()
    except (AttributeError, ValueError, OSError):  # none, closed, not ours
        return False


def _no_password():
    raise ValueError("its key asks for a password")


def _server_context(options):
    """Return the ssl.SSLContext of --certfile, None without it."""
    if not options.certfile:
        return None
    import ssl
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.certfile, options.keyfile,
                                _no_password)
    except (OSError, ValueError) as error:
        files = " and ".join(filter(None, (options.certfile,
                                           options.keyfile)))
        reason = ("a certificate and the key that fits it are needed, as PEM"
                  if isinstance(error, ssl.SSLError) else _reason(error))
        raise _Failure(f"cannot use {files}: {reason}") from None
    return context


def _client_context(options):
    """Return the ssl.SSLContext of --tls or --cafile, None without."""
    if not options.tls and not options.cafile:
        return None
    import ssl
    try:
        return ssl.create_default_context(cafile=options.cafile)
    except OSError as error:
        reason = ("there is no certificate in it, as PEM"
                  if isinstance(error, ssl.SSLError) else _reason(error))
        raise _Failure(f"cannot use {options.cafile}: {reason}") from None


class _Program:
    """The command line at work."""

    def __init__(self, options, ops):
        self._options = options
        self._ops = ops
        self._display = ops.display = _Display(options.json, ops.stop)
        self._commands = _Commands(ops)

    def run(self):
        """Serve until told to stop; return the exit status."""
        options, ops = self._options, self._ops
        with contextlib.ExitStack() as stack:
            stack.callback(ops.close)
            if options.echo:
                ops.request_route(lambda msg: msg.reply(msg.payload))
            if options.routes:
                _load_routes(options.routes, ops)
            if options.control:
                stack.enter_context(contextlib.closing(
                    _Control(options.control, ops, self._commands)))
            console = options.console or _at_terminal()
            # Before the first line is written: whoever reads it may signal.
            stack.enter_context(self._signals())
            self._listen_and_connect(console)
            if console:
                self._start_console()
            self._serve()
            if not ops.closed:  # by a handler of the routes file
                ops.drain(_DRAIN)
        failure = self._display.failure
        if isinstance(failure, BrokenPipeError):
            return 1  # nobody reads any more, as after "| head"
        if failure:
            raise _Failure(f"cannot write what happens: {_reason(failure)}")
        if not options.listen and not ops.opened:
            raise _Failure("no connection was made")
        return 0

    def _listen_and_connect(self, console):
        options, ops = self._options, self._ops
        for what, method, addresses, tls in (
                ("listen on", ops.listen, options.listen,
                 _server_context(options)),
                ("connect to", ops.connect, options.connect,
                 _client_context(options))):
            for address in addresses or ():
                try:
                    conid = method(*address, framing=options.framing, tls=tls)
                except (OSError, UnicodeError) as error:
                    raise _Failure(f"cannot {what} {_format_address(address)}:"
                                   f" {_reason(error)}") from None
                self._display.started(what, ops.connection(conid), console)

    def _serve(self):
        """Run the loop; with --connect alone while a connection is left."""
        ops = self._ops
        while not ops.stopped:
            if self._options.listen:
                ops.run()
            elif ops.connections():
                ops.step(0.5)  # and see whether a signal has come
            else:
                break

    @contextlib.contextmanager
    def _signals(self):
        """Have signals stop the loop, a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python takes signals in that one only
            return

        def handle(_number, _frame):
            if self._ops.stopped:
                raise KeyboardInterrupt
            self._ops.stop()

        numbers = {signal.SIGINT, signal.SIGTERM}
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)
        if signal.getsignal(hangup) is not signal.SIG_IGN:  # as nohup has it
            numbers.add(hangup)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_console(self):
        """Read commands in a thread: not every system can select stdin."""
        if (sys.stdin.isatty() and sys.stdout is not None
                and sys.stdout.isatty() and not self._options.json):
            self._display.prompt = "> "
            self._display.ask()
        # A file object of its own: a daemon thread that held the lock of
        # sys.stdin could not be got out of the way when Python exits.
        lines = open(sys.stdin.fileno(), encoding="utf-8", errors="replace",
                     closefd=False)

        def read():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                with contextlib.suppress(OSError):  # the terminal has gone
                    for line in lines:
                        self._ops.call_soon(self._type, line)
                self._ops.call_soon(self._type, "quit")
        threading.Thread(target=read, daemon=True).start()

    def _type(self, line):
        """Carry out a line of the console."""
        if not line.strip():
            self._display.ask()
            return
        answer = self._commands.run(line)
        if self._ops.stopped:
            self._display.prompt = ""  # no more
        else:
            self._display.answer(answer)


def _check_options(parser, options):
    """Complain of options that do not go together."""
    if options.call is not None:
        if len(options.call) < 2 or options.listen or options.connect:
            parser.error("--call takes PATH COMMAND [ARG ...], and no"
                         " --listen or --connect beside it")
    elif not options.listen and not options.connect:
        parser.error("nothing to do: give --listen or --connect, or --call")
    if options.console and sys.stdin is None:
        parser.error("--console needs a standard input")
    if options.keyfile and not options.certfile:
        parser.error("--keyfile needs --certfile")
    if options.certfile and not options.listen:
        parser.error("--certfile is for --listen")
    if (options.tls or options.cafile) and not options.connect:
        parser.error("--tls and --cafile are for --connect")


def main(argv=None):
    """Run the command line; return the exit status.  See --help."""
    # A routes file that says "import tcpops" means this module, not a second
    # copy of it with handlers that nobody calls.
    sys.modules.setdefault("tcpops", sys.modules[__name__])
    parser = _parser()
    options = parser.parse_args(argv)
    level = getattr(logging, options.log_level.upper())
    logging.basicConfig(
        level=level, datefmt="%H:%M:%S",
        format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setLevel(level)
    log.setLevel(min(level, logging.WARNING))  # the answers tell warnings
    try:
        _check_options(parser, options)
        if options.call is not None:
            return _call_control(options.call, options.json)
        try:
            ops = _Shown(closed_event=options.closed_event,
                         connection_lifetime=options.lifetime,
                         max_connections=options.max_connections)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            option = {"connection_lifetime": "lifetime"}.get(name, name)
            parser.error(f"--{option.replace('_', '-')} {rest}")
        ops.keepalive = options.keepalive
        return _Program(options, ops).run()
    except _Failure as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
