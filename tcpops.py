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

    1  Imports and public names          12  The table of connections
    2  The words of the specification   13  Handlers
    3  Arguments                        14  The reactor
    4  Deadlines                        15  The plan of a connection
    5  Keepalive                        16  A connection
    6  Probing a socket                 17  A listener
    7  Messages and framings            18  Questions
    8  SIP over a stream                19  The functions of the specification
    9  WebSocket                        20  TcpOps
   10  TLS                              21  The command line
   11  The life of a connection

One raw connection from accept to its event, in the order in which it runs:
Reactor._turn, Reactor._serve_ready, Listener.ready, Listener._admit,
Connection.begin, Connection.open, Connection.queue_event, Connection.enter,
Connection.watch, Handlers.report; Connection.ready, Connection.receive,
Handlers.message, Message.reply, Connection.send, Connection.write;
Connection.end_of_stream, Connection.end, Connection._leave, Connection._close.

SIP, WebSocket, TLS and the command line can be cut out of the file, alone or
together, by examples/cut.py; the rest still works.

"Spec" in a docstring names the section of the TCP Ops module's documentation.

Not here: a SIP stack (transactions, dialogs), WebSocket extensions, UDP, name
lookups without blocking, use of one TcpOps from several threads (only stop and
call_soon may be).
"""

# ---------------------------------------------------------------------------
# 1. Imports and public names

import array
import collections
import contextlib
import copy
import enum
import errno
import functools
import heapq
import itertools
import logging
import math
import numbers
import os
import re
import reprlib
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
import types
import weakref
from typing import Callable, NamedTuple, Optional

try:
    import fcntl
    import resource
    import termios
except ImportError:  # pragma: no cover (Windows has none of them)
    fcntl = resource = termios = None

__version__ = "0.9.0"

__all__ = [
    "State", "Result", "Event", "EVENT_NAMES", "REASONS", "parse_address",
    "format_address", "Keepalive", "probe", "Message", "TextMessage",
    "ProtocolError", "SKIPPED", "Framing", "LineFraming", "FRAMINGS", "LIFE",
    "NOT_READING", "DEADLINES", "ConnectionInfo", "TcpOps",
]

log = logging.getLogger("tcpops")

NEVER = math.inf  #: no deadline, or no limit
_LINUX = sys.platform.startswith("linux")

# ---------------------------------------------------------------------------
# 2. The words of the specification


class _Code(enum.IntEnum):
    """An integer of the script language: positive is true, negative false.

    In plain Python -1 is true: "if not tcp_conid_alive(conid)" would never
    fire.  print() shows the bare number on every version of Python.
    """

    def __bool__(self):
        return self.value > 0

    __str__ = int.__repr__
    __format__ = int.__format__


class Result(_Code):
    """The result of a function that does something.  Spec: 3.3 to 3.6."""

    SUCCESS = 1
    FAILURE = -1


# Used for each message: before Python 3.12 a look-up by the class is slow.
_SUCCESS, _FAILURE = Result


class State(_Code):
    """The answer of tcp_conid_state and probe.  Spec: 3.2."""

    OK = 1          #: the connection is usable
    ACCEPT = 2      #: a listener, or accepted and no byte has moved yet
    CONNECT = 3     #: connect() is under way
    NOT_FOUND = -1  #: no such connection, or no longer
    EOF = -2        #: the peer has sent FIN
    ERROR = -3      #: the socket has an error; the connection will end
    BAD = -4        #: the probe itself failed; the connection will end


_OK, _EOF = State.OK, State.EOF

#: The events, and whether each reports an end.  The specification knows the
#: first (4.1), its newer releases two more; "tcp:opened" is ours.
_EVENTS = {"tcp:closed": True, "tcp:reset": True, "tcp:timeout": True,
           "tcp:opened": False}
EVENT_NAMES = tuple(_EVENTS)


class Reason(NamedTuple):
    """The consequences of a reason, for REASONS."""

    event: str    #: the event that reports it
    state: State  #: the answer of tcp_conid_state in the event's handler
    detail: str   #: the event's detail, unless the end has a better one


_REASONS = {
    "eof": Reason("tcp:closed", State.EOF, "FIN from the peer"),
    "closed": Reason("tcp:closed", State.NOT_FOUND, "closed by conid"),
    "protocol": Reason("tcp:closed", State.ERROR, "not the protocol"),
    "error": Reason("tcp:closed", State.ERROR, "an error of the socket"),
    "shutdown": Reason("tcp:closed", State.NOT_FOUND, "the loop was closed"),
    "reset": Reason("tcp:reset", State.ERROR, "RST from the peer"),
    "keepalive": Reason("tcp:timeout", State.ERROR, "the peer vanished"),
    "lifetime": Reason("tcp:timeout", State.ERROR, "idle for too long"),
    "connect": Reason("tcp:timeout", State.ERROR, "no way to the peer"),
    "send": Reason("tcp:timeout", State.ERROR, "the queue stands still"),
    "message": Reason("tcp:timeout", State.ERROR, "a message incomplete"),
}
#: Why a connection ended, and which event reports it.
REASONS = {reason: row.event for reason, row in _REASONS.items()}

#: errno: its reason while connecting, and once connected; "error" of others.
#: Connected, a stored ICMP error is handed out when the kernel's timer gives
#: up.  EACCES: IPv6's "prohibited"; EINVAL: a blackhole; EPERM: our firewall.
_REASONS_OF_ERRNO = {
    getattr(errno, prefix + name): reasons for names, *reasons in (
        ("ECONNRESET ECONNABORTED", "reset", "reset"),
        ("ECONNREFUSED", "reset", "keepalive"),
        ("ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETRESET ENETUNREACH"
         " ENONET EACCES EINVAL EADDRNOTAVAIL ENOPROTOOPT EOPNOTSUPP EPROTO",
         "connect", "keepalive"),
        ("EPERM", "connect", "error"),
        ("EPIPE EPROTOTYPE", "error", "eof"))  # RST after FIN: the FIN decides
    for name in names.split() for prefix in ("", "WSA")  # Windows has both
    if hasattr(errno, prefix + name)}


class Cause(NamedTuple):
    """Why one connection ends."""

    reason: str
    errno: Optional[int]
    detail: str

    @classmethod
    def of(cls, reason):
        """Return the cause that needs no words beyond its reason."""
        return cls(reason, None, _REASONS[reason].detail)

    @classmethod
    def of_errno(cls, number, connecting=False):
        """Translate the error of a socket."""
        reason = _REASONS_OF_ERRNO.get(number, ("error",) * 2)[not connecting]
        # An "eof" looks like that of a FIN which recv() has shown.
        return (cls.of(reason) if reason == "eof"
                else cls(reason, number, os.strerror(number)))

    state = property(lambda self: _REASONS[self.reason].state, doc=
                     "The answer of tcp_conid_state for what it ends.")


class Event(NamedTuple):
    """The argument of an event's handler.  Spec: 4.1.

    si, sp are the peer's address and port, Ri, Rp ours (Kamailio's $si, $sp,
    $Ri and $Rp).  An end is reported once the socket is closed.
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
    queued: int             #: bytes in our queue; at the end, lost ones
    #: At an end: bytes that the peer's kernel has not acknowledged, queued
    #: ones too; None where the platform cannot say.
    unsent: Optional[int]
    origin: str             #: "accept", "connect" or "attach"
    listener: Optional[int]     #: conid of the listener that accepted it
    opened: bool            #: whether it has been usable

    is_end = property(lambda self: _EVENTS[self.name],
                      doc="Whether it reports the end of its connection.")

# ---------------------------------------------------------------------------
# 3. Arguments
# A wrong argument raises where Python calls, and is one log line and -1 in the
# functions of the specification.  Both check here, where it always raises
# _ArgumentError; only section 19 turns that into a return code.


class _ArgumentError(ValueError):
    """An argument cannot be used."""


_CURRENT = object()  #: no conid is given (None is a wrong one)
_MAX_SECONDS = 2 ** 31 - 1  #: the largest lifetime that the original can hold
_NUMERAL = re.compile(r"[+-]?[0-9]{1,100}(\.[0-9]{1,100})?", re.ASCII)


def _number(value, name, low, high, whole=False):
    """Return value as a number from low to high, or raise ValueError.

    A numeric string is a number, as in the script language; a bool is not.
    """
    number = value
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, int) and value.bit_length() > 1000:
        value = number = NEVER  # Python refuses to print so many digits
    if isinstance(value, str) and _NUMERAL.fullmatch(value):
        number = float(value) if "." in value else int(value)
    kind = numbers.Integral if whole else numbers.Real
    if (not isinstance(number, kind) or isinstance(number, bool)
            or not low <= number <= high):
        what = "a whole number" if whole else "a number"
        limits = f" from {low} to {high}" if high != NEVER else ""
        raise _ArgumentError(
            f"{name} must be {what}{limits}, not {reprlib.repr(value)}")
    return int(number) if whole or isinstance(number, int) else float(number)


def _arguments(takes, names, given, named):
    """Sort a function's arguments; "[conid]" in takes may be left out."""
    if (takes[0] == "[" and "conid" not in named
            and len(given) + len(named) == len(names) - 1):
        given = (_CURRENT, *given)
    missing = names[len(given):]
    if len(given) > len(names) or set(missing) != set(named):
        raise _ArgumentError(f"takes ({takes})")
    return (*given, *(named[name] for name in missing))


def _function(function):
    """Return a function that the loop is to call, or raise TypeError."""
    called = function
    while isinstance(called, functools.partial):
        called = called.func
    code = getattr(called, "__code__", None) or getattr(
        type(called).__call__, "__code__", None)
    # Generators, coroutines: a call runs nothing.  inspect costs 0.5 MB.
    if callable(function) and not (code and code.co_flags & 0x2A0):
        return function
    raise TypeError(
        f"a plain function is needed, not {reprlib.repr(function)}")


def _payload(payload):
    """Return a payload as bytes or, text, as str; or raise TypeError."""
    if isinstance(payload, str):
        return str(payload)
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise TypeError("payload must be bytes or str, not"
                        f" {type(payload).__name__}")
    return bytes(payload)


class _NoHost(socket.gaierror, _ArgumentError):
    """A host that can be none: a wrong argument, and no name to look up."""


def _literal(text):
    """Return an address as the kernel writes it, IPv4 if mapped, or None."""
    with contextlib.suppress(OSError):
        if ":" not in text:
            return socket.inet_ntoa(socket.inet_aton(text))  # "127.1", too
        return re.sub(r"^::ffff:(?=\d+\.)", "", socket.inet_ntop(
            socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text)))
    return None


def format_address(host, port):
    """Return "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Host(NamedTuple):
    """A host and a port, in a form for each of those that they go to."""

    lookup: str  #: for getaddrinfo: the IDNA form, with a zone
    port: int
    tls: str     #: for SNI and the certificate: no zone, no dot at the end

    @classmethod
    def of(cls, text, port=0):
        """Take a host apart.  ValueError; TypeError if it is no str."""
        name, port = "", _number(port, "port", 0, 65535, whole=True)
        with contextlib.suppress(UnicodeError):  # a label: empty or too long
            name = str.encode(text, "idna").decode()
        # A NUL would cut it short, a CR LF end a line of a request.
        if not re.fullmatch("[!-~]{1,254}", name):
            raise _NoHost(socket.EAI_NONAME,
                          f"not a host name: {reprlib.repr(text)}")
        name, percent, zone = name.partition("%")
        address = _literal(name)
        return cls((address or name) + percent + zone, port,
                   address or name.lower().rstrip("."))

    def http(self, tls):
        """Return HTTP's Host: no zone, and not the scheme's own port."""
        return re.sub(":443$" if tls else ":80$", "", format_address(
            self.lookup.partition("%")[0], self.port))


_ADDRESS = re.compile(
    r"(?:\[([^\[\]:]*:[^\[\]]*)\]|([^\[\]:;?@\s]+))(?::([0-9]{1,5}))?")
#: Parsers of URIs by scheme; each returns a tuple as _parse_host does.
_SCHEMES = {}
#: Where a connection to a wildcard address goes.
LOOPBACKS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def _parse_host(text, default=5060, protos=None, framing=None):
    """Return _parse_uri's answer for "host:port"; None if it is not that."""
    match = _ADDRESS.fullmatch(text)
    return match and (match[1] or match[2], int(match[3] or default), protos,
                      framing)


def _parse_uri(address, lowest_port=1):
    """Return (host, port, protos or None, framing or None) of an address."""
    if isinstance(address, str):
        scheme = address.partition(":")[0].lower()
        found = _SCHEMES.get(scheme, _parse_host)(address)
        if found and lowest_port <= found[1] <= 65535:
            return found
    raise _ArgumentError(
        "address must be HOST:PORT, [V6]:PORT or a SIP URI (transport tcp,"
        f" tls, ws or wss; no maddr), not {reprlib.repr(address)}")


def parse_address(address, lowest_port=1):
    """Return (host, port) of "host:port", "[v6]:port" or a sip: or sips: URI.

    The port defaults to 5060, with TLS to 5061 (RFC 3261, 19.1.2).  Raises
    ValueError, also for a transport or maddr that is not ours to serve.
    """
    return _parse_uri(address, lowest_port)[:2]


def _resolve(host, port, passive=False):
    """Return [(family, address), ...] of a Host's two; a name may block.

    An address comes back in the form in which the kernel writes it.
    """
    host = host if passive else LOOPBACKS.get(host, host)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(
        (family, address) for family, _, _, _, address in found))


def _peer_key(address):
    """Return (host, port): IPv4 though mapped, with a zone if link-local."""
    if len(address) == 2:
        return address
    host = _literal(address[0].partition("%")[0])
    if address[3] and re.match("fe[89ab][^:]:", host):
        # Not if_indextoname, which PyPy lacks.
        host = socket.getnameinfo(
            (host, *address[1:]),
            socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
    return host, address[1]


# A signal handler of the program's may run inside a system call of ours: what
# it raises there is no error of the socket.


def _is_signal(error):
    """Say whether a signal handler has raised an error: its frame holds the
    one that it returns to, for that was its argument.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__.tb_next):
        for value in frame.f_locals.values() if frame.f_back else ():
            if value is frame.f_back or isinstance(value, tuple) and any(
                    item is frame.f_back for item in value):
                return True
    return False


def _words(error, form=str):
    try:
        return str(form(error))
    except Exception:  # of the program's
        return type(error).__name__


def _system_error(error):
    """Return the error of a system call of ours, or raise a handler's."""
    if error.__traceback__.tb_next is not None and _is_signal(error):
        raise error
    return error


def _ask(question, *arguments):
    """Return the answer of a socket, None if it has none."""
    try:
        return question(*arguments)
    except OSError as error:  # closed by now, reset, or no such option
        _system_error(error)
        return None

# ---------------------------------------------------------------------------
# 4. Deadlines
# Nearly every deadline is put off before it fires: each message renews a
# lifetime.  So activity only stores a number on the connection and leaves the
# heap alone; an entry that fires early is pushed back to where it belongs.
# Only a deadline that is *shortened* pushes an entry at once, and the old one
# is recognised by its time, which is no longer the owner's.


class Deadlines:
    """A heap of deadlines, one live entry for each owner: its earliest.

    An owner has a conid, which breaks ties, and fires_at, the time of its live
    entry or NEVER.  Only this class sets that.  Nothing here reads a clock.
    """

    def __init__(self):
        self._heap = []  # of (when, conid, owner)
        self._armed = 0   # owners that have a live entry

    def arm(self, owner, when):
        """Make sure the owner fires no later than `when`."""
        if when < owner.fires_at:
            if owner.fires_at == NEVER:
                self._armed += 1
            owner.fires_at = when
            heapq.heappush(self._heap, (when, owner.conid, owner))
            self._prune()

    def disarm(self, owner):
        """Forget the owner's entry."""
        if owner.fires_at != NEVER:
            owner.fires_at = NEVER
            self._armed -= 1
            self._prune()

    def next(self):
        """Return the time of the earliest live entry, NEVER if none."""
        heap = self._heap
        while heap and heap[0][0] != heap[0][2].fires_at:
            heapq.heappop(heap)
        return heap[0][0] if heap else NEVER

    def pop(self, now):
        """Remove and return an owner whose deadline has passed, or None."""
        if self.next() > now:
            return None
        owner = heapq.heappop(self._heap)[2]
        owner.fires_at = NEVER
        self._armed -= 1
        return owner

    def _prune(self):
        """Keep the heap a small multiple of its live entries."""
        # Linear, but only after as many pushes or ends as there are entries.
        # A set: an owner armed again for the time of its own stale entry
        # would otherwise have two live ones.
        if len(self._heap) > 2 * self._armed + 8 or not self._armed:
            self._heap = list({entry for entry in self._heap
                               if entry[0] == entry[2].fires_at})
            heapq.heapify(self._heap)

# ---------------------------------------------------------------------------
# 5. Keepalive
# The kernel probes, but not while data of ours is unacknowledged: a peer that
# vanishes with data in flight stays "alive" for 15 minutes (tcp_retries2).
# TCP_USER_TIMEOUT would end that, but also a living peer that keeps its window
# shut.  So the loop has a deadline of its own, and asks TCP_INFO: is_dead().


class Keepalive(NamedTuple):
    """Keepalive settings of a connection.  Spec: 3.3."""

    idle: int      #: seconds of silence before the first probe
    count: int     #: unanswered probes before the connection is reset
    interval: int  #: seconds between two probes

    limit = property(lambda self: self.idle + self.count * self.interval,
                     doc="Seconds of silence after which the peer vanished.")


def _keepalive_options():
    """Return [(setting, option's name, option)], OSError if one is missing.

    Linux takes 1 to 32767 seconds, 1 to 127 probes.
    """
    names = ("TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE")
             else "TCP_KEEPALIVE", "TCP_KEEPCNT", "TCP_KEEPINTVL")  # macOS
    try:
        return [(setting, name, getattr(socket, name))
                for setting, name in zip(Keepalive._fields, names)]
    except AttributeError as error:
        raise OSError(errno.ENOPROTOOPT, str(error)) from None


def get_keepalive(sock):
    """Return the Keepalive of a socket, None if it has none."""
    if not _ask(sock.getsockopt, socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return None
    return _ask(lambda: Keepalive(*(
        sock.getsockopt(socket.IPPROTO_TCP, option)
        for _, _, option in _keepalive_options())))


def set_keepalive(sock, keepalive):
    """Turn keepalive on, or off for None; or raise OSError with nothing set.

    Off, the socket keeps the settings, unused.
    """
    options = _keepalive_options() if keepalive else []
    before = [sock.getsockopt(socket.IPPROTO_TCP, option)
              for _, _, option in options]
    new = [*zip(options, keepalive or (), (32767, 127, 32767))]
    # Linux' limits, asked first: a default over them could not be set back.
    wrong = _LINUX and next((it for it in new if not 1 <= it[1] <= it[2]), 0)
    for (setting, name, option), value, _ in [wrong] if wrong else new:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        except (OSError, TypeError) as error:  # TypeError: no C int
            _system_error(error)
            for (_, _, undo), old in () if wrong else zip(options, before):
                sock.setsockopt(socket.IPPROTO_TCP, undo, old)
            raise OSError(
                getattr(error, "errno", errno.EINVAL),
                f"the system refuses {value} as {setting} ({name})") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(keepalive))


class TcpInfo(NamedTuple):
    """The part of Linux' struct tcp_info that is used here."""

    state: int       #: as in include/net/tcp_states.h
    unanswered: int  #: retransmissions or window probes with no answer yet
    silence: float   #: seconds since the peer last sent anything, even an ACK


# Eight bytes (state, ca_state, retransmits, probes, backoff, options, window
# scales, flags), then 32-bit fields; the 12th is tcpi_last_data_recv and the
# 13th tcpi_last_ack_recv, in milliseconds.
_TCP_INFO = struct.Struct("=B x B B 4x 44x I I")
_TCP_CLOSE, _TCP_LISTEN = 7, 10
_TCP_SHUT = (4, 5, 6, 9, 11)  #: our FIN was sent
#: No byte can follow: TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING.
_TCP_ENDED = (6, 7, 8, 9, 11)


def tcp_info(sock):
    """Return the TcpInfo of a socket, None where there is none."""
    if not _LINUX:
        return None  # TCP_INFO has other fields on BSDs
    raw = _ask(sock.getsockopt, socket.IPPROTO_TCP,
               getattr(socket, "TCP_INFO", -1), _TCP_INFO.size)
    if raw is None or len(raw) < _TCP_INFO.size:  # not TCP, or a sandbox
        return None
    state, retransmits, probes, data, ack = _TCP_INFO.unpack(raw)
    return TcpInfo(state, max(retransmits, probes), min(data, ack) / 1000)


def is_dead(info, limit, suspected):
    """Return whether a peer that owes an answer has vanished.

    Silence alone proves nothing: the kernel probes a shut window at growing
    intervals.  Proof is two transmissions without an answer, or one that has
    had an interval to be answered (suspected).
    """
    return info.silence >= limit and info.unanswered >= (1 if suspected else 2)

# ---------------------------------------------------------------------------
# 6. Probing a socket
# Facts about SO_ERROR and MSG_PEEK on Linux; each decides a line below:
#
# - Reading SO_ERROR clears it.  After an RST the first read says ECONNRESET,
#   the second 0, and recv() then says a clean EOF.  A MSG_PEEK that raises
#   consumes the error too.  So the prober must remember the result.
# - MSG_PEEK cannot see past unread bytes: it shows no FIN behind them, and
#   after an RST it still returns the data.  So SO_ERROR is asked first, and
#   where bytes are waiting TCP_INFO says whether the peer has sent FIN.
# - An RST that follows a FIN is EPIPE, not ECONNRESET.
# - SO_ERROR also returns, and clears, an ICMP error (EHOSTUNREACH, say) that
#   the kernel has only noted while it goes on trying: the connection is alive
#   unless the error has closed it.  getpeername() says ENOTCONN then.
# - A socket that is still connecting looks quiet (EAGAIN), like a good one.
# - recv() on a listener, and on a socket never connected, says ENOTCONN.

_recv = socket.socket.recv  # an SSLSocket's own refuses flags
#: The socket, or a duplicate of it, may be a blocking one.  0: there is none.
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
_PEEK = socket.MSG_PEEK | _DONTWAIT
_SOL_SOCKET, _SO_ERROR = socket.SOL_SOCKET, socket.SO_ERROR
_NO_SOCKET = (errno.EBADF, errno.ENOTSOCK, errno.ENOTCONN)  # behind a number
#: recv() and send() errors that say "not now".
_NOT_NOW = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOBUFS,
            errno.ENOMEM)
_FIONREAD = getattr(termios, "FIONREAD", 0)
_TIOCOUTQ = getattr(termios, "TIOCOUTQ", 0)


def _tcp_state(sock):
    """Return the state that TCP_INFO gives a socket, None if it gives none."""
    return getattr(tcp_info(sock), "state", None)


def _of_unconnected(sock):
    """Return the State behind ENOTCONN; Windows says it connecting, too."""
    tcp, own = _tcp_state(sock), _ask(sock.getsockname)
    if tcp == _TCP_CLOSE or not own or not own[1]:
        return State.BAD
    listens = _ask(sock.getsockopt, socket.SOL_SOCKET,
                   getattr(socket, "SO_ACCEPTCONN", -1))
    if listens is None:  # macOS has no such option
        listens = tcp in (_TCP_LISTEN, None)
    return State.ACCEPT if listens else State.CONNECT


def _look(sock):
    """Return (State, errno or None, bytes waiting) of a connected socket.

    OK with an errno: an ICMP error has come, but the connection lives.
    """
    soft = None
    try:
        number = sock.getsockopt(_SOL_SOCKET, _SO_ERROR)
        if number and _LINUX and _ask(sock.getpeername):
            soft, number = number, 0
        if not number:
            if not _recv(sock, 1, _PEEK):
                return _EOF, None, False
            if _tcp_state(sock) in _TCP_ENDED:
                return _EOF, None, True
            return _OK, soft, True
    except OSError as error:
        number = _system_error(error).errno
        if number in _NOT_NOW:
            return _OK, soft, False
    return (State.EOF if number == errno.EPIPE else State.BAD
            if number in _NO_SOCKET else State.ERROR), number, False


def _in_kernel(sock, request):
    """Return the bytes not read (FIONREAD), or not acknowledged, our FIN too
    (TIOCOUTQ); None where none can tell.
    """
    try:
        count = array.array("i", (0,))
        fcntl.ioctl(sock, request, count)
        return count[0]
    except (AttributeError, OSError, ValueError):  # no fcntl; not a socket
        return None


def _reset(sock):
    """Have close() send RST and throw away the bytes that are not sent."""
    sock.setsockopt(_SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(ImportError):
        # connect(AF_UNSPEC) sends it though a duplicate is held elsewhere.
        if _LINUX and _ask(sock.getpeername):
            import ctypes
            ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)


def probe(sock):
    """Return (State, errno or None) of any TCP socket.  Spec: 3.2.

    Needs no loop, and never blocks or raises because of the socket's state.
    OK with an errno: an ICMP error has come, and the kernel goes on trying.
    Reading an error clears it: a second probe may find less than the first.
    """
    timeout = sock.gettimeout()
    if (timeout or timeout is None and not _DONTWAIT) and sock.fileno() >= 0:
        # With a timeout Python waits for readability, whatever the flags.
        sock.settimeout(0)
        try:
            return probe(sock)
        finally:
            sock.settimeout(timeout)
    state, number, _ = _look(sock)
    if state is State.OK and _ask(sock.getpeername) is None:
        return State.CONNECT, None
    if number == errno.ENOTCONN and (found := _of_unconnected(sock)):
        return found, None
    return state, number

# ---------------------------------------------------------------------------
# 7. Messages and framings
# A framing turns bytes into payloads and payloads into bytes.  It touches no
# socket, reads no clock and calls no handler: a test only has to feed it
# bytes.  The loop pulls payloads one by one: when a connection may no longer
# send, or a handler closes it, the rest waits in the framing.


class Message:
    """The argument of a handler of request_route or onreply_route."""

    __slots__ = ("_conn", "data")

    #: The string of a WebSocket's text message, None for bytes.
    text = None

    def __init__(self, conn, data):
        self._conn = conn
        self.data = data  #: the payload, bytes

    framing = property(
        lambda self: getattr(self._conn.messages, "inner", None),
        doc="The connection's Framing, None for raw.")
    tls = property(
        lambda self: getattr(
            getattr(self._conn.messages, "framing", None), "tls", None),
        doc="The SSLObject, for getpeercert() and so on; None without TLS.")

    #: The connection that the message came on; see Event for the names.
    conid = property(lambda self: self._conn.conid)
    proto = property(lambda self: self._conn.proto)
    si = property(lambda self: self._conn.peer[0])
    sp = property(lambda self: self._conn.peer[1])
    Ri = property(lambda self: self._conn.local[0])
    Rp = property(lambda self: self._conn.local[1])

    #: Whether onreply_route, if there is one, gets this message: here, on a
    #: connection that we opened; SIP has a Message that knows.
    is_reply = property(lambda self: self._conn.plan.origin == "connect")
    payload = property(
        lambda self: self.data if self.text is None else self.text,
        doc="The text if there is one, else the data: reply(payload) echoes.")

    def reply(self, payload):
        """Send payload on the message's connection, as TcpOps.send does."""
        return self._conn.send(payload)

    def __repr__(self):
        return (f"<{type(self).__name__} conid {self.conid}:"
                f" {reprlib.repr(self.payload)}>")


class TextMessage(Message):
    """A message of a framing that distinguishes text from bytes."""

    __slots__ = ("text",)

    def __init__(self, conn, payload):
        text = isinstance(payload, str)
        self.text = payload if text else None
        super().__init__(conn, payload.encode() if text else payload)


class ProtocolError(Exception):
    """Raised by a framing: reason "protocol", with the text as detail."""


SKIPPED = object()  #: next_message has taken bytes that are no message


class Framing:
    """The base of every framing, yours included: listen, say, takes the class.

    Override next_message and encode, and for a ping_interval ping, which
    appends a ping to output.  While opened is False (a handshake), the
    connection is not usable and tcp:opened not reported.
    """

    proto = "tcp"      #: the proto of its connections
    message = Message  #: the class of its messages; read once it is open
    opened = True      #: False during a handshake
    handshake = "handshake"  #: its name
    closed = None  #: the end's detail, once the peer has sent its farewell
    mute = False  #: True once nothing more can be sent: send() then refuses
    amid = False  #: within a message: SKIPPED does not extend its time
    ping_interval = NEVER  #: seconds of the peer's silence before a ping
    ping_timeout = 10  #: seconds of silence after it before the end
    awaits_pong = False  #: True after a ping; set it to False at the pong

    def __init__(self, max_message, client, **pings):
        if not pings.keys() <= {"ping_interval", "ping_timeout"}:
            raise TypeError(f"no settings of a framing: {sorted(pings)}")
        for name, value in pings.items():  # functools.partial's, for example
            setattr(self, name, value)
        self.max_message = max_message  #: bytes; refuse a longer message
        self.client = client            #: True on a connection that we opened
        self.buffer = bytearray()  #: bytes received and not yet returned
        self.output = bytearray()  #: append the protocol's own bytes here

    def begin(self, host):
        """Append the protocol's opening bytes, if any, to output.

        Called once connected; host is connect's, as HTTP's Host has it, or "".
        """

    def receive(self, data):
        """Take bytes from the peer."""
        self.buffer += data

    def next_message(self):
        """Return the next payload, or None: more bytes are needed.

        A payload is bytes, or str for a TextMessage.  SKIPPED: it took bytes
        that are no message; call again.  May raise ProtocolError.
        """
        raise NotImplementedError

    def finish(self):
        """Return the payload that the FIN completes, or None.  May raise."""
        return None

    partial = property(
        lambda self: bool(self.buffer),
        doc="Whether a message has begun and is not complete.")
    pending = property(
        lambda self: len(self.buffer),
        doc="How many bytes were received and are in no message returned.")

    def encode(self, payload):
        """Return the bytes that send a payload of bytes."""
        raise NotImplementedError

    def encode_text(self, text):
        """Return the bytes that send a text, here as UTF-8."""
        return self.encode(text.encode())

    #: Once, of a handshake: (the end's detail, *arguments of answered).
    refused = lambda self: None

    def farewell(self, reason):
        """Return the last bytes to send, for one of REASONS; b"" next time."""
        return b""


class LineFraming(Framing):
    """A message is a line, without its LF or CR LF."""

    _searched = 0  # a line that drips in is not searched anew

    def next_message(self):
        """Return the next line, or None.  ProtocolError: it is too long."""
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
        """Return the last line, which needs no LF, or None."""
        line = bytes(self.buffer)
        self.buffer.clear()
        return line or None

    def encode(self, payload):
        """Return payload, with a LF added unless it ends with one."""
        return payload if payload.endswith(b"\n") else payload + b"\n"


_FOLD = re.compile(rb"\r\n[ \t]+")


def _parse_head(head, errors="replace"):
    """Return (first line, [(name, value), ...]) of a head, as HTTP has one.

    Values are unfolded, names in lower case; a line without colon is left out,
    and a name that is not ASCII (in lower case U+212A would be "k").
    """
    lines = _FOLD.sub(b" ", head).decode("utf-8", errors).split("\r\n")
    plain = head.isascii()
    fields = (line.partition(":") for line in lines[1:])
    return lines[0], [(name.strip(" \t").lower(), value.strip(" \t"))
                      for name, colon, value in fields
                      if colon and (plain or name.isascii())]


def _check_printable(buffer, protocol):
    """Raise if no text begins here: the end of a head might never come."""
    if buffer and buffer != b"\r" and not 0x20 < buffer[0] < 0x7F:
        hint = " (TLS on a port without it?)" if buffer[0] == 0x16 else ""
        raise ProtocolError(f"this is not {protocol}{hint}")


#: The framings by name; add yours.  "raw" has none: a message is one recv().
FRAMINGS = {"raw": None, "line": LineFraming}
_LAYERS = {}  #: TLS, and the framing that it goes around for raw
# A section that enters itself into these is named nowhere else, and brings its
# own imports and public names: it can be cut out of the file.

# ---------------------------------------------------------------------------
# 8. SIP over a stream
# Not a SIP stack: where a message ends (RFC 3261, 18.3), and access to its
# headers.  A start line must name SIP and is not judged otherwise, so that a
# request which no one understands does not cost the ones behind it.

#: The compact names of RFC 3261, 7.3.3, and those registered since.
_COMPACT = {
    "a": "accept-contact", "b": "referred-by", "c": "content-type",
    "d": "request-disposition", "e": "content-encoding", "f": "from",
    "i": "call-id", "j": "reject-contact", "k": "supported",
    "l": "content-length", "m": "contact", "n": "identity-info", "o": "event",
    "r": "refer-to", "s": "subject", "t": "to", "u": "allow-events",
    "v": "via", "x": "session-expires", "y": "identity",
}
#: The parts of a start line, by the names of SipMessage's properties.
_STATUS_LINE = re.compile(
    r"[^ \t]*[ \t]*(?:(?P<status>[0-9]{3})(?![^ \t])|[^ \t]*)[ \t]*"
    r"(?P<reason>(?:.*[^ \t])?)")
_REQUEST_LINE = re.compile(
    r"(?P<method>[^ \t]*)[ \t]*(?P<uri>(?:.*[^ \t](?=[ \t]+SIP/))?)", re.I)


class SipMessage(TextMessage):
    """A SIP message; its head is parsed when first asked for."""

    __slots__ = ("_head",)

    def _parsed(self):
        """Return ({part of the start line: text}, header fields, body)."""
        if not hasattr(self, "_head"):
            head, _, body = self.data.partition(b"\r\n\r\n")
            start, fields = _parse_head(head)
            line = _STATUS_LINE if self.is_reply else _REQUEST_LINE
            fields = [(_COMPACT.get(name, name), value)
                      for name, value in fields]
            self._head = line.match(start).groupdict(), fields, body
        return self._head

    is_reply = property(lambda self: self.data[:4].upper() == b"SIP/",
                        doc="Whether it is a response.")
    method = property(lambda self: self._parsed()[0].get("method"),
                      doc="The method of a request; None for a response.")
    uri = property(lambda self: self._parsed()[0].get("uri"),
                   doc="The Request-URI of a request; None for a response.")
    reason = property(lambda self: self._parsed()[0].get("reason"),
                      doc="The phrase of a response; None for a request.")
    body = property(lambda self: self._parsed()[2],
                    doc="The bytes after the headers.")

    @property
    def status(self):
        """The status code of a response if it is three digits, else None."""
        status = self._parsed()[0].get("status")
        return status and int(status)

    def headers(self, name):
        """Return the values of all header fields of that name, in order.

        The name may be in any case, long or compact; a list is not split.
        """
        name = _COMPACT.get(name.lower(), name.lower())
        return [value for field, value in self._parsed()[1] if field == name]

    def header(self, name):
        """Return the first of headers(name), None if there is none."""
        return next(iter(self.headers(name)), None)


_LENGTHS = re.compile(
    rb"\r\n(?:content-length|l)(?:[ \t]|\r\n[ \t])*:((?:[^\r\n]|\r\n[ \t])*)",
    re.IGNORECASE)
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")
_CRLFS = re.compile(rb"(?:\r\n)+")
#: A first line that names SIP, and is not folded.
_START = re.compile(rb"(?![^\r\n]*\r\n[ \t])(?:[!-~][^\r\n]*[ \t])?SIP/",
                    re.IGNORECASE)


def _content_length(head):
    """Check a head; return its Content-Length, None if there is none."""
    if not _START.match(head):
        raise ProtocolError("this is not SIP")
    if _BARE.search(head):
        raise ProtocolError("a bare CR or LF: lines end with CR LF")
    values = {_FOLD.sub(b" ", value).strip(b" \t")
              for value in _LENGTHS.findall(head)}
    if not all(map(bytes.isdigit, values)):  # of ASCII
        raise ProtocolError("Content-Length is no number")
    # 20 digits are more than any max_message.
    lengths = {int(value.lstrip(b"0")[:20] or b"0") for value in values}
    if len(lengths) > 1:
        raise ProtocolError("several Content-Lengths that differ")
    return lengths.pop() if lengths else None


class SipFraming(Framing):
    """SIP messages, by their Content-Length (RFC 3261, 18.3).

    CR LF before a message is skipped; two of them are a keepalive, answered
    by one (RFC 5626, 3.5.1).  Without a Content-Length, or with several that
    differ, no one knows where the next message begins: ProtocolError.
    """

    message = SipMessage
    _half = 0      # CR LFs: 1 waits for its second, -1 is a pong's
    _searched = 0  # a head that drips in is not searched anew
    _length = 0    # of the message, 0 until its head is complete

    def next_message(self):
        """Return the next message, or None.  Raises ProtocolError."""
        length = self._length or self._find_length()
        if not length or len(self.buffer) < length:
            return None
        data = bytes(self.buffer[:length])
        del self.buffer[:length]
        self._length = 0
        return data

    def _find_length(self):
        """Return the length of the next message, 0 if not known yet."""
        buffer = self.buffer
        crlfs = _CRLFS.match(buffer)
        if crlfs:
            self._half += crlfs.end() // 2
            self.awaits_pong = self.awaits_pong and self._half < 0
            self.output += b"\r\n" * (self._half // 2)
            self._half = min(self._half, self._half % 2)
            del buffer[:crlfs.end()]
            self._searched = 0
        _check_printable(buffer, "SIP")
        end = buffer.find(b"\r\n\r\n", self._searched)
        if end >= 0:
            length = _content_length(bytes(buffer[:end]))
            if length is None:
                raise ProtocolError("no Content-Length")
            self._half, self._searched = min(self._half, 0), 0
            self._length = end + 4 + length
        else:
            self._searched = max(0, len(buffer) - 3)
        if max(self._length, self._searched) > self.max_message:
            raise ProtocolError(f"a message of over {self.max_message} bytes")
        return self._length

    @staticmethod
    def whole(data, websocket):
        """Return the message in a WebSocket's, or SKIPPED: a keepalive.

        Bytes beyond a Content-Length are no part of it (RFC 3261, 18.3).
        """
        crlfs = _CRLFS.match(data)
        message = data[crlfs.end():] if crlfs else data
        if not message:
            if data == b"\r\n":
                websocket.awaits_pong = False
            elif data:
                websocket.output += websocket.encode_text("\r\n")
            return SKIPPED
        head, end, rest = message.partition(b"\r\n\r\n")
        length = _content_length(head)
        if not end or length is not None and length > len(rest):
            raise ProtocolError("a message that is cut short")
        return head + end + rest[:length]

    def encode(self, payload):
        """Return payload, with a Content-Length if a message has none."""
        end = payload.find(b"\r\n\r\n")
        if end == 0:
            self._half -= _CRLFS.match(payload).end() // 4
        elif (end > 0 and payload.find(b"\r\nContent-Length:", 0, end) < 0
              and _START.match(payload)
              and not _LENGTHS.search(payload, 0, end)):
            return b"%b\r\nContent-Length: %d%b" % (
                payload[:end], len(payload) - end - 4, payload[end:])
        return payload

    def ping(self):
        """Queue CR LF CR LF.  RFC 5626, 4.4.1."""
        self.output += self.encode(b"\r\n\r\n")


_URI = re.compile(
    r"(?P<scheme>sips?):(?:[^@]*@)?(?P<host>[^;?]*)(?P<parameters>;[^?]*)?"
    r"(?:\?.*)?", re.IGNORECASE | re.DOTALL)

#: Per scheme and transport of a URI: the protos of connections that will do,
#: None for all, and the default port (RFC 3261, 19.1.2; RFC 7118).
_TRANSPORTS = {
    "sip": (None, 5060), "sips": (("tls", "wss"), 5061),
    "sip;transport=tcp": (("tcp",), 5060), "sip;transport=ws": (("ws",), 80),
    **dict.fromkeys(("sip;transport=tls", "sips;transport=tls",
                     "sips;transport=tcp"), (("tls",), 5061)),
    **dict.fromkeys(("sip;transport=wss", "sips;transport=wss",
                     "sips;transport=ws"), (("wss",), 443)),
}


def _parse_sip_uri(uri):
    """Return what _parse_uri does for a SIP URI; None for a wrong one.

    One that asks for TLS, or for a way that is not ours, must not be served by
    another one: it is refused.
    """
    match = _URI.fullmatch(uri)
    from urllib.parse import unquote  # here: little else needs it
    parameters = re.sub(r"\s", "", unquote(match["parameters"] or "").lower())
    named = re.findall(r";((?:transport|maddr)(?![^;=])[^;]*)", parameters)
    protos, port = _TRANSPORTS.get(
        ";".join((match["scheme"].lower(), *named)), (None, None))
    return port and _parse_host(match["host"], port, protos, SipFraming)


_SCHEMES.update(sip=_parse_sip_uri, sips=_parse_sip_uri)
FRAMINGS["sip"] = SipFraming
__all__ += ["SipMessage", "SipFraming"]

# ---------------------------------------------------------------------------
# 9. WebSocket
# RFC 6455: an HTTP request and its answer, then frames.  A frame's payload is
# taken as it arrives, so that text that is not UTF-8, and a message that will
# be too long, are refused at their first wrong byte.  A client masks its
# frames, a server does not.  No extensions: every reserved bit is wrong.

import binascii
import codecs
import http
from collections.abc import Sequence

_CONTINUED, _TEXT, _BINARY = 0x0, 0x1, 0x2
_CLOSE, _PING, _PONG = 0x8, 0x9, 0xA
_FINAL = _MASKED = 0x80
_LONGEST_HEAD = 16384  #: bytes of an HTTP head, or of a refusal's body
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: A line that a program may add to a head: nothing in it ends the line (RFC
#: 9110, 5.5), and what follows the head is not for the program to say.
_FIELD = re.compile(
    "(?ai)(?!(?:connection|content-length|sec-websocket-.*|transfer-encoding"
    f"|upgrade):){_TOKEN.pattern}: "
    r"[^\0-\x08\x0a-\x1f\x7f\ud800-\udc7f\udd00-\udfff]*")
#: A request: RFC 9112, 3.2 (absolute-form or origin-form) and 5.2 (folds).
#: The limit of 100 fields is ours: each takes more memory than its bytes.
_REQUEST = re.compile(
    r"\S+ (?:(?ai:https?|wss?)://[^/?#@\\\0-\x20]+|(?=/))"
    r"([/?][^#\0-\x20\x7f-\x9f]*|) HTTP/[0-9]\.[0-9]"
    rf"(?:\r\n{_TOKEN.pattern}:[^\0\r\n]*(?:\r\n[ \t][^\0\r\n]*)*){{0,100}}"
    r"\r\n\r\n")
_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
_BODILESS = dict.fromkeys((204, 304), {"content-length": "0"})  # RFC 9112, 6.3
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[^\r\n]*\r\n")
_LISTS = r"(?ai)(?:.*,)?\s*%s\s*(?:,.*)?"
_ABSENT = "\r\n"  #: stands for the value of a header that is not there
#: Asked once refuse() has accepted a request (RFC 6455, 4.2.1; RFC 9112, 3.2
#: and 6): header, pattern of its value, words and status (400) of a refusal.
_REQUEST_RULES = (
    (":start", r".* HTTP/(?:1\.[1-9]|[2-9].*)", "HTTP/1.1 is needed"),
    (":start", "GET .*", "the method must be GET"),
    ("host", r"[^\s,/?#@\\]+", "there must be one Host"),
    ("transfer-encoding", _ABSENT, "a request with a body"),
    ("content-length", f"{_ABSENT}|0+", "a request with a body"),
    ("upgrade", _LISTS % "websocket", "Upgrade must name websocket", 426),
    ("connection", _LISTS % "upgrade", "Connection must name Upgrade"),
    ("sec-websocket-key", "[A-Za-z0-9+/]{22}==",
     "Sec-WebSocket-Key must be 16 bytes in base64"),
    ("sec-websocket-version", "13", "Sec-WebSocket-Version must be 13", 426))
#: The codes that a close frame may carry (7.4, and IANA's registry).
_CLOSE_CODES = range(1000, 1004), range(1007, 1015), range(3000, 5000)


def _xor(data, mask):
    """Mask or unmask bytes, as long integers: the fastest in pure Python."""
    count = len(data)
    repeated = (mask * (count // 4 + 1))[:count]
    return (int.from_bytes(data, "little")
            ^ int.from_bytes(repeated, "little")).to_bytes(count, "little")


def _accept_key(key):
    """Return the answer to a Sec-WebSocket-Key (4.2.2)."""
    import hashlib  # here: it loads OpenSSL, which nothing else needs
    digest = hashlib.sha1(key.encode() + _GUID).digest()
    return binascii.b2a_base64(digest).decode().strip()


def _printable(text):
    """Return a text of the peer's for a detail: it may end at a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1]
                   for char in text)


def _check_fields(pairs):
    """Return header fields as a list; ValueError: they cannot be sent."""
    pairs = list(pairs)
    for name, value in pairs:
        if (not isinstance(name, str) or not isinstance(value, (str, int))
                or not _FIELD.fullmatch(f"{name!s}: {value!s}")):
            raise ValueError(f"not a header field: {name!r}: {value!r}")
    return pairs


class _Fields(Sequence):
    """The (name, value) pairs of a request; its bytes take a tenth of them."""

    def __init__(self, head):
        self.head = head

    def __getitem__(self, index):
        return _parse_head(self.head, "surrogateescape")[1][index]

    __len__ = lambda self: len(self[:])
    __iter__ = lambda self: iter(self[:])


class WebSocketFraming(Framing):
    """Both sides of a WebSocket.  A subclass may ask for or grant more.

    msg.text is a text message's string, msg.data the bytes of any message.
    With the subprotocol "sip" (RFC 7118) messages are those of SIP's framing.
    """

    proto = "ws"
    message = TextMessage
    handshake = "WebSocket handshake"
    path = "/"                #: that a client asks for, a server is asked for
    headers = ()  #: (name, value) pairs beside it; a client's replace ours
    offers = ()               #: the subprotocols that a client offers
    #: Those that a server speaks.
    subprotocols = ("sip",) if "sip" in FRAMINGS else ()
    _whole = staticmethod(lambda data, websocket: data)  # SIP's checks it

    def __init__(self, max_message, client, **pings):
        super().__init__(max_message, client, **pings)
        self._check()
        self.opened = False
        self.subprotocol = None  #: the one agreed on
        self._key = None         # of a client's handshake
        self._refusal = None     # (status, headers, the body's, detail)
        self._frame = None       # (opcode, final, mask) of what comes in
        self._left = 0           # bytes of it that have not come
        self._kind = None        # opcode of the message that comes in
        self._parts = bytearray()  # of that message
        self._decoded = 0        # bytes of them that are known to be UTF-8

    def refuse(self, path, headers):
        """Return None, or the reason of a 403, a status, or (status, headers,
        text), where status 101 accepts and adds headers to the answer.

        Asked of each request that is HTTP, also a health check's.  headers are
        (name in lower case, value) pairs, as in msg.framing's.  What is not
        UTF-8 in them and in path is as os.fsdecode has it.  Raises: the words
        of a ProtocolError are the reason of a 403, another error is a 500.
        """
        return None

    def answered(self, status, headers, body):
        """Hear a server's answer: once, before its client opens or ends.

        headers as for refuse; body: the bytes of a refusal's, 16 kB at most.
        """

    def _check(self):
        """Raise ValueError for a setting that a request cannot carry."""
        if not re.fullmatch(r"/[!\"$-~]*", self.path):
            raise ValueError(f"not a WebSocket path: {self.path!r}")
        for names in (self.offers, self.subprotocols):
            if (isinstance(names, str) or len(set(names)) < len(names)
                    or not all(map(_TOKEN.fullmatch, names))):
                raise ValueError(f"not a tuple of distinct tokens: {names!r}")
        _check_fields(self.headers)

    def begin(self, host):
        """Queue a client's request."""
        if self.client:
            self._check()  # a subclass may have set them after __init__
            self._key = binascii.b2a_base64(os.urandom(16)).decode().strip()
            self._say_http(f"GET {self.path} HTTP/1.1", {
                "Host": host, "Upgrade": "websocket", "Connection": "Upgrade",
                "Sec-WebSocket-Key": self._key, "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Protocol": ", ".join(self.offers) or None,
            }, self.headers)

    def _say_http(self, start, ours, theirs, body=b""):
        """Queue a head; fields of theirs, the program's, replace ours."""
        names = {name.lower() for name, _ in theirs}
        fields = [(name, value) for name, value in ours.items()
                  if value is not None and name.lower() not in names]
        lines = [start, *(f"{name!s}: {value!s}" for name, value
                          in (*fields, *theirs)), "", ""]
        self.output += "\r\n".join(lines).encode("utf-8", "surrogateescape")
        self.output += body

    def _shake_hands(self):
        """Take the other side's half of the handshake; SKIPPED or None."""
        if self._refusal:
            return self._take_body()
        while self.buffer.startswith(b"\r\n"):  # RFC 9112, 2.2
            del self.buffer[:2]
        _check_printable(self.buffer, "HTTP")
        end = re.search(rb"\n\r?\n", self.buffer)
        if (end.start() if end else len(self.buffer)) > _LONGEST_HEAD:
            self._refuse("the headers have no end within 16 kB")
        if not end:
            return None
        head = bytes(self.buffer[:end.end()])
        start, pairs = _parse_head(head, "surrogateescape")
        headers = {":start": start}
        for name, value in pairs:
            headers[name] = (f"{headers[name]}, {value}" if name in headers
                             else value)
        take = self._take_answer if self.client else self._answer
        opened = take(head, pairs, headers)
        if opened is None:
            return None
        del self.buffer[:len(head)]  # only now: a signal may cut refuse() off
        self.opened = opened
        return SKIPPED

    def _answer(self, head, pairs, headers):
        """Refuse or grant a client's request.  RFC 6455, 4.2."""
        match = _REQUEST.fullmatch(head.decode("utf-8", "surrogateescape"))
        if not match:
            self._refuse("GET path HTTP/1.1 and up to 100 headers are needed")
        self.path = match[1] if match[1][:1] == "/" else f"/{match[1]}"
        self.headers = _Fields(head)
        try:
            answer = self.refuse(self.path, self.headers) or 101
        except ProtocolError as error:
            answer = 403, (), str(error)
        if isinstance(answer, int):
            answer = answer, (), ""
        status, added, text = (answer if isinstance(answer, tuple)
                               else (403, (), str(answer)))
        added = _check_fields(added)
        if status != 101:
            if not 200 <= status <= 599:
                raise ValueError(f"not the status of a refusal: {status!r}")
            self._refuse(text, status, added)
        self._require(_REQUEST_RULES, headers)
        offered = headers.get("sec-websocket-protocol", "").split(",")
        self._agree(next((name.strip() for name in offered
                          if name.strip() in self.subprotocols), None))
        self._say_http("HTTP/1.1 101 Switching Protocols", {
            "Upgrade": "websocket", "Connection": "Upgrade",
            "Sec-WebSocket-Accept": _accept_key(headers["sec-websocket-key"]),
            "Sec-WebSocket-Protocol": self.subprotocol}, added)
        return True

    def _require(self, rules, headers):
        """Refuse a head that breaks a rule."""
        for name, pattern, *refusal in rules:
            if not re.fullmatch(pattern, headers.get(name, _ABSENT)):
                self._refuse(*refusal)

    def _refuse(self, text, status=400, added=()):
        """Raise ProtocolError; a server queues an answer first."""
        body, old = text.encode("utf-8", "surrogateescape"), status == 426
        bare = status in _BODILESS
        start = f"{status:d} {_PHRASES.get(status, '')}"
        if not self.client:
            self._say_http(f"HTTP/1.1 {start}", {
                "Upgrade": "websocket" if old else None,
                "Sec-WebSocket-Version": "13" if old else None,
                "Connection": "Upgrade, close" if old else "close",
                "Content-Type": "text/plain; charset=utf-8" if body else None,
                "Content-Length": None if bare else len(body),
            }, added, b"" if bare or self.buffer[:5] == b"HEAD " else body)
        raise ProtocolError(
            f"{self.handshake} failed: {_printable(text[:200]) or start}")

    def _agree(self, subprotocol):
        self.subprotocol = subprotocol
        if subprotocol == "sip":
            sip = FRAMINGS.get("sip")
            self.message = getattr(sip, "message", self.message)
            self._whole = getattr(sip, "whole", self._whole)

    def _take_answer(self, head, pairs, headers):
        """Return whether an answer opens it (4.1), None if more is to come."""
        start = headers[":start"]
        says = f"the peer says {_printable(start[:80])}"
        match = re.match(r"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: |$)", start)
        status = int(match[1]) if match else 0
        if status == 101:
            self.answered(status, pairs, b"")
        elif 100 <= status < 200:
            return False  # another one will follow: RFC 9110, 15.2
        elif status:
            self._refusal = status, pairs, _BODILESS.get(status, headers), says
            del self.buffer[:len(head)]
            return self._take_body()
        self._require((
            (":start", r"HTTP/1\.1 101( .*)?", says),
            ("upgrade", "(?ai)websocket", "Upgrade must be websocket"),
            ("connection", _LISTS % "upgrade", "Connection must name Upgrade"),
            ("sec-websocket-accept", re.escape(_accept_key(self._key)),
             "Sec-WebSocket-Accept is wrong"),
            ("sec-websocket-extensions", f"(?:{_ABSENT})?",
             "an extension not offered"),
            ("sec-websocket-protocol", "|".join(
                map(re.escape, (_ABSENT, "", *self.offers))),
             "a subprotocol not offered")), headers)
        self._agree(headers.get("sec-websocket-protocol") or None)
        return True

    def _take_body(self):
        """Refuse, too, once a refusal's body has come, or 16 kB of it."""
        _, _, headers, says = self._refusal
        if "chunked" in headers.get("transfer-encoding", "").lower():
            complete = self._take_chunks()
        else:
            self._parts += self.buffer
            self.buffer.clear()
            length = re.fullmatch("0*([0-9]{1,9})",
                                  headers.get("content-length", ""))
            # Without one it ends with the connection, if that is to end (9.3).
            complete = (len(self._parts) >= int(length[1]) if length
                        else "close" not in headers.get(
                            "connection", "close").lower())
            del self._parts[int(length[1]) if length else _LONGEST_HEAD + 1:]
        if complete or len(self._parts) + len(self.buffer) > _LONGEST_HEAD:
            self._refuse(says)

    def _take_chunks(self):
        """Take the chunks that have come; return whether the last has."""
        while self._left or (match := _CHUNK.match(self.buffer)):
            if not self._left:
                self._left = int(match[1], 16) + 2  # and the CR LF behind it
                del self.buffer[:match.end()]
                if self._left == 2:
                    return True
            part = self.buffer[:self._left]
            del self.buffer[:len(part)]
            self._parts += part
            self._left -= len(part)
            if self._left:
                break
            del self._parts[-2:]
        return False

    def refused(self):
        """Return None or, once, a refusal's detail and answered's three."""
        refusal, self._refusal = self._refusal, None
        return refusal and (f"{self.handshake} failed: {refusal[3]}",
                            *refusal[:2], bytes(self._parts[:_LONGEST_HEAD]))

    def next_message(self):
        """Return the next message, str or bytes; SKIPPED or None if none."""
        if not self.opened:
            return self._shake_hands()
        if self.closed or not (self._frame or self._begin_frame()):
            return None
        return self._take_frame()

    def _fail(self, code, detail):
        """Raise ProtocolError; a close frame says why.  7.1.7, 7.4.1."""
        self._queue_close(code, detail)
        raise ProtocolError(detail)

    def _begin_frame(self):
        """Take a frame's head; return whether it was complete.  5.2."""
        buffer = self.buffer
        if len(buffer) < 2:
            return False
        opcode, final = buffer[0] & 0x0F, buffer[0] & _FINAL
        length, size, least = buffer[1] & 0x7F, 2, 0
        self._check_frame(opcode, final, length)
        if length >= 126:
            size, least = (4, 126) if length == 126 else (10, 65536)
            if len(buffer) < size:
                return False
            length = int.from_bytes(buffer[2:size], "big")
        if not least <= length < 2 ** 63:
            self._fail(1002, "a payload length that is badly written")
        if opcode < _CLOSE and len(self._parts) + length > self.max_message:
            self._fail(1009, f"a message of over {self.max_message} bytes")
        end = size if self.client else size + 4
        if len(buffer) < end:
            return False
        self._frame = opcode, final, bytes(buffer[size:end])
        self._left = length
        del buffer[:end]
        if opcode in (_TEXT, _BINARY):
            self._kind = opcode
        return True

    def _check_frame(self, opcode, final, length):
        """Fail if a frame's first two bytes are wrong."""
        if self.buffer[0] & 0x70:
            self._fail(1002, "a reserved bit is set")
        if opcode not in (_CONTINUED, _TEXT, _BINARY, _CLOSE, _PING, _PONG):
            self._fail(1002, f"opcode {opcode} is unknown")
        if bool(self.buffer[1] & _MASKED) == self.client:
            self._fail(1002, "a masked frame from the server"
                       if self.client else "a frame without mask")
        if opcode >= _CLOSE and not final:
            self._fail(1002, "a control frame in fragments")
        if opcode >= _CLOSE and length > 125:
            self._fail(1002, "a control frame of over 125 bytes")
        if opcode < _CLOSE and (opcode == _CONTINUED) != self.amid:
            self._fail(1002, "a message within a message" if self.amid
                       else "a continuation of nothing")

    def _take_frame(self):
        """Take a frame's bytes; return a message, SKIPPED or None."""
        opcode, final, mask = self._frame
        if opcode >= _CLOSE and len(self.buffer) < self._left:
            return None
        data = bytes(self.buffer[:self._left])
        del self.buffer[:len(data)]
        self._left -= len(data)
        if mask:
            data = _xor(data, mask)
            turn = len(data) % 4
            mask = mask[turn:] + mask[:turn]
        self._frame = (opcode, final, mask) if self._left else None
        if opcode >= _CLOSE:
            self._take_control(opcode, data)
            return SKIPPED
        self._parts += data  # not as a list: a part may be tiny
        if final and not self._left:
            return self._take_message(bytes(self._parts))
        if self._kind == _TEXT:
            self._decoded += self._decode(
                self._parts[self._decoded:], "text", False)[1]
        return None if self._left else SKIPPED

    def _take_message(self, data):
        """Return a message of these bytes, or SKIPPED: SIP's keepalive."""
        text, self._kind = self._kind == _TEXT, None
        self._parts, self._decoded = bytearray(), 0
        message = self._decode(data, "text")[0] if text else data
        try:
            whole = self._whole(data, self)
        except ProtocolError as error:
            self._fail(1007, str(error))
        return message if whole == data else whole  # the cut may end its text

    def _decode(self, data, name, final=True):
        """Return (text, how many bytes it takes), or fail."""
        try:
            return codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError:
            self._fail(1007, f"{name} that is not UTF-8")

    def _take_control(self, opcode, payload):
        """Answer a control frame.  5.5."""
        if opcode == _PING:
            self.output += self._encode_frame(_PONG, payload)
        elif opcode == _PONG:
            self.awaits_pong = False
        else:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            if payload and not any(code in codes for codes in _CLOSE_CODES):
                self._fail(1002, "a close frame with an invalid code")
            reason, _ = self._decode(payload[2:], "a close reason")
            self.closed = f"close frame {code} {_printable(reason)}".rstrip()
            self.buffer.clear()
            self._queue_close(code)

    amid = property(lambda self: self._kind is not None)
    partial = property(lambda self: bool(
        self.amid or self._frame or self.buffer))
    pending = property(lambda self: len(self.buffer) + len(self._parts))

    def finish(self):
        """Note that the FIN has cut it short."""
        where = ("without a close frame" if self.opened
                 else f"within the {self.handshake}")
        self.closed = self.closed or f"FIN {where}"

    def _encode_frame(self, opcode, payload):
        """Return a frame, always the only one of its message."""
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

    def ping(self):
        """Queue a ping frame, and with SIP the ping of RFC 5626 before it."""
        if self.subprotocol == "sip":
            self.output += self.encode_text("\r\n\r\n")  # not all answer it
        self.output += self._encode_frame(_PING, b"")  # a browser does

    def _queue_close(self, code, reason=""):
        """Queue a close frame, once.  1005 stands for no code (7.1.5)."""
        if self.opened and not self.mute:
            self.mute = True
            head = b"" if code == 1005 else code.to_bytes(2, "big")
            self.output += self._encode_frame(
                _CLOSE, head + reason.encode()[:123])

    def farewell(self, reason):
        """Return a close frame or a 500, unless one has been sent.  7.4.1."""
        if reason == "error" and not self.opened:
            with contextlib.suppress(ProtocolError):
                self._refuse("the server has failed", 500)
        self._queue_close({"closed": 1000, "eof": 1000, "error": 1011}.get(
            reason, 1001))
        data = bytes(self.output)
        self.output.clear()
        return data


FRAMINGS["ws"] = WebSocketFraming
__all__ += ["WebSocketFraming"]

# ---------------------------------------------------------------------------
# 10. TLS
# A framing around another one, over two memory BIOs of the ssl module: the
# loop just moves bytes, and the socket stays a plain one that can be probed
# (an SSLSocket refuses MSG_PEEK).
#
# Three ends: close_notify is a clean one ("eof"), a FIN without it a
# truncation ("protocol"; anyone on the way can send one), an RST a "reset".

_LONGEST_RECORD = 16384  #: bytes of plain text in a TLS record


class RawFraming(Framing):
    """The "raw" of TLS: a message is the bytes received.  TCP needs none."""

    partial = False  #: no message is ever incomplete

    def next_message(self):
        """Return the bytes received, max_message at the most, or None."""
        data = bytes(self.buffer[:self.max_message])
        del self.buffer[:len(data)]
        return data or None

    def encode(self, payload):
        """Return payload as it is."""
        return payload


class TlsFraming(Framing):
    """TLS around a framing.  See the tls argument of listen and connect."""

    @staticmethod
    def check_context(context, client):
        """Raise ValueError for a context that does not fit this side."""
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
        context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # PyPy: none

    def __init__(self, context, server_hostname, inner):
        import ssl  # only a program that uses TLS pays for it
        super().__init__(inner.max_message, inner.client)
        self._ssl, self.inner = ssl, inner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=not inner.client,
            server_hostname=server_hostname)
        self._shaken = False  # the handshake is done
        # Words for the ProtocolError that follows what came before it; the
        # error itself would hold frames, and they this.
        self._failure = ""
        self._head = b""      # of the record that comes in: up to 5 bytes,
        self._left = 0        # and how many bytes of it are missing

    handshake = property(lambda self: self.inner.handshake if self._shaken
                         else "TLS handshake")
    proto = property(lambda self: {"tcp": "tls", "ws": "wss"}.get(
        self.inner.proto, self.inner.proto))
    message = property(lambda self: self.inner.message)
    opened = property(lambda self: self._shaken and self.inner.opened)
    amid = property(lambda self: self.inner.amid)
    mute = property(lambda self: bool(self._failure) or self.inner.mute)
    partial = property(lambda self: bool(
        self.inner.partial or self._left or self._head))
    pending = property(lambda self: self.inner.pending)
    refused = property(lambda self: self.inner.refused)

    def begin(self, host):
        """Start the handshake."""
        self.inner.begin(host)  # its bytes wait for the end of the handshake
        self._advance()

    def receive(self, data):
        """Decrypt bytes from the peer."""
        self._count_records(data)
        # A BIO keeps the room that it once needed: a record's, not a recv()'s.
        for at in range(0, len(data), _LONGEST_RECORD):
            self._incoming.write(data[at:at + _LONGEST_RECORD])
            self._advance()

    def _advance(self):
        """Continue the handshake, then decrypt the bytes received."""
        try:
            if not self._shaken:
                self.tls.do_handshake()
                self._shaken = True
            while not self.closed:
                data = self.tls.read(_LONGEST_RECORD)
                if not data:
                    raise self._ssl.SSLZeroReturnError
                self.inner.receive(data)
                if not self._incoming.pending and not self.tls.pending():
                    break  # spares the exception that says so
        except self._ssl.SSLWantReadError:
            pass
        except self._ssl.SSLZeroReturnError:
            self.closed = "close_notify from the peer"
        except self._ssl.SSLError as failure:  # the base of both
            self._failure = self._failure or self._explain(failure)
        self._collect()

    def _explain(self, failure):
        """Return words for an error of the ssl module."""
        reason = getattr(failure, "verify_message", None) or (
            failure.reason or re.sub(r"^\[\w+\] | \(_ssl.*\)$", "",
                                     str(failure))).lower().replace("_", " ")
        # Alerts 110 to 114 are "tlsv1 unrecognized name", say.
        reason = re.sub(r"^(?:sslv3|tlsv1\d?) (?:alert )?", "the peer says ",
                        reason).replace("unknown error", "an unnamed error")
        if not self._shaken and reason.startswith(("wrong version", "http")):
            reason += " (plain text on a TLS port?)"
        elif reason == "no shared cipher":
            reason += " (has the listener's context a certificate?)"
        start = "TLS" if self._shaken else "TLS handshake failed"
        return f"{start}: {reason}"

    def _count_records(self, data):
        """Keep track of whether a record is incomplete (RFC 8446, 5.1)."""
        data = memoryview(data)
        while data:
            part = data[:self._left or 5 - len(self._head)]
            data = data[len(part):]
            if self._left:
                self._left -= len(part)
            else:
                self._head += part
            if len(self._head) == 5:
                self._left = int.from_bytes(self._head[3:], "big")
                self._head = b""

    def next_message(self):
        """Return the next message of the inner framing."""
        try:
            payload = self.inner.next_message()
        finally:
            self._collect()
        self.closed = self.inner.closed or self.closed
        if payload is None and self._failure and not self.closed:
            raise ProtocolError(self._failure)
        return payload

    def finish(self):
        """Return the payload that FIN completes, unless FIN came alone."""
        if not self._shaken:
            raise ProtocolError("FIN within the TLS handshake")
        if not self.closed:
            raise ProtocolError("TLS truncated: FIN without close_notify")
        return self.inner.finish()

    def _collect(self):
        """Encrypt the inner framing's bytes, unless OpenSSL has given up."""
        if self.inner.output and self._shaken:
            data, self.inner.output = self.inner.output, bytearray()
            for at in range(0, 0 if self._failure else len(data),
                            _LONGEST_RECORD):
                self.tls.write(data[at:at + _LONGEST_RECORD])
                self.output += self._outgoing.read()  # as in receive()
        self.output += self._outgoing.read()

    def _flush(self, data=b""):
        """Encrypt data; return the bytes to send, and forget them."""
        self.inner.output += data
        self._collect()
        data = bytes(self.output)
        self.output.clear()
        return data

    def encode(self, payload):
        """Return the records that send a payload."""
        return self._flush(self.inner.encode(payload))

    def encode_text(self, text):
        """Return the records that send a text."""
        return self._flush(self.inner.encode_text(text))

    def farewell(self, reason):
        """Return the inner framing's farewell and close_notify."""
        if self._shaken and not self._failure:
            with contextlib.suppress(self._ssl.SSLError):
                self.output += self._flush(self.inner.farewell(reason))
                self.tls.unwrap()
            self._failure = "closed by us"  # encode() may have had it closed
        return self._flush()


_LAYERS.update(raw=RawFraming, tls=TlsFraming)
__all__ += ["RawFraming"]

# ---------------------------------------------------------------------------
# 11. The life of a connection
# The state machine, as data: the phases and what each allows (LIFE), the kinds
# of deadline (DEADLINES), and why a connection is not read (NOT_READING): the
# peer cannot be blamed for its silence while we do not read.
# Connection.enter is the only way from phase to phase.  The next deadline, the
# one that fires and those of a snapshot all come from deadlines_of(); a change
# that makes one earlier also calls Reactor.arm.


class Phase(NamedTuple):
    """A row of LIFE.  Each phase is entered at most once."""

    name: str
    sends: bool     #: send() takes payloads
    reads: bool     #: its socket is read
    delivers: bool  #: bytes of the peer become messages
    next: tuple     #: names of the phases that may follow


#: The phases by name.  README draws this table.
LIFE = types.MappingProxyType({
    name: Phase(name, *map(bool, columns), tuple(after.split()))
    for name, *columns, after in (
        # phase         sends reads delivers  may be followed by
        ("new",          0, 0, 0, "connecting handshake open ended"),
        ("connecting",   1, 0, 0, "handshake open ended"),
        ("handshake",    1, 1, 1, "open sending_rest reading_rest ended"),
        ("open",         1, 1, 1, "sending_rest reading_rest ended"),
        # Ended for the program; its queue and its farewell are sent.
        ("sending_rest", 0, 0, 0, "lingering ended"),
        # Our FIN is sent; the peer's is waited for, its bytes thrown away.
        ("lingering",    0, 1, 0, "ended"),
        # Its socket is dead; the bytes that it holds become messages.
        ("reading_rest", 0, 0, 1, "ended"),
        ("ended",        0, 0, 0, ""))})
(_NEW, _CONNECTING, _HANDSHAKE, _OPEN, _SENDING_REST, _LINGERING,
 _READING_REST, _ENDED) = LIFE.values()

#: Why a connection is not read, and the deadlines that do not fire meanwhile.
NOT_READING = types.MappingProxyType({
    "queue": ("handshake", "message", "ping", "pong"),  # over the limit
    # Over a turn's share; ready in vain.
    "messages": ("handshake", "message", "ping", "pong", "lifetime"),
    "suspended": ("handshake", "message", "ping", "pong", "lifetime"),
    "fin": ()})  # of the peer: only our queue in the kernel is waited for


def not_reading(conn):
    """Return why a connection is not read: those of NOT_READING that hold."""
    holds = (conn.is_full(),
             conn.messages is not None and conn.messages.waiting,
             conn in conn.plan.reactor.suspended,
             conn.lingering is not None and conn.lingering.fin)
    return list(itertools.compress(NOT_READING, holds))


class Deadline(NamedTuple):
    """A row of DEADLINES.  Its functions take a connection."""

    phases: tuple       #: those in which it counts; it may hasten an end
    time: Callable      #: (conn) -> when it fires, or NEVER
    reason: str         #: of the end
    errno: Optional[int]
    fire: Callable      #: (conn, now) -> the end's detail; None: it goes on


_PROBE_AGAIN = 0.25  #: seconds between two looks at a suspected peer


def _of_opening(conn):
    return conn.opening.deadline + conn.plan.reactor.lag


def _incomplete(conn, what):
    return (f"{what} not complete after"
            f" {conn.plan.settings.message_timeout:.9g} s")


def _vanished(conn, now):
    """Ask the kernel whether the peer has vanished; if not, put it off."""
    keepalive = conn.keepalive
    suspected = now - conn.suspected >= keepalive.interval
    info = tcp_info(conn.sock)
    if info is None:  # the kernel's own keepalive decides
        conn.keepalive_deadline = NEVER
    elif conn.phase is _CONNECTING:
        conn.keepalive_deadline = now + keepalive.limit
    elif is_dead(info, keepalive.limit, suspected):
        return f"silent for {info.silence:.1f} s"
    elif info.silence < keepalive.limit:
        conn.suspected, conn.icmp = NEVER, None
        conn.keepalive_deadline = now + keepalive.limit - info.silence
    else:
        # One transmission is unanswered: the next is not far.
        asked = info.unanswered > 0
        conn.suspected = min(conn.suspected, now) if asked else NEVER
        conn.keepalive_deadline = now + (_PROBE_AGAIN if asked
                                         else keepalive.interval)
    return None


def _of_pings(conn, awaits):
    """Return when to ping a silent peer or, if it owes a pong, to end."""
    messages = conn.messages
    if messages is None or messages.inner.awaits_pong != awaits:
        return NEVER
    return messages.silent + (messages.inner.ping_timeout if awaits
                              else messages.inner.ping_interval)


def _no_pong(conn, now):
    """Put it off while the bytes ahead of our ping are being acknowledged."""
    messages, left = conn.messages, conn.unacknowledged()
    if left and left < messages.ahead:
        messages.ahead, messages.silent = left, now
        return None
    return f"no pong in {messages.inner.ping_timeout:.9g} s"


#: The kinds of deadline.  Of several that have come the earliest fires.
DEADLINES = types.MappingProxyType({
    "connect": Deadline(
        (_CONNECTING,), _of_opening, "connect", errno.ETIMEDOUT,
        lambda conn, now:
        f"no answer in {conn.plan.settings.connect_timeout:.9g} s"),
    "handshake": Deadline(
        (_HANDSHAKE,), _of_opening, "message", None,
        lambda conn, now: _incomplete(conn, conn.messages.framing.handshake)),
    "message": Deadline(
        (_OPEN,), lambda conn: NEVER if conn.messages is None
        else conn.messages.deadline + conn.plan.reactor.lag,
        "message", None, lambda conn, now: _incomplete(conn, "message")),
    "send": Deadline(
        (_HANDSHAKE, _OPEN, _SENDING_REST, _LINGERING),
        lambda conn: conn.send_deadline, "send", None, lambda conn, now:
        f"{conn.queued() + (conn.unacknowledged() or 0)} bytes unsent after"
        f" {conn.plan.settings.send_timeout:.9g} s"),
    "linger": Deadline(
        (_LINGERING,), lambda conn: conn.lingering.deadline, "closed", None,
        lambda conn, now: ""),
    "keepalive": Deadline(
        (_CONNECTING, _HANDSHAKE, _OPEN), lambda conn: conn.keepalive_deadline,
        "keepalive", errno.ETIMEDOUT, _vanished),
    "ping": Deadline(
        (_OPEN,), lambda conn: _of_pings(conn, False), "keepalive", None,
        lambda conn, now: conn.ping()),
    "pong": Deadline(
        (_OPEN,), lambda conn: _of_pings(conn, True), "keepalive",
        errno.ETIMEDOUT, _no_pong),
    "lifetime": Deadline(
        (_CONNECTING, _OPEN),
        lambda conn: max(conn.renewed, conn.active) + conn.lifetime,
        "lifetime", None, lambda conn, now: f"idle for {conn.lifetime:.9g} s"),
})


def deadlines_of(conn):
    """Return {kind: time} of the deadlines that a connection has."""
    waiting = {kind for why in not_reading(conn) for kind in NOT_READING[why]}
    times = ((kind, row.time(conn)) for kind, row in DEADLINES.items()
             if conn.phase in row.phases and kind not in waiting)
    return {kind: time for kind, time in times if time != NEVER}

# ---------------------------------------------------------------------------
# 12. The table of connections
# Conids count up and are never used twice.  A connection that has ended stays
# until its event has been reported: in the handler its state is known.


class Table:
    """The connections by conid and by peer; the listeners; the counts."""

    def __init__(self, limit):
        self.limit = limit       #: connections that may have a socket
        self.connections = {}    #: by conid
        self.listeners = {}      #: by conid
        self.crowded = {}        #: listeners suspended for want of room
        self.sockets = 0         #: connections that have a socket
        self.lingering = {}      #: connections, the oldest one first
        self.begun = self.opened = 0  #: connections: got a conid; usable
        self.refused = 0         #: accepts for which there was no room
        self.ended = dict.fromkeys(REASONS, 0)
        self.bytes_in = self.bytes_out = 0  #: of ended connections
        self._conids = itertools.count(1)
        # (host, port): the connection; a dict by conid if there are several,
        # as with many connections of ours to one server.
        self._by_peer = {}

    def get(self, conid):
        """Return the connection or listener of a conid, or None."""
        return self.connections.get(conid) or self.listeners.get(conid)

    def add(self, owner, owners):
        """Give a conid that has never been used to one of the owners."""
        owner.conid = next(self._conids)
        owners[owner.conid] = owner

    def count_end(self, conn):
        """Note that a connection has ended, and why."""
        self.sockets -= 1
        self.lingering.pop(conn, None)
        self.ended[conn.cause.reason] += 1
        self.bytes_in += conn.bytes_in
        self.bytes_out += conn.bytes_out

    def remove(self, conn):
        """Forget a connection, for ever."""
        self.connections.pop(conn.conid, None)  # None: in a child, after fork

    def add_peer(self, conn):
        """Make a connection known by its peer's address."""
        held = self._by_peer.setdefault(conn.peer, conn)
        if held is not conn:
            if not isinstance(held, dict):
                held = self._by_peer[conn.peer] = {held.conid: held}
            held[conn.conid] = conn

    def move_peer(self, conn, peer):
        """Make a connection known by another address instead."""
        if peer != conn.peer:
            self.remove_peer(conn)
            conn.peer = peer
            self.add_peer(conn)

    def remove_peer(self, conn):
        """Undo add_peer."""
        held = self._by_peer.get(conn.peer)
        if isinstance(held, dict):
            held.pop(conn.conid, None)
        if held is conn or held == {}:
            del self._by_peer[conn.peer]

    def of_peer(self, peer):
        """Return the connections with a peer, the youngest first."""
        held = self._by_peer.get(peer, {})
        return reversed(held.values()) if isinstance(held, dict) else [held]

# ---------------------------------------------------------------------------
# 13. Handlers
# The program's functions, and the only place that calls them.  A handler never
# runs inside another: an end meanwhile queues its event, which is reported
# after the handler has returned.  An exception of a handler is logged and
# changes nothing else.  One that is to leave the loop (Ctrl-C, sys.exit) is
# kept until the turn can raise it without cutting work of ours short.


def _take(queue):
    """Yield the entries that a queue holds now; those to come have to wait."""
    for _ in range(len(queue)):
        if not queue:
            return  # pragma: no cover (in a child, after fork(), tested too)
        yield queue.popleft()


class Handlers:
    """The handlers, the queue of events, and which of them runs.

    Each decorator returns the function unchanged; a second handler replaces
    the first.
    """

    def __init__(self, table):
        self._table = table
        self.closed_event, self.event_callback = 1, None
        self._request = self._onreply = None
        self._routes = {}        # handlers by the event's name
        self.events = collections.deque()  #: of (connection, Event), queued
        self.current = None      #: the connection of the handler that runs
        self.event = None        #: the event of the handler that runs
        self.leaving = None      #: the exception that is to leave the loop
        self.outbound = {}       #: see tcp_set_otcpid; of one message

    def request_route(self, handler):
        """Decorator: call handler(msg) for each message received."""
        self._request = _function(handler)
        return handler

    def onreply_route(self, handler):
        """Decorator: call handler(msg) for answers: see Message.is_reply.

        Without it request_route's gets them too.
        """
        self._onreply = _function(handler)
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
            self._routes[name] = _function(handler)
            return handler
        return register

    def handler_of(self, event):
        """Return (handler or None, its argument) of an event."""
        if self.event_callback is not None:
            return self.event_callback, event.name
        handler = self._routes.get(event.name)
        if handler is None and _EVENTS[event.name]:
            handler = self._routes.get("tcp:closed")
        return handler, event

    def message(self, conn, msg):
        """Call the handler of a message."""
        handler = self._request
        try:
            self.current = conn
            if self._onreply is not None and msg.is_reply:
                handler = self._onreply
            if handler is not None:
                handler(msg)
        except BaseException as error:
            self.raised(error, handler, conn)
        finally:
            self.current = None
            if self.outbound:
                self.outbound.clear()

    def report(self):
        """Call the handlers of the queued events; return how many."""
        count = 0
        for conn, event in _take(self.events):
            count += 1
            handler, argument = self.handler_of(event)
            try:
                self.current, self.event = conn, event
                if handler is not None:
                    handler(argument)
            except BaseException as error:
                self.raised(error, handler, conn)
            finally:
                self.current = self.event = None
                if _EVENTS[event.name]:
                    self._table.remove(conn)
            if self.leaving is not None:
                break
        return count

    def call(self, function, *arguments):
        """Call any other function of the program's."""
        try:
            function(*arguments)
        except BaseException as error:
            self.raised(error, function)

    def leave(self):
        """Raise the exception that is to leave the loop, if there is one."""
        try:
            if self.leaving is not None:
                raise self.leaving
        finally:
            self.leaving = None

    def raised(self, error, what, conn=None):
        """Log the exception of a function of the program's, or keep it."""
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            self.leaving = self.leaving or error
        else:
            log.error("%s%s raised", conn and f"conid {conn.conid}: " or "",
                      getattr(what, "__qualname__", what), exc_info=error)

# ---------------------------------------------------------------------------
# 14. The reactor
# It waits, and gives each owner of a descriptor or a deadline its turn: wait,
# input and output, work left over, calls, deadlines.  In that order, so that
# bytes which have arrived are seen before a deadline fires for want of them.
# Events are reported after each owner.
#
# An owner has a sock, events (those selected) and methods that only the turn
# calls: ready(mask) when its descriptor is, fire(now) when its deadline may
# have come, work() when it has asked for it by later(), and fault(error) after
# an error of ours in one of these.  The selector's key carries the owner, not
# a number, which may be used again within one batch.

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
#: No SIGPIPE, even where a host program has undone Python's choice to ignore
#: it.  PyPy has no name for Linux' flag.
_SEND_FLAGS = _DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0x4000 * _LINUX)
#: macOS has an option instead, which Python does not name.
_NO_SIGPIPE = not hasattr(socket, "MSG_NOSIGNAL") and getattr(
    socket, "SO_NOSIGPIPE", 0x1022 if sys.platform == "darwin" else None)
_BATCH = 64  #: deadlines that may fire in one turn
_LONGEST_WAIT = 86400  #: seconds; epoll counts milliseconds in 31 bits
_SPIN = 100  #: turns in which a descriptor was ready, and nothing came of it
_SUSPENSION = 0.1  #: seconds
_BUSY = 0.1  #: seconds of not looking that no peer is blamed for
_BORDERS = set()  #: code that calls the program's: see section 20


class _Attended:
    """The owner of a socket of the host program's; see Reactor.attend."""

    def __init__(self, sock, call):
        self.sock, self.events = sock, 0
        self.call = call  # call(mask); None: dismissed

    def ready(self, mask):
        """Call the function; return False if it has taken no byte."""
        sock, before = self.sock, _in_kernel(self.sock, _FIONREAD)
        if self.call is not None:
            self.call(mask)
        return (getattr(sock, "type", None) != socket.SOCK_STREAM
                or before is None and sock.fileno() >= 0
                or not mask & _READ or self.call is None
                or _in_kernel(sock, _FIONREAD) != before)

    work = fault = lambda self, *_: None  # that is the host program's affair


class Waker:
    """A pair of sockets that interrupts a wait; signals write to it, too."""

    def __init__(self, handlers, complain):
        self._handlers, self._complain = handlers, complain
        self._pen, self.sock = socket.socketpair()
        self._pen.setblocking(False)
        self.sock.setblocking(False)
        self.count = 0            #: how often it was ready in this turn
        self._host = -1           # the host's descriptor for signals
        self._held_until = NEVER  # how long a Ctrl-C may wait

    def wake(self):
        """Interrupt a wait; safe from a signal handler and any thread."""
        # Full: a wake-up is on its way.  Closed: nothing waits.
        with contextlib.suppress(OSError):
            self._pen.send(b"\0", _SEND_FLAGS)

    def ready(self, _mask):
        """Count that it was ready, and empty it."""
        self.count += 1
        self._pass_on()
        return True

    work = fault = lambda self, *_: None

    def _pass_on(self):
        """Empty it, and tell the host of the signals in it."""
        with contextlib.suppress(OSError):  # empty, or closed
            signals = self.sock.recv(4096).replace(b"\0", b"")
            if signals and self._host >= 0:
                try:
                    os.write(self._host, signals)
                except OSError as error:
                    self._complain("the host's wake-up descriptor takes no"
                                   f" signal: {error.strerror}")

    @contextlib.contextmanager
    def signals(self):
        """Be woken by signals; have Ctrl-C wait while our own code runs."""
        mine, ours, host = self._on_interrupt, self._pen.fileno(), None
        python = signal.default_int_handler
        try:
            with contextlib.suppress(ValueError):  # not in the main thread
                if signal.getsignal(signal.SIGINT) is python:
                    signal.signal(signal.SIGINT, mine)
                # A signal just before epoll_wait would go unnoticed there.
                host = signal.set_wakeup_fd(ours, warn_on_full_buffer=False)
                self._host = host
            yield
        finally:
            if host is not None:
                now = signal.set_wakeup_fd(-1)
                with contextlib.suppress(OSError, ValueError):  # it is closed
                    # -1: close() has taken ours away.
                    signal.set_wakeup_fd(host if now in (ours, -1) else now)
            self._pass_on()
            self._host = -1
            if signal.getsignal(signal.SIGINT) is mine:
                signal.signal(signal.SIGINT, python)
        self._handlers.leave()

    def _on_interrupt(self, number, frame):
        """Raise KeyboardInterrupt where the program's code runs: below a
        border or, as refuse(), below a framing of ours.  But receive() would
        lose bytes in TLS.  Else once the owner's turn is over; if one has
        waited for a second, it is behind a handler, and the next is raised.
        """
        caller, called, now = frame, None, time.monotonic()
        while caller is not None and caller.f_globals is not globals():
            caller, called = caller.f_back, caller
        is_program_s = called is not None and (
            caller is None or caller.f_code in _BORDERS
            or called.f_code.co_name != "receive" and all(
                isinstance(each.f_locals.get("self"), Framing)
                for each in (caller, called)))
        if is_program_s or now > self._held_until:
            self._held_until = NEVER
            signal.default_int_handler(number, frame)
        if self._handlers.leaving is None:
            self._handlers.leaving = KeyboardInterrupt()
            self._held_until = now + 1
        self.wake()

    def close(self):
        """Pass on the signals in it, and give the descriptors back."""
        with contextlib.suppress(ValueError):  # not in the main thread
            wakeup = signal.set_wakeup_fd(-1)
            if wakeup not in (-1, self._pen.fileno()):
                signal.set_wakeup_fd(wakeup)  # the host program's
        self._pass_on()
        self._pen.close()
        self.sock.close()


class Reactor:
    """The selector, the clock, the deadlines and the turn."""

    def __init__(self, clock, handlers):
        self.clock = clock
        self.deadlines = Deadlines()
        self.suspended = {}       #: owners that are not selected for a while
        self.lag = 0.0            #: seconds in which the loop did not look
        self._until = NEVER       # when the wait was to end
        self._looked = 0.0        # when the loop looked last
        self.turning = self.stopping = self.closing = False
        self._handlers = handlers
        self._work = collections.OrderedDict()  # of owners, see later
        self._calls = collections.deque()       # of (function, arguments)
        self._resume_at = NEVER     # when the suspended owners are resumed
        self._owner = None      # whose turn it is
        self._in_vain = {}      # owner: turns in a row, see _guard
        self._empty_waits = 0   # counted once a descriptor was lost, from 1
        self._outer = None      # see fileno
        self._complain_at = -NEVER
        self._selector = selectors.DefaultSelector()
        # One descriptor that it cannot bear makes select() fail for all.
        self._fragile = isinstance(self._selector, selectors.SelectSelector)
        self.waker = Waker(handlers, self.complain)
        self._selector.register(self.waker.sock, _READ, self.waker)

    def watch(self, owner, events):
        """Select an owner for these events; 0, which always works, for none.

        Raises OSError: its descriptor is no more, or there is no room for it.
        """
        if owner in self.suspended:
            events = 0
        before, owner.events = owner.events, events
        try:
            if before and not events:
                self._selector.unregister(owner.sock)
            elif before and events != before:
                self._selector.modify(owner.sock, events, owner)
            elif events and not before:
                self._selector.register(owner.sock, events, owner)
            if events and self._fragile:
                self._select(0)  # is it one over the 512 of Windows?
        except (KeyError, ValueError, OSError) as error:
            number = getattr(_system_error(error), "errno", errno.EBADF)
            owner.events = 0
            if isinstance(error, KeyError) and not before:
                held = self._selector.get_key(owner.sock)
                if held.data.sock != owner.sock:
                    # It was a socket's that was closed behind our back; the
                    # kernel has forgotten that one, the selector has not.
                    self._lose(held)
                    return self.watch(owner, events)
                number = errno.EEXIST  # it is attended already
            if isinstance(error, ValueError):
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(owner.sock)  # it is that one
                    number = errno.EMFILE
            if number == errno.EMFILE and hasattr(owner, "conid"):
                return self.suspend(owner, "rests: select() is full")
            if events:
                raise OSError(number, os.strerror(number)) from None

    def _lose(self, key):
        """Forget a descriptor that is no more; its owner sees it in work()."""
        owner, sock, self._empty_waits = key.data, key.data.sock, 1
        with contextlib.suppress(KeyError):
            self._selector.unregister(key.fd)
        if isinstance(sock, socket.socket) and sock.fileno() == key.fd:
            sock.detach()  # the number may be another's by now
        owner.events = 0
        self.later(owner)

    def arm(self, owner, when):
        """Make sure the owner fires no later than `when`."""
        if when < owner.fires_at:
            if self._outer and when < self.deadlines.next():
                self.nudge()
            self.deadlines.arm(owner, when)

    def later(self, owner):
        """Have the owner's work() called in this turn, or the next one."""
        self._work[owner] = None
        self.nudge()

    def suspend(self, owner, why):
        """Do not select an owner for a while: it would be ready in vain."""
        self.complain(f"conid {owner.conid} {why}")
        self.watch(owner, 0)
        self.suspended[owner] = None
        self._resume_at = min(self._resume_at, self.clock() + _SUSPENSION)

    def resume(self, owner):
        """Have an owner that was suspended select its events again."""
        self.suspended.pop(owner, None)
        self.later(owner)

    def close(self, sock):
        """Close the socket of an owner that is not selected."""
        try:
            if sock.fileno() < 0:
                raise OSError(errno.EBADF, "closed behind our back")
            sock.close()
        except OSError:
            self._empty_waits = 1

    def complain(self, text):
        """Log a warning, one a second at the most."""
        if self.clock() >= self._complain_at:
            log.warning("%s", text)
            self._complain_at = self.clock() + 1

    def attend(self, sock, events, ready):
        """Call ready(mask) whenever a socket without a conid is ready.

        events and mask are those of the selectors module.
        """
        self.watch(_Attended(sock, functools.partial(
            self._handlers.call, _function(ready))), events)

    def dismiss(self, sock):
        """Undo attend."""
        self._selector.get_key(sock).data.call = None  # fails: not attended
        self._selector.unregister(sock)
        try:
            os.fstat(sock.fileno())
        except (OSError, ValueError, AttributeError):  # closed; a number
            self._empty_waits = 1

    def holds(self, sock):
        """Say whether a socket is registered, by its owner."""
        key = self._selector.get_map().get(sock.fileno())
        return key is not None and key.data.sock is sock

    def call_soon(self, function, *args):
        """Call function(*args) in the loop's next turn; safe from any thread.

        Raises RuntimeError after close().
        """
        _function(function)
        self.check_running()
        self._calls.append((function, *args))
        self.waker.wake()

    def stop(self):
        """Make run() return after this turn, or, called before it, at once.

        Safe from a signal handler and from any thread.  A loop of your own
        around step() should give it a timeout: only run() is woken by a signal
        that comes just as the wait begins.  Call stop() rather than raise in a
        signal handler: that may lose the message in hand.
        """
        self.stopping = True
        self.waker.wake()

    def nudge(self):
        """Make fileno() readable: there is new work."""
        if self._outer and not self.turning:
            self.waker.wake()

    def fileno(self):
        """Return a descriptor that is readable when step(0) has work to do.

        So another event loop can drive this one: it calls step(0) then, and at
        next_deadline(), which it asks for after each.  OSError on Windows.
        """
        self.check_running()
        if not hasattr(self._selector, "fileno"):  # pragma: no cover (Windows)
            raise OSError(errno.ENOTSUP, "this selector has no descriptor")
        if self._outer is None:
            self._outer = selectors.DefaultSelector()  # see _renew_selector
            self._outer.register(self._selector.fileno(), _READ)
        return self._outer.fileno()

    def next_deadline(self):
        """Return the time of the clock at which step(0) is due, or None.

        fileno() turns readable when it has become earlier.
        """
        due = self._due()
        return None if due == NEVER else max(due, self.clock())

    def check_running(self):
        """Raise RuntimeError after close()."""
        if self.closing:
            raise RuntimeError("this TcpOps is closed")

    def check_outside(self):
        """Raise RuntimeError after close(), and inside a turn."""
        self.check_running()
        if self.turning:
            raise RuntimeError("a handler cannot call run, step or drain")

    def run(self):
        """Run until stop() or close() is called.

        Raises RuntimeError inside a handler and after close().
        """
        self.check_outside()
        with self.waker.signals():
            self.turning = True
            try:
                while not self.stopping and not self.closing:
                    self._turn(self._patience(NEVER))
            finally:
                self.turning = self.stopping = False
                if self.closing:  # in a handler: that waited for this
                    self.release()

    def step(self, timeout=None):
        """Wait for something, timeout seconds at the most, and handle it.

        Returns how many things were handled, 0 if time ran out.  Raises
        RuntimeError inside a handler and after close().
        """
        self.check_outside()
        left = NEVER if timeout is None else _number(
            timeout, "timeout", 0, NEVER)
        self.turning = True
        try:
            while True:
                wait, start = self._patience(left), time.monotonic()
                handled = self._turn(wait)
                # A deadline put off, or a wake-up for run(), may have cut it.
                spent = time.monotonic() - start
                left -= (min if self.waker.count else max)(wait or 0, spent)
                if handled or left <= 0:
                    return handled
        finally:
            self.turning = False
            if self.closing:
                self.release()
                self._handlers.leave()

    def _due(self):
        """Return when a turn has something to do: a time, or NEVER."""
        if (self._handlers.events or self._work or self._calls
                or self._handlers.leaving is not None):
            return -NEVER
        return min(self.deadlines.next(), self._resume_at)

    def _patience(self, limit):
        """Return how many seconds the next wait may take, None: no limit."""
        due, now = self._due(), self.clock()
        wait = min(max(0, due - now), limit, _LONGEST_WAIT)
        self._until = now + wait
        return None if due == limit == NEVER else wait

    def _turn(self, wait):
        """Wait, then handle all that is due; return how many things."""
        self.waker.count = 0
        ready = self._select(wait)
        # Deadlines that come while handlers run are for the next turn: bytes
        # that peers have sent in the meantime are read before.
        self._looked = now = self.clock()
        self._owner = None
        try:
            handled = self._serve_ready(ready)
            fires = self.deadlines.next() <= now
            if fires:
                # A process that was stopped, or interrupted by a signal, wakes
                # up with an old answer; bytes that have come by now count.
                self._looked = min(now, self._until)
                self.excuse()
                handled += self._serve_ready(self._select(0))
            for _ in range(len(self._work)):
                if self._work:  # pragma: no branch (in a child, after fork())
                    self._owner = self._work.popitem(last=False)[0]
                    self._owner.work()
                    handled += 1 + self._settle()
            self._owner = None
            for call in _take(self._calls):
                self._handlers.call(*call)
                handled += 1 + self._settle()
            for _ in range(_BATCH if fires else 0):
                self._owner = self.deadlines.pop(now)
                if self._owner is None:
                    break
                try:
                    handled += self._owner.fire(now)
                except BaseException:  # a signal must not make it immortal
                    self.deadlines.arm(self._owner, now)
                    raise
                handled += self._settle()
            if self._resume_at <= now:
                self._resume_at = NEVER
                handled += len(self.suspended)
                for owner in list(self.suspended):
                    self.resume(owner)
        except BaseException as error:
            self._interrupted(error)
            raise
        if self.clock() - self._looked > _BUSY:
            self.excuse()
        return handled - self.waker.count

    def _select(self, wait):
        """Return what is ready.  Selectors round up: never early, no spin."""
        try:
            return self._selector.select(wait)
        except OSError as error:  # select() fails for all because of one
            _system_error(error)
            self._renew_selector()
            return self._selector.select(0)

    def _interrupted(self, error):
        """Leave the turn for an error: of ours, or of a signal handler."""
        owner, self._owner = self._owner, None
        if owner is not None:
            if isinstance(error, Exception) and not _is_signal(error):
                owner.fault(error)
            self.later(owner)  # its turn may have been cut short
        self.excuse()

    def excuse(self):
        """Note time in which the loop did not look; return the time now."""
        now = self.clock()
        if self.turning and now - self._looked > _BUSY:
            self.lag += now - self._looked
            self._looked = now
        return now

    def _settle(self):
        """Report an owner's events, and let an exception leave the loop."""
        count = self._handlers.report()
        if self._handlers.leaving is not None:
            self._owner = None
            self._handlers.leave()
        return count

    def _serve_ready(self, ready):
        """Input and output; return how many things were handled."""
        in_vain, handlers, handled = (), self._handlers, len(ready)
        if handlers.events or handlers.leaving is not None:
            handled += self._settle()  # of calls from outside
        for key, mask in ready:
            self._owner = owner = key.data
            if not owner.ready(mask):
                in_vain = (*in_vain, owner)
            if handlers.events or handlers.leaving is not None:
                self._settle()
        self._owner = None
        if in_vain or self._in_vain:
            self._guard(in_vain)
        if self._empty_waits and not ready:
            self._empty_waits += 1
            if self._empty_waits > _SPIN:  # a descriptor that is no more is
                self._renew_selector()     # ready all the time
        return handled

    def _guard(self, in_vain):
        """Suspend owners that are ready again and again, and in vain."""
        before = self._in_vain
        self._in_vain = {owner: before.get(owner, 0) + 1 for owner in in_vain}
        for owner, count in self._in_vain.items():
            if count == _SPIN and isinstance(owner, _Attended):
                self.complain(f"{owner.sock} was ready {count} times in a"
                              " row, and its function has read nothing")
            elif count >= _SPIN and self._empty_waits:
                self._renew_selector()  # it may be another's, of its number
            elif count >= _SPIN and not isinstance(owner, _Attended):
                self.suspend(owner, f"rests: it was ready {count} times in a"
                          " row, and nothing came of it")

    def _renew_selector(self):
        """Take a fresh selector: an epoll goes on reporting a descriptor that
        was closed as long as a duplicate lives, and select() fails for all.
        """
        old, self._selector = self._selector, selectors.DefaultSelector()
        self._empty_waits = 0
        for key in list(old.get_map().values()):
            try:
                self._selector.register(key.fileobj, key.events, key.data)
                if self._fragile:
                    self._selector.select(0)
            except (OSError, ValueError):
                self._lose(key)  # it is closed, too
        if self._outer is not None:
            self._outer.unregister(old.fileno())
            self._outer.register(self._selector.fileno(), _READ)
        old.close()

    def release(self):
        """Report the last events and give the descriptors back."""
        self.turning = True  # a handler may not start another turn
        while self._handlers.events:
            self._handlers.report()
        self.turning = False
        self._owner = None
        for held in (self.suspended, self._in_vain, self._work, self._calls):
            held.clear()
        self.deadlines = Deadlines()
        for held in (self._outer, self._selector, self.waker):
            if held is not None:
                held.close()

    def abandon(self):
        """Give up this process's copies, in a child after fork()."""
        self.closing = True
        for key in (self._selector.get_map() or {}).values():  # {}: closed
            if isinstance(key.data, _Attended):
                key.data.call = None  # the batch in hand may hold it
        self.waker.sock.close()  # its bytes are the parent's
        self._handlers.events.clear()
        self.release()

# ---------------------------------------------------------------------------
# 15. The plan of a connection
# All connections of one listen, connect or attach are made alike.  They share
# one record of that, which costs each a pointer.

_RECV_SIZE = 65536  #: Bytes asked of one recv(): one turn of one connection


class Settings(NamedTuple):
    """The limits of a connection, in seconds and bytes; see TcpOps."""

    connection_lifetime: float = 120
    connect_timeout: float = 10
    send_timeout: float = 10
    message_timeout: float = 20
    max_message: int = 65536
    max_write_buffer: int = 1048576
    linger: float = 2


class Plan:
    """The record that connections of one listen, connect or attach share."""

    __slots__ = ("handlers", "table", "reactor", "settings", "recv_size",
                 "origin", "name", "factory", "context", "server_hostname",
                 "host", "listener")

    def __init__(self, handlers, table, reactor, settings, origin, framing,
                 tls=None, tls_name=None, host=None):
        self.handlers, self.table, self.reactor = handlers, table, reactor
        self.origin = origin       #: "accept", "connect" or "attach"
        self.listener = None       #: the listener's conid
        #: The address that connect was called with: see Framing.begin.
        self.host = host.http(tls is not None) if host else ""
        self.name, self.factory = self._framing(framing)
        self.context = tls         #: an ssl.SSLContext, None: no TLS
        if tls is not None:
            if "tls" not in _LAYERS:
                raise ValueError("there is no TLS: its section was cut out of"
                                 " this copy of the file")
            _LAYERS["tls"].check_context(tls, client=host is not None)
            host = host if tls_name is None else Host.of(tls_name)
        elif tls_name is not None:
            raise ValueError("server_hostname is for TLS")
        #: The name that the peer's certificate must have, if it has one.
        self.server_hostname = host and host.tls
        self.settings = settings
        self.recv_size = min(_RECV_SIZE, settings.max_message)

    def changed(self, **values):
        """Return a copy with other values, for the connections to come."""
        plan = copy.copy(self)
        for name, value in values.items():
            setattr(plan, name, value)
        plan.recv_size = min(_RECV_SIZE, plan.settings.max_message)
        return plan

    @staticmethod
    def _framing(framing):
        """Return (name, factory) of a framing argument; None: raw."""
        if isinstance(framing, str) and framing in FRAMINGS:
            return framing, FRAMINGS[framing]
        if callable(framing) and (not isinstance(framing, type)
                                  or issubclass(framing, Framing)):
            return getattr(framing, "__name__", "custom"), framing
        raise ValueError(
            f"framing must be {', '.join(FRAMINGS)} (all that this copy of the"
            " file has), a subclass of Framing or a function that returns an"
            f" instance, not {reprlib.repr(framing)}")

    def build(self):
        """Return a framing for one connection, None for raw."""
        if self.context is None and self.factory is None:
            return None
        inner = (self.factory or _LAYERS["raw"])(
            self.settings.max_message, self.origin == "connect")
        if not isinstance(inner, Framing):
            raise TypeError(f"{self.name} must return a Framing,"
                            f" not {reprlib.repr(inner)}")
        if inner.ping_interval != NEVER:
            if not hasattr(inner, "ping"):
                raise ValueError(f"framing {self.name} has no pings")
            for name in ("ping_interval", "ping_timeout"):
                setattr(inner, name, _number(getattr(inner, name), name, 0.001,
                                             _MAX_SECONDS))
        return inner if self.context is None else _LAYERS["tls"](
            self.context, self.server_hostname, inner)

# ---------------------------------------------------------------------------
# 16. A connection
# Connection has the socket; Messages its framing, Opening the things that are
# needed until it is open.  All the ways to end, on one page:
#
#   event                      seen by                reason      manner
#   FIN                        ready: recv() is b""   eof         send rest
#   close frame, close_notify  Messages: closed       eof         send rest
#   bytes that are wrong       Messages: failed       protocol    send rest
#   RST, any error             ready, write, flush    its errno   read rest
#   error met by a question    probe                  its errno   read rest
#   no room in the selector    watch                  its errno   read rest
#   no address left            Opening: proceed       its errno   at once
#   a deadline                 fire                   DEADLINES   at once
#     behind an unread FIN     fire: probe            eof         read rest
#   tcp_close_connection       the program            closed      send rest
#   drain                      the program            shutdown    send rest
#   close                      the program            shutdown    at once
#   a fault of ours            the reactor: fault     error       at once
#
# "Send rest": our queue, the protocol's farewell and FIN, then linger until
# the peer's FIN has come, and its kernel has acknowledged all.  "Read rest":
# the socket is dead, but bytes that came before are delivered first.
#
# Connection.end is the one door.  Code that moves bytes or registers
# descriptors ends nothing: fail() records that the socket is dead, and the
# turn ends the connection (work).  A probe consumes the FIN or the error that
# it meets, so `seen` keeps it, provisionally; end() sets `cause`, once.
#
# Four more places close a socket: the next address of connect, an accepted
# socket that nothing can be built on, a listener's end, a child after fork().

_AT_ONCE, _SEND_REST, _READ_REST = "at once", "send rest", "read rest"
_REST_READS = 16  #: recv() calls on a dead socket in one turn
_SHARE = 8  #: messages of one connection in one turn: others may wait
_EMPTYING = 128  #: recv() calls that empty a socket: Linux holds 6 MB
_FIRST_LOOK = 0.02  #: seconds until Lingering looks at the kernel's queue
#: accept() and socket() errors that say "not now": no descriptor is left.
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY,
              errno.EINTR)  #: of connect()
_ENDED_SINCE = (errno.EPIPE, errno.ECONNRESET)  #: connect() had succeeded
_FAILED = object()  #: the answer of Messages.ask where a framing has raised


def _make_room(table):
    """End the oldest lingering connection; return whether there was one."""
    conn = next(iter(table.lingering), None)
    if conn is not None:
        conn.end(conn.cause)
    return conn is not None


def _socket_for(addresses, table):
    """Return (socket, its address, the addresses left); or raise OSError."""
    if not addresses:
        raise OSError(errno.EADDRNOTAVAIL, "no address is left")
    (family, address), *others = addresses
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if _system_error(error).errno in _FULL and _make_room(table):
            return _socket_for(addresses, table)
        if others:
            return _socket_for(others, table)
        raise
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock, address, others


def _start_timing(part, timeout):
    """Have a part's deadline fire after timeout seconds of our looking."""
    reactor = part.conn.plan.reactor
    part.deadline = reactor.excuse() + timeout - reactor.lag
    reactor.arm(part.conn, part.deadline + reactor.lag)


class Opening:
    """The things that a connection needs until it is open, and no longer."""

    __slots__ = ("conn", "addresses", "errno", "deadline", "early",
                 "early_bytes")

    def __init__(self, conn, addresses=()):
        self.conn = conn
        self.addresses = addresses  #: those that connect may still try
        self.errno = None           #: of connect(), consumed by a question
        self.deadline = NEVER       #: of connect, then of the handshake
        self.early = []             #: payloads sent before it is open
        self.early_bytes = 0

    def proceed(self, number):
        """Wait for connect(), or try the next address after its errno."""
        conn, reactor = self.conn, self.conn.plan.reactor
        table = conn.plan.table
        while number not in _UNDER_WAY:
            if self.addresses:
                reactor.watch(conn, 0)
                reactor.close(conn.sock)  # its descriptor may be the last one
            try:
                sock, address, self.addresses = _socket_for(
                    self.addresses, table)
            except OSError as error:
                _system_error(error)
                conn.fail(Cause.of_errno(number, connecting=True))
                return
            conn.sock = sock
            table.move_peer(conn, _peer_key(address))
            if conn.keepalive is not None:
                set_keepalive(sock, conn.keepalive)
            number = sock.connect_ex(address)
        conn.local = _peer_key(_ask(conn.sock.getsockname) or conn.local)
        conn.watch()

    def probe(self):
        """Return the State of connect(); keep an errno for the turn."""
        conn = self.conn
        if self.errno is None and not conn.failed:
            state, number, _ = _look(conn.sock)
            if number == errno.ENOTCONN and _of_unconnected(conn.sock):
                number = None
            if state is _OK or number in (None, *_UNDER_WAY):
                # Success, too, is for the turn to see.
                return _EOF if state is _EOF else State.CONNECT
            self.errno = number
            had_succeeded = number in _ENDED_SINCE
            if had_succeeded or not self.addresses:
                conn.fail(Cause.of_errno(number, not had_succeeded))
            conn.plan.reactor.later(conn)
        return conn.seen_state() if conn.failed else State.CONNECT

    def check(self):
        """Act on the result of connect(); return whether there is one."""
        self.probe()
        conn, number, self.errno = self.conn, self.errno, None
        if number is None:
            peer = _ask(conn.sock.getpeername)
            if peer is None:
                return False  # not yet: the event was of the address before
            conn.plan.table.move_peer(conn, _peer_key(peer))
            if peer == _ask(conn.sock.getsockname):
                # Nothing listens, and the kernel took that very port as ours:
                # TCP connects a socket with itself (RFC 9293, 3.5).
                _ask(_reset, conn.sock)
                number = errno.ECONNREFUSED
        if number is None or number in _ENDED_SINCE:
            conn.local = _peer_key(_ask(conn.sock.getsockname) or conn.local)
            conn.begin()
        else:
            self.proceed(number)
        return True

    def keep(self, payload):
        """Keep a payload until it is open; return whether there is room."""
        if self.early_bytes >= self.conn.plan.settings.max_write_buffer:
            return False
        self.early_bytes += len(payload.encode() if type(payload) is str
                                else payload)
        self.early.append(payload)
        return True


class Messages:
    """The framing of a connection: turns its bytes into messages."""

    __slots__ = ("conn", "framing", "inner", "waiting", "deadline", "silent",
                 "ahead")

    def __init__(self, conn, framing):
        self.conn, self.framing = conn, framing
        tls = isinstance(framing, _LAYERS.get("tls", ()))
        self.inner = framing.inner if tls else framing
        self.waiting = False    #: the rest of them waits for the next turn
        self.deadline = NEVER   #: of a message that is incomplete
        self.silent = NEVER     #: since when: the peer's last byte, our ping
        self.ahead = 0          #: bytes in the kernel, ahead of our ping

    def ask(self, call, *args):
        """Call the framing, nothing of ours; return the answer, or _FAILED."""
        try:
            return call(*args)
        except BaseException as error:
            self.failed(error)
            return _FAILED

    def failed(self, error):
        """End the connection: its framing cannot go on."""
        conn, handlers = self.conn, self.conn.plan.handlers
        if isinstance(error, ProtocolError):
            detail = _words(error)
        elif isinstance(error, (SystemExit, KeyboardInterrupt)) or _is_signal(
                error):
            handlers.leaving = handlers.leaving or error
            return self.postpone()
        else:
            handlers.raised(error, f"framing {conn.plan.name}", conn)
            detail = f"the framing raised {_words(error, repr)}"
            if conn.usable():  # to the peer it is an error of ours
                self.ask_last(
                    lambda it: it.output.extend(it.farewell("error")), None)
        conn.end(Cause("protocol", None, detail), _SEND_REST)

    def speak(self):
        """Send the bytes that the framing sends by itself."""
        conn, framing = self.conn, self.framing
        if conn.phase.sends and framing.output and not conn.failed:
            data, framing.output = framing.output, bytearray()
            data = self.ask(bytes, data)
            if data is not _FAILED:
                conn.write(data)

    def shake_hands(self):
        """Send the framing's bytes; return whether that has opened it."""
        conn = self.conn
        self.speak()
        # messages is None if a callback of the TLS context has closed it.
        opens = (not conn.opened and conn.messages is not None
                 and self.ask(lambda: bool(self.framing.opened)) is True
                 and conn.phase.delivers)
        if opens:
            conn.open()
        return opens

    def deliver(self, data=b""):
        """Hand over messages, up to a turn's share.

        data has just been received.  Stops where a handler has closed the
        connection or filled its queue; flush() then has the rest delivered.
        """
        conn, framing, count, anew = self.conn, self.framing, 0, False
        handlers = conn.plan.handlers
        if data and self.ask(framing.receive, data) is _FAILED:
            return
        if data and (framing.output or not conn.opened) and self.shake_hands():
            handlers.report()
        while conn.phase.delivers and not conn.is_full():
            if count == _SHARE or handlers.leaving is not None:
                if anew:
                    self.deadline = NEVER
                self.postpone()
                break
            try:
                payload = framing.next_message()
                news = framing.output or not conn.opened
                if payload is None:
                    closed, partial = framing.closed, framing.partial
                elif payload is SKIPPED:
                    anew = anew or not framing.amid
            except BaseException as error:
                self.failed(error)
                break
            if news and self.shake_hands():
                handlers.report()  # tcp:opened, before the messages
            if not conn.phase.delivers:
                break
            if payload is None:
                if closed:
                    conn.end_of_stream()
                else:
                    self._time(partial, anew)
                break
            count += 1
            if payload is not SKIPPED:
                anew = True
                self.hand_over(payload)

    def hand_over(self, payload):
        """Make a message of a payload and hand it to its handler."""
        conn = self.conn
        msg = self.ask(self.framing.message, conn, payload)
        if msg is not _FAILED and conn.phase.delivers:
            conn.plan.handlers.message(conn, msg)

    def _time(self, partial, anew):
        """Time the next ping; and a message, if one has begun."""
        conn = self.conn
        if self.inner.ping_interval != NEVER:  # a pong may have come
            conn.plan.reactor.arm(
                conn, _of_pings(conn, self.inner.awaits_pong))
        if not partial or conn.phase is not _OPEN:
            self.deadline = NEVER
        elif anew or self.deadline == NEVER:
            _start_timing(self, conn.plan.settings.message_timeout)

    def postpone(self):
        """Leave the rest of the messages to the next turn."""
        conn = self.conn
        if conn.phase.delivers and not self.waiting:
            self.waiting = True
            conn.plan.reactor.later(conn)
            conn.watch()

    def ask_last(self, call, default):
        """Call the framing at the end; return the answer, or the default."""
        try:
            return call(self.framing)
        except BaseException as error:
            plan = self.conn.plan
            plan.handlers.raised(error, f"framing {plan.name}", self.conn)
            return default

    def farewell(self, reason):
        """Return the last bytes that the protocol sends."""
        return self.ask_last(lambda it: bytes(it.farewell(reason)), b"")


class Lingering:
    """The wait after our FIN: for the kernel's queue, and the peer's FIN.

    After close(2) any byte of the peer's would be answered with RST, and the
    bytes in that queue would be thrown away.
    """

    __slots__ = ("conn", "fin", "since", "left", "deadline")

    def __init__(self, conn, fin):
        reactor = conn.plan.reactor
        self.conn, self.fin = conn, fin  #: fin: the peer's has come
        self.since = reactor.clock()
        self.left = None        # bytes in the kernel's queue, at the last look
        self.deadline = NEVER   #: once that queue is empty
        conn.send_deadline = self.since + conn.plan.settings.send_timeout
        reactor.arm(conn, self.since + _FIRST_LOOK)

    def ready(self):
        """Throw away the peer's bytes, until its FIN."""
        conn = self.conn
        try:
            data = conn.sock.recv(_RECV_SIZE, _DONTWAIT)
        except OSError as error:
            return conn.meet(error)
        if not data:
            self.fin = True
            conn.watch()
            if self.look(conn.plan.reactor.clock()):
                conn.end(conn.cause)
        return True

    def look(self, now):
        """Return whether the wait is over; if not, look again soon."""
        conn, settings, left = self.conn, self.conn.plan.settings, self.left
        self.left = conn.unacknowledged()
        if self.left:
            if left is None or self.left < left:
                conn.send_deadline = now + settings.send_timeout
            conn.plan.reactor.arm(conn, now + min(
                1, max(_FIRST_LOOK, now - self.since)))
        else:
            conn.send_deadline = NEVER
            self.deadline = min(self.deadline, now + settings.linger)
        if self.left and self.fin:  # nothing else shows an RST now
            return _tcp_state(conn.sock) == _TCP_CLOSE
        return not self.left and (self.fin or not settings.linger)


class Connection:
    """A connection, from its socket to its one event."""

    __slots__ = (
        "plan", "conid", "proto", "sock", "events", "peer", "local", "phase",
        "opening", "messages", "lingering", "queue", "failed", "seen", "icmp",
        "cause", "opened", "wants_event", "bytes_in", "bytes_out", "since",
        "active", "renewed", "lifetime", "send_deadline", "keepalive",
        "keepalive_deadline", "suspected", "fires_at")

    def __init__(self, plan, framing, sock, peer, local=("", 0)):
        self.plan, self.sock, self.peer, self.local = plan, sock, peer, local
        self.events = 0             # selected: see Reactor.watch
        self.phase = _NEW
        self.opening = None         # an Opening, until it is open
        self.lingering = None       # a Lingering, once its rest is sent
        raw = framing is None
        self.messages = None if raw else Messages(self, framing)
        self.proto = "tcp" if raw else framing.proto
        self.queue = None           # a bytearray, None if empty
        self.failed = False         # the socket is dead; the turn ends it
        self.seen = None            # a Cause that was met
        self.icmp = None            # errno of an ICMP error that was met
        self.cause = None           # the Cause of its end
        self.opened = False         # it has been usable
        self.wants_event = False    # tcp_enable_closed_event
        self.bytes_in = self.bytes_out = 0
        self.since = self.active = plan.reactor.clock()  # begun; last byte
        self.renewed = NEVER        # when its lifetime began anew
        self.lifetime = plan.settings.connection_lifetime
        self.send_deadline = self.keepalive_deadline = NEVER
        self.keepalive = None       # as tcp_keepalive_enable has set it
        self.suspected = NEVER      # since when: see is_dead
        self.fires_at = NEVER       # see Deadlines
        table = plan.table
        table.add(self, table.connections)
        table.sockets += 1
        table.begun += 1

    def enter(self, phase):
        """Change the phase: a step of LIFE, or RuntimeError."""
        before = self.phase
        if phase.name not in before.next:
            raise RuntimeError(f"conid {self.conid} cannot go from"
                               f" {before.name} to {phase.name}")
        self.phase = phase
        if phase is _ENDED:
            self.plan.table.remove_peer(self)
        elif before is _NEW:
            self.plan.table.add_peer(self)

    def connect(self, address, others):
        """Connect the socket to an address, or to one of the others."""
        self.enter(_CONNECTING)
        self.opening = Opening(self, others)
        _start_timing(self.opening, self.plan.settings.connect_timeout)
        self.opening.proceed(self.sock.connect_ex(address))

    def begin(self):
        """Once connected: start the framing's handshake, or be open."""
        messages = self.messages
        if _NO_SIGPIPE:
            _ask(self.sock.setsockopt, _SOL_SOCKET, _NO_SIGPIPE, 1)
        if messages is None:
            self.open()
        else:
            self.opening = self.opening or Opening(self)
            self.enter(_HANDSHAKE)
            if messages.ask(messages.framing.begin,
                            self.plan.host) is not _FAILED:
                messages.shake_hands()
            if self.phase is _HANDSHAKE:
                _start_timing(self.opening, self.plan.settings.message_timeout)
        self.watch()

    def open(self):
        """Become usable: report it, and send the early payloads."""
        messages, opening = self.messages, self.opening
        log.debug("conid %d is open, %s", self.conid, self.peer)
        self.opened = True
        self.plan.table.opened += 1
        if self.cause is None:
            self.queue_event("tcp:opened", (None, None, ""), self.queued())
        if self.phase is _READING_REST:
            return  # its socket has died in the handshake
        self.enter(_OPEN)
        self.begin_silence()
        if (self.failed and self.cause is None
                or messages is not None and messages.framing.mute):
            return  # the end has come with the handshake
        self.opening = None
        for payload in opening.early if opening is not None else ():
            data = self.encode(payload) if messages is None else messages.ask(
                lambda: bytes(self.encode(payload)))
            if data is _FAILED or self.phase is not _OPEN:
                break
            self.write(data)
        if self.cause is not None:
            self.end(self.cause, _SEND_REST)

    def ready(self, mask):
        """Write and read once; return whether anything came of it."""
        if self.failed:
            self.plan.reactor.later(self)  # should Ctrl-C have cut work() off
            return True
        if self.phase is _CONNECTING:
            return self.opening.check()
        done = False
        if self.queue is not None and mask & _WRITE:
            done = self.flush()
            if self.queue is None and self.phase is _SENDING_REST:
                self.end(self.cause, _SEND_REST)
        # Asked again: a handler may have changed it since the batch was made.
        if self.failed or not (mask & _READ and self.events & _READ):
            return done or self.failed
        if self.lingering is not None:
            return self.lingering.ready()
        try:
            data = self.sock.recv(self.plan.recv_size, _DONTWAIT)
        except OSError as error:
            return self.meet(error) or done
        if data:  # the rest is selected again, after the others
            self.receive(data)
        else:
            self.end_of_stream()
        return True

    def work(self):
        """Do the work that was left for the turn."""
        messages = self.messages
        if self.phase is not _ENDED and self.sock.fileno() < 0:
            self.fail(Cause.of_errno(errno.EBADF))  # behind our back
        if self.phase is _CONNECTING:
            if self.failed and self.opening.errno not in _ENDED_SINCE:
                self.end(self.seen)
            else:
                self.opening.check()
        if self.failed and self.phase not in (_READING_REST, _CONNECTING):
            # After the program has asked for the end it gets no message.
            self.end(self.seen, _READ_REST if self.cause is None else _AT_ONCE)
        if self.phase is _SENDING_REST and self.queue is None:
            self.end(self.cause, _SEND_REST)
        if messages is not None and messages.waiting:
            messages.waiting = False
            self.renewed = self.plan.reactor.clock()  # we lag behind
            messages.deliver()
        if self.phase is _READING_REST:
            self._read_rest()
        self.watch()

    def fire(self, now):
        """Act on the earliest deadline; return whether it had come."""
        if self.lingering is not None and self.lingering.look(now):
            self.end(self.cause)
            return True
        times = deadlines_of(self)
        kind = min(times, key=times.get, default=None)
        fired = kind is not None and times[kind] <= now
        if fired:
            self._time_out(DEADLINES[kind], now)
        for time in deadlines_of(self).values():
            self.plan.reactor.arm(self, time)
        return fired

    def _time_out(self, row, now):
        """End for a deadline; but a FIN or RST that is still unread comes
        first, and more of a message than one recv() took puts it off.
        """
        detail = row.fire(self, now)
        if detail is None:
            return
        if self.phase is _CONNECTING:
            self.opening.probe()
            if self.opening.errno is not None:
                return  # work() acts on it
        if self.phase in (_HANDSHAKE, _OPEN):
            state, unread = self.probe()
            if state is _EOF:
                self.fail(self.seen)  # bytes before the FIN are delivered
            if unread and row.reason == "message" and self.events & _READ:
                step = self.messages if self.phase is _OPEN else self.opening
                step.deadline = now + _PROBE_AGAIN - self.plan.reactor.lag
                return
            if self.failed:
                return
        self.end(Cause(row.reason, row.errno, detail))

    def fault(self, error):
        """End for an error of ours, which is about to leave the loop."""
        self.end(self.seen if self.failed else Cause(
            "error", None, f"a fault in tcpops: {error!r}"))

    def renew(self):
        """Begin the lifetime again."""
        reactor = self.plan.reactor
        self.renewed = reactor.clock()
        if self.phase in DEADLINES["lifetime"].phases:
            reactor.arm(self, self.renewed + self.lifetime)

    def begin_silence(self):
        """Begin the lifetime, and the peer's silence: from here on we read."""
        self.renew()
        if self.messages is not None:
            self.messages.silent = self.renewed
            self.plan.reactor.arm(
                self, _of_pings(self, self.messages.inner.awaits_pong))

    def watch(self):
        """Have it selected for the events that phase and queue allow."""
        phase, events = self.phase, 0
        if (phase is _CONNECTING
                or self.queue is not None and phase is not _READING_REST):
            events = _WRITE
        if phase.reads and not not_reading(self):
            events |= _READ
        if events & _READ & ~self.events:  # until now the silence was ours
            if phase is _OPEN:
                self.begin_silence()
            reactor = self.plan.reactor
            for part in (self.opening, self.messages):
                if part is not None:
                    reactor.arm(self, part.deadline + reactor.lag)
        if events != self.events:
            try:
                self.plan.reactor.watch(self, events)
            except OSError as error:
                self.fail(Cause.of_errno(_system_error(error).errno))

    def receive(self, data):
        """Take bytes of the peer's."""
        plan = self.plan
        self.bytes_in += len(data)
        self.active = plan.reactor.clock()
        if self.messages is None:
            plan.handlers.message(self, Message(self, data))
        else:
            self.messages.silent = self.active
            self.messages.deliver(data)

    def end_of_stream(self):
        """End: the peer has sent FIN, and all before it was delivered."""
        cause, messages = Cause.of("eof"), self.messages
        if messages is not None:
            payload = messages.ask(messages.framing.finish)
            if payload is _FAILED:
                return
            cause = cause._replace(
                detail=messages.framing.closed or cause.detail)
            if payload is not None and self.opened:
                messages.hand_over(payload)
        self.end(cause, _SEND_REST)

    def _read_rest(self):
        """Deliver the bytes of a dead socket, a share a turn; then end."""
        for _ in range(_REST_READS):
            if (self.messages is not None and self.messages.waiting
                    or self.plan.handlers.leaving is not None):
                break
            self.plan.handlers.report()  # that it is open, before its messages
            if self.phase is not _READING_REST:
                return
            data = _ask(self.sock.recv, self.plan.recv_size, _DONTWAIT)
            if data:
                self.receive(data)
            elif self.seen.reason == "eof":
                self.end_of_stream()
            else:
                self.end(self.seen)
            if self.phase is not _READING_REST:
                return
        self.plan.reactor.later(self)

    def usable(self):
        """Whether it lives and was not asked to end."""
        return self.phase.sends and self.cause is None and not self.failed

    def ping(self):
        """Send a ping, unless bytes of ours wait to be sent before it."""
        messages = self.messages
        # Not the turn's time: handlers may have run since that was read.
        messages.silent = self.plan.reactor.clock()
        if self.queue is None:
            messages.ahead = self.unacknowledged() or 0
            messages.inner.awaits_pong = True
            messages.ask(lambda: messages.inner.ping())
            messages.deliver()  # which sends what the framing has queued

    def is_full(self):
        """Whether it may queue, and so should read, nothing more."""
        return (self.queue is not None and self.phase is not _READING_REST
                and len(self.queue) >= self.plan.settings.max_write_buffer)

    def encode(self, payload):
        """Return the bytes that send a payload, bytes or str."""
        framing = None if self.messages is None else self.messages.framing
        if type(payload) is str:
            return (payload.encode() if framing is None
                    else framing.encode_text(payload))
        return payload if framing is None else framing.encode(payload)

    def send(self, payload):
        """Send or queue a payload; return a Result.  See TcpOps.send."""
        if type(payload) is not bytes:
            payload = _payload(payload)
        messages = self.messages
        if self.phase is not _OPEN or self.failed:
            taken = self.usable() and self.opening.keep(payload)
        elif (self.queue is not None and self.is_full()
              or messages is not None and messages.framing.mute):
            taken = False
        else:
            if messages is not None or type(payload) is str:
                payload = self.encode(payload)  # which may have closed it
            taken = self.phase is _OPEN and self.write(payload)
        if taken:
            return _SUCCESS
        log.debug("conid %d takes nothing to send", self.conid)
        return _FAILURE

    def write(self, data):
        """Send or queue bytes; return whether the socket stands."""
        sent, plan = 0, self.plan
        if self.queue is None and data:
            try:
                sent = self.sock.send(data, _SEND_FLAGS)
            except OSError as error:
                if self.meet(error):
                    return False
            else:
                self.bytes_out += sent
                self.active = plan.reactor.clock()
        if sent < len(data):
            if self.queue is not None:
                self.queue += data
            else:
                self.queue = bytearray(memoryview(data)[sent:])
                self.send_deadline = (plan.reactor.clock()
                                      + plan.settings.send_timeout)
                plan.reactor.arm(self, self.send_deadline)
            self.watch()
        return True

    def flush(self):
        """Send the queue; return whether the kernel took any, or failed."""
        was_full, plan = self.is_full(), self.plan
        try:
            sent = self.sock.send(self.queue, _SEND_FLAGS)
        except OSError as error:
            return self.meet(error)
        del self.queue[:sent]
        self.bytes_out += sent
        self.active = plan.reactor.clock()
        self.send_deadline = self.active + plan.settings.send_timeout
        if not self.queue:
            self.queue, self.send_deadline = None, NEVER
        if was_full and not self.is_full() and self.messages is not None:
            # See NOT_READING: the peer's time begins again.
            self.messages.deadline = NEVER
            if self.phase is _HANDSHAKE:
                _start_timing(self.opening, plan.settings.message_timeout)
            self.messages.postpone()  # the rest that the framing holds first
        self.watch()
        return sent > 0

    def set_keepalive(self, keepalive):
        """Turn keepalive on, or off for None; OSError, and nothing is set."""
        reactor = self.plan.reactor
        set_keepalive(self.sock, keepalive)
        self.keepalive, self.suspected = keepalive, NEVER
        self.keepalive_deadline = (NEVER if keepalive is None else
                                   reactor.clock() + keepalive.limit)
        reactor.arm(self, self.keepalive_deadline)

    def meet(self, error):
        """Act on an error of recv() or send(); return whether it is dead."""
        number = _system_error(error).errno
        if number in (errno.EPIPE, errno.EPROTOTYPE, errno.ENOTCONN):
            # The BSDs and macOS keep the true one, an RST's, in SO_ERROR.
            number = _ask(self.sock.getsockopt, _SOL_SOCKET,
                          _SO_ERROR) or number
        if number not in _NOT_NOW:
            self.fail(Cause.of_errno(number))
        return self.failed

    def fail(self, cause):
        """Record that the socket is dead; the turn ends the connection."""
        self.failed = True
        self.seen = self.seen or cause
        self.plan.reactor.later(self)

    def end(self, cause, manner=_AT_ONCE):
        """End it: the one door.  An end that has begun keeps its cause."""
        if self.phase is _ENDED:
            return
        if manner is _READ_REST and self.phase in (_HANDSHAKE, _OPEN):
            self.enter(_READING_REST)
            if self.messages is not None:
                self.messages.waiting = True  # a full queue may hold some back
            self.plan.reactor.deadlines.disarm(self)
            return  # work() reads the rest, and comes back
        if self.messages is not None and not self.opened:
            refusal = self.messages.ask_last(lambda it: it.refused(), None)
            if refusal is not None:
                cause = Cause("protocol", None, refusal[0])
                self.messages.ask_last(lambda _: self.messages.inner.answered(
                    *refusal[1:]), None)
        if cause.errno == errno.ETIMEDOUT and self.icmp is not None:
            # As the kernel would have said, had no probe asked before.
            (number, when), info = self.icmp, tcp_info(self.sock)
            if (info is None or info.silence + _BUSY
                    >= self.plan.reactor.clock() - when):
                cause = cause._replace(errno=number,
                                       detail=os.strerror(number))
        self.cause = self.cause or cause
        try:
            waits = (manner is _SEND_REST and not self.failed
                     and self._send_rest(cause))
            if (self.messages is not None and self.cause.errno is None
                    and self.phase in (_HANDSHAKE, _OPEN)
                    and not (waits or self.failed)):
                self.write(self.messages.farewell(self.cause.reason))
        except BaseException:  # of a signal handler; work() goes on
            self.plan.reactor.later(self)
            raise
        if not waits and self.phase is not _ENDED:
            self._leave()

    def _send_rest(self, cause):
        """Send queue, farewell and FIN; return whether more is to come."""
        messages, opening = self.messages, self.opening
        if (self.phase in (_CONNECTING, _HANDSHAKE) and opening is not None
                and opening.early and cause.state is State.NOT_FOUND):
            return True  # open() sends them, and comes back
        if messages is not None:
            messages.speak()
        if (self.phase in (_HANDSHAKE, _OPEN)
                and (messages is not None or self.queue is not None)):
            self.enter(_SENDING_REST)
            if messages is not None:
                self.write(messages.farewell(self.cause.reason))
        if self.phase in (_OPEN, _SENDING_REST) and self.queue is None:
            self._linger()
        waits = not self.failed and (self.phase is _LINGERING
                                     or self.phase is _SENDING_REST
                                     and self.queue is not None)
        if waits:
            self.watch()
        return waits

    def _linger(self):
        """Send FIN; wait for the peer's, and until all is acknowledged."""
        fin = "eof" in (self.cause.reason, self.seen and self.seen.reason)
        left = self.unacknowledged() if fin else None
        if self.failed:
            return
        if fin and not left:
            return self._leave(left)
        if self.phase is _OPEN:
            self.enter(_SENDING_REST)
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:  # an RST has come
            self.fail(Cause.of_errno(_system_error(error).errno))
            return
        self.enter(_LINGERING)
        self.lingering = Lingering(self, fin)
        self.plan.table.lingering[self] = None
        if ((fin or not self.plan.settings.linger)
                and self.lingering.look(self.lingering.since)):
            self.end(self.cause)

    def _leave(self, left=None):
        """Close the socket, and report the end; left: see unacknowledged."""
        plan, cause, messages = self.plan, self.cause, self.messages
        assert cause is not None, "an end without a cause"
        queued = self.queued()
        left = self.unacknowledged() if left is None else left
        unsent = None if left is None else queued + left
        # After an end at once the kernel goes on trying to send its queue.
        lost = queued or self.lingering is not None and left
        cut_short = self.queue is not None or lost and not queued
        held = (messages is not None and self.opened
                and cause.reason not in ("closed", "protocol", "message")
                and messages.ask_last(lambda it: int(it.pending), 0))
        words = ((f", {unsent or queued} bytes unsent"
                  if lost and cause.reason != "send" else "")
                 + (f", {held} bytes not delivered" if held else ""))
        if words:
            cause = cause._replace(detail=cause.detail + words)
        self.queue = None
        self.enter(_ENDED)
        plan.reactor.deadlines.disarm(self)
        self.watch()
        try:
            self._close(cut_short)
        finally:  # a signal handler may raise there
            log.debug("conid %d has ended, %s: %s",
                      self.conid, cause.reason, cause.detail)
            plan.table.count_end(self)
            mode = plan.handlers.closed_event
            if mode == 1 or mode == 2 and self.wants_event:
                self.queue_event(REASONS[cause.reason], cause, queued, unsent)
            else:
                plan.table.remove(self)
            self.opening = self.messages = self.lingering = None
            for listener in plan.table.crowded:
                plan.reactor.resume(listener)
            plan.table.crowded.clear()

    def _close(self, cut_short):
        """Close the socket: with FIN if the stream is complete, with RST if
        it was cut short: a FIN would leave an orphan that the kernel serves.
        """
        sock = self.sock
        try:
            if cut_short:
                _reset(sock)
            elif self.lingering is None and not self.failed:
                # A duplicate of the descriptor would keep the FIN back.
                sock.shutdown(socket.SHUT_WR)
                # Unread bytes would turn close() into an RST, which destroys
                # those of ours that the peer has not read.  Ends with EAGAIN.
                if self.bytes_out and self.cause.reason != "eof":
                    any(not sock.recv(_RECV_SIZE, _DONTWAIT)
                        for _ in range(_EMPTYING))
        except OSError as error:  # so the peer knows already, or never will
            _system_error(error)
        finally:
            self.plan.reactor.close(sock)

    def probe(self):
        """Probe; return (State, whether bytes wait).

        Keeps a FIN or an error that the probe has met, and ends nothing.
        """
        if self.phase is _CONNECTING:
            return self.opening.probe(), False
        if self.seen is not None:
            return self.seen_state(), False
        state, number, unread = _look(self.sock)
        if number is not None and state is _OK:
            self.icmp = number, self.plan.reactor.clock()
        elif number is not None:
            self.fail(Cause.of_errno(number))
        elif state is _EOF:
            self.seen = Cause.of("eof")
        elif self.phase is _HANDSHAKE:
            state = (State.CONNECT if self.plan.origin == "connect"
                     else State.ACCEPT)
        elif (self.plan.origin == "accept" and not unread
              and not self.bytes_in and not self.bytes_out):
            state = State.ACCEPT
        return state, unread

    def seen_state(self):
        """Return the State that a probe has found."""
        return State.BAD if self.seen.errno in _NO_SOCKET else self.seen.state

    def queued(self):
        """Return the number of bytes that wait to be sent."""
        early = self.opening.early_bytes if self.opening is not None else 0
        return len(self.queue or ()) + early

    def unacknowledged(self):
        """Return how many bytes in the kernel the peer's has not acknowledged,
        our FIN aside; None where the platform cannot say.
        """
        if self.phase is _CONNECTING:
            return 0  # the kernel counts our SYN
        left = _in_kernel(self.sock, _TIOCOUTQ)
        return left and max(0, left - (self.phase is _LINGERING))

    def queue_event(self, name, cause, queued, unsent=None):
        """Queue an event; it is reported when no handler runs."""
        plan = self.plan
        plan.handlers.events.append((self, Event(
            self.conid, name, *cause, self.proto, *self.peer, *self.local,
            plan.reactor.clock() - self.since, self.bytes_in, self.bytes_out,
            queued, unsent, plan.origin, plan.listener, self.opened)))
        plan.reactor.nudge()

# ---------------------------------------------------------------------------
# 17. A listener
# It is no connection: it has a conid and an end, but no bytes, deadlines or
# events.  With no descriptor left a peer that waits keeps it ready for ever;
# so it rests until a connection ends, or for a short time.

_ACCEPTS = 64  #: accept() calls of one listener in one turn

#: accept() errors of the listener itself; all others are one peer's.
_BROKEN = (errno.EBADF, errno.ENOTSOCK, errno.EINVAL)


class Listener:
    """A listening socket, and the plan of its connections."""

    __slots__ = ("plan", "conid", "proto", "sock", "events", "local", "since",
                 "backlog")

    def __init__(self, plan, sock, proto, backlog):
        self.sock, self.events = sock, 0
        self.proto, self.backlog = proto, backlog
        self.local = _peer_key(sock.getsockname())
        self.since = plan.reactor.clock()
        plan.reactor.watch(self, _READ)
        plan.table.add(self, plan.table.listeners)
        self.plan = plan.changed(listener=self.conid)

    def ready(self, mask, most=_ACCEPTS):
        """Accept the peers that wait, a turn's share at the most."""
        table, done = self.plan.table, False
        for _ in range(most):
            if self.sock.fileno() < 0:
                break  # a handler has ended it
            waits = mask and not done  # else it is not known whether one does
            try:
                if table.sockets >= table.limit and not (
                        waits and _make_room(table)):
                    raise OSError(errno.EMFILE, "max_connections reached")
                sock, peer = self.sock.accept()
            except OSError as error:
                _system_error(error)
                if error.errno in _FULL and waits and _make_room(table):
                    continue
                return done or self._refused(error)
            done = True
            self._admit(sock, peer)
        return done

    def _refused(self, error):
        """Act on an error of accept(); return whether anything came of it."""
        if error.errno in _FULL:
            self.plan.table.refused += 1
            self.plan.table.crowded[self] = None
            self.plan.reactor.suspend(
                self, f"accepts nothing for now: {error.strerror}")
        elif error.errno in _BROKEN:
            self._give_up(error)
        else:  # none waits, or that one is gone
            return False
        return True

    def _admit(self, sock, peer):
        """Make a connection of an accepted socket."""
        plan = self.plan
        try:
            framing = plan.build()
        except BaseException as error:
            sock.close()
            plan.handlers.raised(error, "the framing", self)
            return
        if plan.reactor.closing or not peer:  # by the framing; macOS: it was
            return sock.close()               # reset, and has no address
        local = self.local
        try:
            # On Linux each call says so; macOS' send() ignores that flag.
            if not (_LINUX and _DONTWAIT) or sock.gettimeout() is not None:
                _ask(sock.setblocking, False)
            if local[0] in ("0.0.0.0", "::"):  # so each has its own
                local = _peer_key(_ask(sock.getsockname) or local)
        except BaseException:  # of a signal handler
            sock.close()
            raise
        conn = Connection(plan, framing, sock, _peer_key(peer), local)
        try:
            conn.begin()
        except Exception as error:
            if not _is_signal(error):
                conn.fault(error)
            raise

    def _give_up(self, error):
        log.error("conid %d stops listening: %s", self.conid, error.strerror)
        self.end(accept=False)

    def work(self):
        """Accept again, after a rest."""
        self.plan.table.crowded.pop(self, None)
        if self.conid in self.plan.table.listeners:
            try:
                self.plan.reactor.watch(self, _READ)
            except OSError as error:  # closed behind our back, or no room
                self._give_up(_system_error(error))

    fault = lambda self, error: None  # it accepts the next peer all the same

    def end(self, accept=True):
        """Stop listening; accept first, or the kernel resets who waits."""
        if self.plan.table.listeners.pop(self.conid, None) is None:
            return
        left, table = self.backlog if accept else 0, self.plan.table
        while left > 0:
            begun = table.begun
            self.ready(0, min(left, _ACCEPTS))
            left = left - (table.begun - begun) if table.begun > begun else 0
        self.plan.reactor.watch(self, 0)
        self.plan.table.crowded.pop(self, None)
        self.plan.reactor.close(self.sock)

# ---------------------------------------------------------------------------
# 18. Questions
# Asking changes nothing: a question opens, connects and ends nothing and
# reports no event.  A probe may consume an error; Connection.probe keeps that,
# and the turn acts on it.


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
    deadline: Optional[float]       #: when the earliest of its deadlines fires
    keepalive: Optional[Keepalive]  #: as the kernel has it, None if off
    bytes_in: int
    bytes_out: int
    queued: int             #: bytes of our queue
    origin: str             #: "accept", "connect", "attach" or "listen"
    listener: Optional[int]         #: conid of the listener that accepted it
    opened: bool            #: whether it has been usable
    phase: str              #: a row of LIFE; "listening"
    deadlines: dict         #: seconds left, by kinds of DEADLINES


def is_gone(conn):
    """Say whether the program has asked a connection to end."""
    return conn.cause is not None and conn.cause.state is State.NOT_FOUND


def state_of(conn):
    """Return the State of a connection or a listener."""
    if isinstance(conn, Listener):
        listens = _of_unconnected(conn.sock) is State.ACCEPT
        return State.ACCEPT if listens else State.BAD
    return conn.probe()[0] if conn.cause is None else conn.cause.state


def snapshot(conn):
    """Return the ConnectionInfo of a connection, None if it has ended."""
    if conn.phase is _ENDED or is_gone(conn):
        return None
    answer, times = state_of(conn), deadlines_of(conn)
    now = conn.plan.reactor.clock()
    return ConnectionInfo(
        conn.conid, conn.proto, *conn.peer, *conn.local, conn.plan.name,
        answer, now - conn.since, max(0.0, now - conn.active), conn.lifetime,
        min(times.values(), default=None), get_keepalive(conn.sock),
        conn.bytes_in, conn.bytes_out, conn.queued(), conn.plan.origin,
        conn.plan.listener, conn.opened, conn.phase.name,
        {kind: time - now for kind, time in times.items()})


def snapshot_of_listener(listener):
    """Return the ConnectionInfo of a listener."""
    plan, age = listener.plan, listener.plan.reactor.clock() - listener.since
    return ConnectionInfo(
        listener.conid, listener.proto, "", 0, *listener.local, plan.name,
        state_of(listener), age, 0.0, plan.settings.connection_lifetime, None,
        None, 0, 0, 0, "listen", None, False, "listening", {})

# ---------------------------------------------------------------------------
# 19. The functions of the specification
# In the specification's order.  An argument never makes them raise: a wrong
# value or a conid that is of no use is one log line and -1, and nothing has
# been changed.  _script_function is the border; behind it, everything raises,
# and a fault of ours goes through it.  Where "[conid]" is left out it is the
# connection of the message, or event, in hand.  For the two that only ask,
# "no such connection" is an answer and no log line.


def _script_function(takes, failure=Result.FAILURE, name=None):
    """Decorator: a refusal is one log line and the value failure."""
    names = re.findall("[a-z]+", takes)

    def decorate(function):
        @functools.wraps(function)
        def script_function(self, /, *args, **named):
            try:
                if named or len(args) != len(names):
                    args = _arguments(takes, names, args, named)
                return function(self, *args)
            except (_ArgumentError, OSError) as error:
                reason = str(_system_error(error))  # it holds frames, and they
            log.warning("%s: %s", name or function.__name__, reason)
            return failure
        script_function.takes = takes
        script_function.__doc__ = (f"{function.__name__}({takes}).\n\n"
                                   f"        {function.__doc__}")
        return script_function
    return decorate


#: Keepalive, of which there is one for all that enable the same.
_same_keepalive = functools.lru_cache(maxsize=1)(Keepalive)


class SpecFunctions:
    """The functions of the specification, and of its newer releases."""

    def _known(self, conid):
        """Return the connection of a conid, or None.  Raises ValueError."""
        if conid is _CURRENT:
            if self._handlers.current is None:
                raise _ArgumentError("no conid, and no message or event here")
            return self._handlers.current
        return self._table.get(_number(conid, "conid", -NEVER, NEVER, True))

    def _usable(self, conid):
        """Return the live connection of a conid, or raise ValueError."""
        conn = self._known(conid)
        if conn is None:
            _number(conid, "conid", -sys.maxsize, sys.maxsize, whole=True)
            raise _ArgumentError(f"there is no connection {conid}")
        if isinstance(conn, Listener):
            raise _ArgumentError(f"conid {conid} is a listener")
        if conn.usable():
            return conn
        raise _ArgumentError(f"connection {conn.conid} is ending")

    @_script_function("[conid]")
    def tcp_conid_alive(self, conid):
        """Return SUCCESS if a connection is usable, or a listener.  Spec: 3.1.

        FAILURE: it has errors, does not exist or is about to be closed.
        """
        conn = self._known(conid)
        return _SUCCESS if conn is not None and state_of(conn) else _FAILURE

    @_script_function("[conid]", State.NOT_FOUND)
    def tcp_conid_state(self, conid):
        """Return a connection's State, as a probe finds it now.  Spec: 3.2.

        In the handler of its end: EOF after an eof, NOT_FOUND after a close
        of ours, else ERROR; afterwards NOT_FOUND for ever.
        """
        conn = self._known(conid)
        return State.NOT_FOUND if conn is None else state_of(conn)

    @_script_function("[conid], idle, count, interval")
    def tcp_keepalive_enable(self, conid, idle, count, interval):
        """Turn keepalive on.  Spec: 3.3.

        See Keepalive.  A peer that is silent for idle + count * interval,
        though asked, ends the connection with the reason "keepalive", also
        with data in flight.  All settings are made or, with FAILURE, none.
        """
        conn = self._usable(conid)
        conn.set_keepalive(_same_keepalive(*(
            _number(value, name, 1, _MAX_SECONDS, whole=True)
            for name, value in zip(Keepalive._fields,
                                   (idle, count, interval)))))
        return Result.SUCCESS

    @_script_function("[conid]")
    def tcp_keepalive_disable(self, conid):
        """Turn keepalive off.  Spec: 3.4."""
        self._usable(conid).set_keepalive(None)
        return Result.SUCCESS

    @_script_function("[conid], lifetime")
    def tcp_set_connection_lifetime(self, conid, lifetime):
        """Set the seconds for which a connection may be idle.  Spec: 3.5.

        Bytes received or sent renew it.  It counts from now; 0 expires in the
        loop's next turn.
        """
        conn = self._usable(conid)
        conn.lifetime = _number(lifetime, "lifetime", 0, _MAX_SECONDS)
        conn.renew()
        return _SUCCESS

    @_script_function("[conid]")
    def tcp_enable_closed_event(self, conid):
        """Report the end of a connection if closed_event is 2.  Spec: 3.6.

        Without a conid FAILURE unless closed_event is 2, as in the original.
        """
        if conid is _CURRENT and self._handlers.closed_event != 2:
            raise _ArgumentError("without a conid it needs closed_event 2")
        self._usable(conid).wants_event = True
        return Result.SUCCESS

    @_script_function("[conid]")
    def tcp_close_connection(self, conid):
        """Close a connection, or a listener.

        Its queue is sent first, within send_timeout.  The state is NOT_FOUND
        at once.  FAILURE if an RST or a refusal came before: that is why then.
        """
        conn = self._known(conid)
        if isinstance(conn, Listener):
            conn.end()
            return Result.SUCCESS
        self._usable(conid).probe()
        self._usable(conid).end(Cause.of("closed"), _SEND_REST)
        if conn.cause.reason != "closed":  # a refusal had begun to come
            raise _ArgumentError(f"connection {conid} is ending")
        return Result.SUCCESS

    @_script_function("address")
    def tcp_get_conid(self, address):
        """Return the conid of a live connection with a peer, or FAILURE (-1).

        address is as for parse_address; a name in it blocks on its look-up.
        Of several it is the youngest that is open, or else will be.  One with
        TLS is found by its address and by the name that it was made for.
        """
        conn = self._peer(*_parse_uri(address))
        return Result.FAILURE if conn is None else conn.conid

    @_script_function("address")
    def tcp_con_alive(self, address):
        """Return SUCCESS if there is a usable connection with a peer."""
        return _SUCCESS if self._peer(*_parse_uri(address)) else _FAILURE

    @_script_function("conid")
    def tcp_set_otcpid(self, conid):
        """Name the connection for forward; in the handler of a message."""
        self._outbound()["conid"] = self._usable(conid).conid
        return Result.SUCCESS

    @_script_function("mode")
    def tcp_set_otcpid_flag(self, mode):
        """Have forward heed that (mode not 0) or not, as at first (mode 0)."""
        self._outbound()["heed"] = _number(mode, "mode", -NEVER, NEVER, True)
        return Result.SUCCESS

    def _outbound(self):
        """Return the dict that forward heeds for the message in hand."""
        handlers = self._handlers
        if handlers.current is None or handlers.event is not None:
            raise _ArgumentError("only in the handler of a message")
        return handlers.outbound

    def _peer(self, host, port, protos, *_):
        """Return the connection that tcp_get_conid names, or None."""
        host = Host.of(host, port)
        peers = [_peer_key(it) for _, it in _resolve(*host[:2])]
        return next((
            conn for is_open in (True, False) for peer in peers
            for conn in self._table.of_peer(peer)
            if (conn.phase is _OPEN) is is_open and conn.usable()
            and (protos is None or conn.proto in protos)
            and (conn.plan.context is None or _literal(host.tls)
                 or conn.plan.server_hostname == host.tls)
            and state_of(conn)), None)

# ---------------------------------------------------------------------------
# 20. TcpOps
# The object that a program holds: it puts the pieces above together.

#: Options that would delay the bytes of an attached socket, or close().
_PLAIN = ((socket.IPPROTO_TCP, "TCP_NODELAY", 1),
          (socket.IPPROTO_TCP, "TCP_CORK", 0),
          (socket.SOL_SOCKET, "SO_RCVLOWAT", 1),
          (socket.SOL_SOCKET, "SO_LINGER", struct.pack("ii", 0, 0)))
_RESERVE = 32  #: descriptors left for the host program, unless told otherwise


def _room(limit):
    """Return max_connections; None: the process's limit, less some."""
    if limit is not None:
        return _number(limit, "max_connections", 1, sys.maxsize, whole=True)
    most = NEVER
    if issubclass(selectors.DefaultSelector, selectors.SelectSelector):
        most = 512 if sys.platform == "win32" else 1024  # FD_SETSIZE
    if resource is not None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = most if soft == resource.RLIM_INFINITY else min(most, soft)
    return max(1, most - _RESERVE)


#: Every TcpOps that lives: see TcpOps._abandon.
_instances = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows)
    os.register_at_fork(
        after_in_child=lambda: [ops._abandon() for ops in list(_instances)])


def _part(name, member):
    """Return a method that a part of TcpOps has for it."""
    @functools.wraps(member)
    def _call(self, *args, **named):
        return member(getattr(self, name), *args, **named)
    return _call


def _setting(name, *limits):
    """Return the property for one of Settings; limits are _number's."""
    def _change(ops, value):
        value = _number(value, name, *limits)
        ops._settings = ops._settings._replace(**{name: value})
        for listener in ops._table.listeners.values():
            listener.plan = listener.plan.changed(settings=ops._settings)
    return property(lambda ops: getattr(ops._settings, name), _change,
                    doc=f"{name}: see TcpOps.")


_BORDERS.update(function.__code__ for function in (
    Handlers.message, Handlers.report, Handlers.call, Plan.build,
    Messages.ask, Messages.deliver, Messages.ask_last, Connection.encode))


class TcpOps(SpecFunctions):
    """Every TCP connection by its number, and the loop that runs them.

    Settings (keyword arguments; ValueError for a wrong one, TypeError where a
    function is needed).  Each can be read under its name and, but for clock,
    assigned: timeouts, lifetime and sizes count for connections made
    afterwards, the others at once:

    closed_event         whose end is reported: 0 no one's, 1 every
                         connection's, 2 where tcp_enable_closed_event was
                         called (spec 2.1)
    event_callback       called with the event's name instead of any handler
    connection_lifetime  seconds of idleness allowed to a connection
    connect_timeout      seconds for connect
    send_timeout         seconds without progress of the queue
    message_timeout      seconds from a message's first byte to its last, and
                         for a framing's handshake
    max_connections      None: the limit of descriptors, less a reserve
    max_message          bytes
    max_write_buffer     bytes queued, for each connection
    linger               seconds for the peer's FIN after ours; 0: not at all
    clock                a function that returns seconds

    In a child after fork() it is closed, without any event, and the parent's
    does not notice.
    """

    def __init__(self, *, closed_event=1, event_callback=None,
                 connection_lifetime=120, connect_timeout=10, send_timeout=10,
                 message_timeout=20, max_connections=None, max_message=65536,
                 max_write_buffer=1048576, linger=2, clock=time.monotonic):
        settings = {**locals()}
        self._settings, self._table = Settings(), Table(NEVER)
        self._handlers = Handlers(self._table)
        for name in (*Settings._fields, "closed_event", "event_callback",
                     "max_connections"):
            setattr(self, name, settings[name])
        self._reactor = Reactor(_function(clock), self._handlers)
        self._draining = False
        _instances.add(self)

    def __repr__(self):
        return (f"<TcpOps: {len(self._table.listeners)} listeners,"
                f" {self._table.sockets} connections>")

    clock = property(lambda ops: ops._reactor.clock,
                     doc="The function that returns the loop's time.")
    event = property(lambda ops: ops._handlers.event,
                     doc="The current event, None outside of its handler.")
    closed = property(lambda ops: ops._reactor.closing,
                      doc="Whether close() was called.")

    connection_lifetime = _setting("connection_lifetime", 0, _MAX_SECONDS)
    connect_timeout = _setting("connect_timeout", 0.001, _MAX_SECONDS)
    send_timeout = _setting("send_timeout", 0.001, _MAX_SECONDS)
    message_timeout = _setting("message_timeout", 0.001, _MAX_SECONDS)
    max_message = _setting("max_message", 1, sys.maxsize, True)
    max_write_buffer = _setting("max_write_buffer", 1, sys.maxsize, True)
    linger = _setting("linger", 0, _MAX_SECONDS)
    max_connections = property(
        lambda ops: ops._table.limit,
        lambda ops, limit: setattr(ops._table, "limit", _room(limit)),
        doc="Connections at once; inf if nothing limits them.")
    closed_event = property(
        lambda ops: ops._handlers.closed_event,
        lambda ops, mode: setattr(ops._handlers, "closed_event", _number(
            mode, "closed_event", 0, 2, whole=True)),
        doc="Whose end is reported, 0 to 2: see TcpOps.  Spec: 2.1.")
    event_callback = property(
        lambda ops: ops._handlers.event_callback,
        lambda ops, function: setattr(
            ops._handlers, "event_callback",
            None if function is None else _function(function)),
        doc="Called with the event's name instead of any handler; see event.")

    def modparam(self, module, name, value):
        """Set a parameter as the script language does.  Spec: 2."""
        if module != "tcpops" or name not in ("closed_event",
                                              "event_callback"):
            raise ValueError(f"modparam knows no {name!r} of {module!r}")
        setattr(self, name, value)

    request_route = _part("_handlers", Handlers.request_route)
    onreply_route = _part("_handlers", Handlers.onreply_route)
    event_route = _part("_handlers", Handlers.event_route)

    conid = property(lambda ops: getattr(ops._handlers.current, "conid", None),
                     doc="The conid of the current message or event, or None.")

    attend = _part("_reactor", Reactor.attend)
    dismiss = _part("_reactor", Reactor.dismiss)

    def _plan(self, *how):
        return Plan(self._handlers, self._table, self._reactor,
                    self._settings, *how)

    def listen(self, host, port, *, framing="raw", tls=None,
               backlog=socket.SOMAXCONN, reuse_port=False):
        """Accept connections; return the listener's conid.

        framing is a name in FRAMINGS or a subclass of Framing, tls an
        ssl.SSLContext for servers, with its certificate.  host is an address
        or a name ("" for every IPv4 address, "::" for every IPv6 one), port 0
        lets the system choose: see connection(conid).Rp.  Of a name's
        addresses the first is bound, the others are logged.  Raises OSError.
        """
        where = Host.of("0.0.0.0" if host == "" else host, port)[:2]
        plan = self._plan("accept", framing, tls)
        trial = plan.build()
        self._check_taking(room=False)
        if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise ValueError("this system has no reuse_port")
        (family, address), *others = _resolve(*where, passive=True)
        try:
            sock = socket.create_server(address, family=family,
                                        backlog=backlog, reuse_port=reuse_port)
        except OSError as error:  # without the library's words
            cause = error.__context__ if error.__suppress_context__ else error
            number = _system_error(cause).errno
            raise OSError(number, os.strerror(number)) from None
        try:
            sock.setblocking(False)
            # Accepted sockets inherit it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            proto = "tcp" if trial is None else trial.proto
            for _, other in others:
                log.warning("listen: %s, of %s, is not bound", other[0], host)
            return Listener(plan, sock, proto, backlog).conid
        except BaseException:
            sock.close()
            raise

    def set_tls(self, listener, context):
        """Give a listener another ssl.SSLContext, for its new connections."""
        found = (self._table.listeners.get(listener)
                 if type(listener) is int else None)
        if found is None or found.plan.context is None:
            raise ValueError("set_tls takes the conid of a listener with TLS,"
                             f" not {reprlib.repr(listener)}")
        _LAYERS["tls"].check_context(context, client=False)
        found.plan = found.plan.changed(context=context)

    def connect(self, host, port, *, framing="raw", tls=None,
                server_hostname=None):
        """Start to connect; return the conid.

        tls is an ssl.SSLContext for clients, which decides how to verify;
        server_hostname is the name in the certificate where it is not host.
        An event reports the outcome: tcp:opened, or an end.  Payloads sent
        meanwhile are queued.  The lookup of a name may block; its addresses
        are tried in turn, all within connect_timeout.  Raises OSError (no such
        name, no descriptor), ValueError (not a name; this is both).
        """
        host = Host.of(host, port)
        plan = self._plan("connect", framing, tls, server_hostname, host)
        addresses = _resolve(*host[:2])
        layer = plan.build()
        self._check_taking()
        sock, address, others = _socket_for(addresses, self._table)
        conn = Connection(plan, layer, sock, _peer_key(address))
        conn.connect(address, others)
        return conn.conid

    def attach(self, sock, *, framing="raw"):
        """Adopt a connected TCP socket, which is the loop's from then on.

        Returns its conid.  Raises ValueError for any other kind of socket, and
        for one that is shut down for writing; OSError if not connected.
        """
        self._check_taking()
        plan = self._plan("attach", framing)
        ssl = sys.modules.get("ssl")  # not loaded: then it is not one
        if (not isinstance(sock, socket.socket)
                or ssl and isinstance(sock, ssl.SSLSocket)
                or sock.type != socket.SOCK_STREAM
                or sock.family not in (socket.AF_INET, socket.AF_INET6)
                or hasattr(socket, "SO_PROTOCOL") and sock.getsockopt(
                    socket.SOL_SOCKET, socket.SO_PROTOCOL)
                != socket.IPPROTO_TCP):  # MPTCP's has no TCP_INFO
            raise ValueError("attach takes a plain TCP socket,"
                             f" not {reprlib.repr(sock)}")
        peer = _peer_key(sock.getpeername())
        local = _peer_key(sock.getsockname())
        if self._reactor.holds(sock) or any(
                conn.local == local for conn in self._table.of_peer(peer)):
            raise ValueError(f"{sock!r} is attached already")
        if _tcp_state(sock) in _TCP_SHUT:
            raise ValueError(f"{sock!r} is shut down for writing")
        layer = plan.build()
        self._check_taking()
        sock.setblocking(False)
        for level, name, value in _PLAIN:
            with contextlib.suppress(AttributeError, OSError):  # not here
                sock.setsockopt(level, getattr(socket, name), value)
        conn = Connection(plan, layer, sock, peer, local)
        conn.begin()
        return conn.conid

    def _check_taking(self, room=True):
        self._reactor.check_running()
        if self._draining:
            raise RuntimeError("this TcpOps is being drained")
        if (room and self._table.sockets >= self._table.limit
                and not _make_room(self._table)):
            raise OSError(errno.EMFILE, "max_connections reached")

    def send(self, conid, payload):
        """Send payload on a connection; return a Result.

        A str is a text message on a WebSocket, elsewhere its UTF-8 bytes.
        FAILURE, nothing sent: there is no such connection, it is ending, or
        its queue is over max_write_buffer.  TypeError: neither bytes nor str.
        """
        payload = _payload(payload)
        conn = self._found(conid)
        return Result.FAILURE if conn is None else conn.send(payload)

    _found = _script_function("conid", None, "send")(SpecFunctions._usable)

    def forward(self, address, payload):
        """Send payload to a peer; return a Result.

        On the connection that tcp_set_otcpid names, if the flag is on; else
        on the one that tcp_get_conid names; else on a new one of plain TCP, if
        the URI allows that, with the framing of the current message: SIP's if
        that is WebSocket's, to a SIP URI.  Raises TypeError as send does.
        """
        payload = _payload(payload)
        conn = self._way_to(address)
        return Result.FAILURE if conn is None else conn.send(payload)

    @_script_function("address", None, "forward")
    def _way_to(self, address):
        """Return the connection for forward, or None after a log line."""
        host, port, protos, framing = _parse_uri(address)
        outbound = self._handlers.outbound
        if outbound.get("heed") and "conid" in outbound:
            conn = self._usable(outbound["conid"])
            if not state_of(conn):
                raise _ArgumentError(f"connection {conn.conid} is dead")
        else:
            conn = self._peer(host, port, protos)
        proto = "tcp" if conn is None else conn.proto
        if protos is not None and proto not in protos:
            raise _ArgumentError(f"there is no connection to {address} with"
                                 " that transport, and forward makes none")
        if conn is None:
            try:
                self._check_taking(room=False)
            except RuntimeError as error:
                raise _ArgumentError(error) from None
            current = self._handlers.current
            if not (framing and current) or current.proto in ("tcp", "tls"):
                framing = current and current.plan.factory
            conn = self._table.get(
                self.connect(host, port, framing=framing or "raw"))
        return conn

    def connection(self, conid):
        """Return a ConnectionInfo of a connection or listener, or None."""
        conn = self._table.get(conid) if type(conid) is int else None
        if isinstance(conn, Listener):
            return snapshot_of_listener(conn)
        return None if conn is None else snapshot(conn)

    def conids(self):
        """Return a list of the conids of connections, without any probe."""
        return [conn.conid for conn in self._connections()
                if not is_gone(conn)]

    def connections(self):
        """Return a list of the ConnectionInfo of every connection."""
        return list(filter(None, map(self.connection, self.conids())))

    def listeners(self):
        """Return a list of the ConnectionInfo of every listener."""
        return list(map(snapshot_of_listener, self._table.listeners.values()))

    def _connections(self):
        """Return the connections that have not ended."""
        return [conn for conn in self._table.connections.values()
                if conn.phase is not _ENDED]

    def stats(self):
        """Return counts since the start, as a dict.

        accepts_refused counts how often a listener met a lack of room.
        """
        table, live = self._table, self._connections()
        return {
            "begun": table.begun,
            "opened": table.opened,
            "ended": dict(table.ended),
            "accepts_refused": table.refused,
            "bytes_in": table.bytes_in + sum(c.bytes_in for c in live),
            "bytes_out": table.bytes_out + sum(c.bytes_out for c in live),
        }

    run = _part("_reactor", Reactor.run)
    step = _part("_reactor", Reactor.step)
    stop = _part("_reactor", Reactor.stop)
    call_soon = _part("_reactor", Reactor.call_soon)
    fileno = _part("_reactor", Reactor.fileno)
    next_deadline = _part("_reactor", Reactor.next_deadline)

    def drain(self, timeout):
        """Stop accepting, empty the queues, and end every connection.

        Returns when all have ended, after timeout seconds (of real time) at
        the latest.  Their reason is "shutdown", or "reset" after an RST.
        """
        timeout = _number(timeout, "timeout", 0, _MAX_SECONDS)
        self._reactor.check_outside()
        end = time.monotonic() + timeout
        with self._reactor.waker.signals():
            self._draining = True
            try:
                cause = Cause("shutdown", None, "drained")
                self._end_listeners(accept=True)
                conns = self._connections()
                while self._table.sockets and time.monotonic() < end:
                    conns = self._end_connections(conns, cause, _SEND_REST)
                    if self._table.sockets:  # else it might wait for nothing
                        self.step(max(0, end - time.monotonic()))
                self._end_connections(self._connections(), cause)
                while self._handlers.events:
                    self.step(0)
            finally:
                self._draining = False

    def _end_listeners(self, accept):
        for listener in list(self._table.listeners.values()):
            listener.end(accept)

    @staticmethod
    def _end_connections(conns, cause, manner=_AT_ONCE):
        """End them; return those whose messages are to be delivered first."""
        late = []
        for conn in conns:
            if conn.usable():
                conn.probe()  # an RST that came before is the reason
            if manner is _AT_ONCE:
                conn.end(conn.seen if conn.failed
                         and conn.seen.reason != "eof" else cause)
            elif conn.messages is not None and (conn.messages.waiting
                                                or conn.is_full()):
                late.append(conn)
            elif not conn.failed and conn.cause is None:  # else the turn does
                conn.end(cause, manner)
        return late

    def close(self):
        """End every connection at once, report the events, free everything."""
        reactor = self._reactor
        if reactor.closing:
            return
        with (contextlib.nullcontext() if reactor.turning
              else reactor.waker.signals()):
            reactor.closing = True
            self._end_listeners(accept=False)
            self._end_connections(self._connections(), Cause.of("shutdown"))
            if not reactor.turning:
                reactor.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _abandon(self):
        """In a child after fork(): close copies, touch nothing shared.

        To unregister, read or end anything would be felt in the parent; not to
        close would keep its peers from ever seeing its FIN.
        """
        for conn in self._connections():
            conn.enter(_ENDED)
            conn.events = 0
        for held in (self._table.connections, self._table.listeners):
            while held:
                with contextlib.suppress(OSError):
                    held.popitem()[1].sock.close()
        self._table.sockets = 0
        self._reactor.abandon()

# ---------------------------------------------------------------------------
# 21. The command line
# A program on the public names, like any other.  Its output waits for no
# reader: one that stops reading would stop the loop, and every connection.

import argparse
import datetime
import threading

__all__ += ["main"]
_NAME = os.path.basename(sys.argv[0]) or "tcpops.py"
_HELP = r"""commands:
tcp_conid_alive CONID                          1: it is usable, -1: it is not
tcp_conid_state CONID                          its state, number and name
tcp_keepalive_enable CONID IDLE COUNT INTERVAL end it if its peer vanishes
tcp_keepalive_disable CONID                    undo tcp_keepalive_enable
tcp_set_connection_lifetime CONID LIFETIME     end it when idle for so long
tcp_enable_closed_event CONID                  report its end in mode 2
tcp_close_connection CONID                     send its queue, then end it
tcp_get_conid ADDRESS                          the conid of that peer
tcp_con_alive ADDRESS                          1: that peer has a usable one
send CONID TEXT                                send TEXT; \n \r \t \\ \xNN work
list                                           show connections and listeners
quit, exit                                     end everything and leave"""

_EPILOG = """
A console at a terminal, or with --console; """ + _HELP + """

SIGINT (Ctrl-C) or SIGTERM closes listeners, sends queues, for 5 s at the most,
and ends every connection; a second one stops at once.  Exit status: 0, 130 by
a second signal, 2 for wrong usage, 1 if the system or each --connect said no.
"""
_ERASE = "\r\x1b[K"
_QUEUED = 1000  #: lines that wait for their reader
_PLAIN_DETAILS = ("FIN from the peer", "closed by conid", "drained")


class _Output(logging.Handler):
    """Writes lines, and the log, to a stream from a thread of its own.

    Its callers never wait: lines for which there is no room are counted.
    """

    def __init__(self, stream, failed=lambda: None):
        super().__init__()
        self.prompt, self.failure, self._failed = "", None, failed
        self._encoding = getattr(stream, "encoding", "utf-8")
        # The bare file: a thread that waits with the lock of Python's buffers
        # would keep the interpreter from leaving.  None: started without one.
        buffer = getattr(stream, "buffer", None)
        self._file = getattr(buffer, "raw", buffer)
        self._texts, self._lost, self._finished = [], 0, False
        self._news = threading.Condition()  # that one of these has changed
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def emit(self, record):
        self.line(self.format(record))

    def line(self, text):
        """Write a line: over a prompt and the words being typed."""
        self.write(f"{self.prompt and _ERASE}{text}\n{self.prompt}")

    def write(self, text):
        """Write a text, which counts as one line."""
        with self._news:
            if len(self._texts) < _QUEUED:
                self._texts.append(text)
            else:
                self._lost += 1
            self._news.notify()

    def finish(self, timeout):
        """Wait until all is written, for timeout seconds at the most."""
        with self._news:
            self._finished = True
            self._news.notify()
        self._thread.join(timeout)

    def _run(self):
        while self._texts or not self._finished:
            with self._news:
                self._news.wait_for(lambda: self._texts or self._finished)
                texts, self._texts = self._texts, []
                lost, self._lost = self._lost, 0
                if lost:  # behind these texts, and before the next
                    self.line(f"({lost} lines are missing here, unread)")
            # A character that the encoding lacks must not lose the line.
            data = "".join(texts).encode(self._encoding, "backslashreplace")
            try:
                while data and self._file is not None:
                    sent = self._file.write(data)
                    if sent is None:  # another program made it non-blocking
                        time.sleep(0.01)
                    data = data[sent or 0:]
            except OSError as error:
                self.failure = error
                return self._failed()


def _describe(info):
    where = format_address(info.si or info.Ri, info.sp or info.Rp)
    keepalive = ",".join(map(str, info.keepalive or ["off"]))
    return (f"conid {info.conid}  {info.proto} {where}  {info.phase}"
            f"  {info.state} {info.state.name}  age {info.age:.1f} s,"
            f" idle {info.idle:.1f} of {info.lifetime:.9g} s, keepalive"
            f" {keepalive}, {info.bytes_in} bytes in, {info.bytes_out} out")


def _is_terminal(stream):
    """Whether it is a terminal, and we are no background job of it."""
    try:
        return stream.isatty() and (
            not hasattr(os, "tcgetpgrp")  # Windows has no such jobs
            or os.tcgetpgrp(stream.fileno()) == os.getpgrp())
    except (AttributeError, ValueError, OSError):  # none, closed, not ours
        return False


def _handle_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


class _Program:
    """The command line at work: handlers that print, and the console."""

    def __init__(self, options, ops):
        self._options, self._ops = options, ops
        self._stopped, self._patience = False, 1
        self._out = self._err = _Output(sys.stdout, self.stop)
        typed, shown = map(_is_terminal, (sys.stdin, sys.stdout))
        self._console = options.console or typed
        self._out.prompt = "> " * (typed and shown)
        if not shown or not _is_terminal(sys.stderr):
            self._err = _Output(sys.stderr)  # else: over the prompt, too
        logging.basicConfig(
            handlers=[self._err], level=options.log_level.upper(),
            format="%(asctime)s %(levelname)s %(message)s")
        ops.request_route(self._message)
        for name in EVENT_NAMES:
            ops.event_route(name)(self._event)

    def stop(self):
        """Leave soon; safe in any thread, and in a signal handler."""
        self._stopped = True
        self._ops.stop()

    def interrupt(self, *_):
        """Handle a signal: leave soon, or, if that was said before, now."""
        if self._stopped:
            self._patience = 0.1
            _handle_signals(signal.SIG_IGN)
            raise KeyboardInterrupt
        self.stop()

    def run(self):
        """Serve until told to stop; raise SystemExit if that fails."""
        options, ops = self._options, self._ops
        with ops:
            self._start("listen on", ops.listen, options.listen)
            self._start("connect to", ops.connect, options.connect)
            if self._console:
                threading.Thread(target=self._read, daemon=True).start()
            if options.listen:
                ops.run()
            while not self._stopped and ops.conids():
                ops.step(0.1)  # and see whether a signal has come
            ops.drain(5)
        if not options.listen and not ops.stats()["opened"]:
            sys.exit(f"{_NAME}: no connection was made")

    def finish(self):
        """Have the last lines read; raise SystemExit if that failed."""
        self._out.write(self._out.prompt and _ERASE)
        for output in (self._out, self._err):
            output.finish(self._patience)
        if self._out.failure:
            sys.exit(f"{_NAME}: cannot write: {self._out.failure.strerror}")

    def _start(self, what, method, addresses):
        for address in addresses:
            where, framing = format_address(*address), self._options.framing
            try:
                info = self._ops.connection(method(*address, framing=framing))
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                sys.exit(f"{_NAME}: cannot {what} {where}: {reason}")
            line = f"connecting to {where} (conid {info.conid}, {framing})"
            if info.origin == "listen":
                where = format_address(info.Ri, info.Rp)
                line = f"listening on {where} (conid {info.conid}, {framing})"
                if framing in ("raw", "line"):
                    host = LOOPBACKS.get(info.Ri, info.Ri)
                    line += f"; try: nc {host} {info.Rp}"
                line += "; type help for commands" * self._console
            self._out.line(line)

    def _show(self, name, conid, text):
        clock = f"{datetime.datetime.now():%H:%M:%S.%f}"[:-3]
        self._out.line(f"{clock} {name:11} conid {conid}  {text}")

    def _message(self, msg):
        self._show("message", msg.conid,
                   f"{len(msg.data)} bytes  {msg.payload[:72]!r}")
        if self._options.echo:
            msg.reply(msg.payload)

    def _event(self, event):
        text = f"{event.proto} {format_address(event.si, event.sp)}"
        if event.is_end:
            text = (f"{event.reason}  {event.age:.1f} s, {event.bytes_in}"
                    f" bytes in, {event.bytes_out} out")
            if event.detail not in _PLAIN_DETAILS:
                text += f"  ({event.detail})"
        self._show(event.name, event.conid, text)
        if not event.is_end and self._options.keepalive:
            self._ops.tcp_keepalive_enable(*self._options.keepalive)

    def _read(self):
        """Read commands, in a thread: not every system can select stdin."""
        # A file object of its own: a daemon thread that held the lock of
        # sys.stdin could not be got out of the way when Python exits.
        lines = open(sys.stdin.fileno(), encoding="utf-8", errors="replace",
                     closefd=False)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            with contextlib.suppress(OSError):  # the terminal has gone
                for line in lines:
                    self._ops.call_soon(self._type, line.strip())
            self._ops.call_soon(self.stop)

    def _type(self, line):
        name, _, rest = line.partition(" ")
        if not line:
            return self._out.write(self._out.prompt)
        if line in ("quit", "exit"):
            return self.stop()
        if line == "help":
            answer = _HELP
        elif line == "list":
            infos = self._ops.listeners() + self._ops.connections()
            answer = "\n".join(map(_describe, infos)) or "no connections"
        elif name.startswith("tcp_") and hasattr(TcpOps, name):
            answer = getattr(self._ops, name)(*rest.split())
            if isinstance(answer, State):
                answer = f"{answer} {answer.name}"
        elif name == "send":
            conid, _, text = rest.strip().partition(" ")
            payload = re.sub(
                rb"\\([nrt\\]|x[0-9a-fA-F]{2})", lambda found: found[0].decode(
                    "unicode_escape").encode("latin-1"), text.encode())
            with contextlib.suppress(UnicodeDecodeError):
                payload = payload.decode()  # a text message, to a WebSocket
            answer = self._ops.send(conid, payload)
        else:
            answer = f"no such command: {line}; type help"
        self._out.line(f"{answer}")


def _address(text):
    where = text if ":" in text else f"127.0.0.1:{text}"
    # Not a URI, which may ask for TLS; without a match it is a TypeError.
    return parse_address(re.fullmatch(r"(\[.+]|[^:]+):[0-9]+", where)[0], 0)


def _keepalive(text):
    keepalive = Keepalive(*map(int, text.split(",")))
    with socket.socket() as sock:
        set_keepalive(sock, keepalive)  # what the system refuses: now
    return keepalive


# argparse calls a value that is wrong by the name of the function.
_address.__name__ = "[HOST:]PORT"
_keepalive.__name__ = "IDLE,COUNT,INTERVAL"


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog=_NAME, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Shows and steers TCP connections.", epilog=_EPILOG)
    parser.error = lambda message: parser.exit(
        2, f"{_NAME}: {message} (see --help)\n")
    add = parser.add_argument
    add("--listen", metavar="[HOST:]PORT", type=_address, action="append",
        default=[], nargs="?", const=("127.0.0.1", 5060), help="accept"
        " connections (bare: 127.0.0.1:5060; port 0: any); repeatable")
    add("--connect", metavar="[HOST:]PORT", type=_address, action="append",
        default=[], help="connect; repeatable")
    add("--framing", choices=list(FRAMINGS), default="raw", help="a message is"
        " what one read brings (raw, the default), or that framing's")
    add("--lifetime", metavar="S", default=120,
        help="seconds of idleness allowed (default 120)")
    add("--keepalive", metavar="IDLE,COUNT,INTERVAL", type=_keepalive,
        help="turn it on for each connection as it opens")
    add("--closed-event", metavar="N", default=1, help="whose end is reported,"
        " and shown: 0 no one's, 1 everyone's (default), 2 where enabled")
    add("--echo", action="store_true", help="send back what is received")
    add("--console", action="store_true", help="read commands also where"
        " standard input is no terminal; its end is quit")
    add("--log-level", choices=("debug", "info", "warning", "error"),
        default="warning", help="of the log on standard error (warning)")
    add("--version", action="version", version=f"tcpops {__version__}")
    try:
        options = parser.parse_args(argv)
        if not options.listen and not options.connect:
            parser.error("nothing to do: give --listen or --connect")
        if options.console and sys.stdin is None:
            parser.error("--console needs a standard input")
        return options, TcpOps(closed_event=options.closed_event,
                               connection_lifetime=options.lifetime)
    except (OSError, ValueError) as error:
        return parser.error(getattr(error, "strerror", None) or error)


def main(argv=None):
    """Run the command line; return what sys.exit takes.  See --help."""
    try:
        program = _Program(*_parse(argv))
        if argv is None:  # else the signals are the caller's
            _handle_signals(program.interrupt)
        try:
            program.run()
        finally:
            program.finish()
    except SystemExit as leave:
        return leave.code
    except KeyboardInterrupt:
        return 130
    finally:
        if argv is None:  # there is nothing more to do than to leave
            _handle_signals(signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# ---------------------------------------------------------------------------
# The licence, which every copy has to keep: BSD-2-Clause
# ---------------------------------------------------------------------------
# Copyright (c) 2026, the tcpops authors
#
# Redistribution and use in source and binary forms, with or without
# modification, are permitted provided that the following conditions are met:
#  1. Redistributions of source code must retain the above copyright notice,
#     this list of conditions and the following disclaimer.
#  2. Redistributions in binary form must reproduce the above copyright notice,
#     this list of conditions and the following disclaimer in the documentation
#     and/or other materials provided with the distribution.
#
# THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
# AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
# IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE
# ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE
# LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR
# CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF
# SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS
# INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN
# CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE)
# ARISING IN ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE
# POSSIBILITY OF SUCH DAMAGE.
